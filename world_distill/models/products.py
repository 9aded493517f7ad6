"""A product with a layer's weights and with LoRA's second factor at once.

A product of LoRA's rank alone leaves most of a matrix unit idle, and its result is written out and read again. With `B`
under the weights, `[x | x A] [W ; B]` is `x W + x A B`, and LoRA costs no more than its share of the larger product.
The layer's weights are copied for that, which next to a product with a clip's tokens takes no time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


@jax.custom_vjp
def joint_product(
    x: Float[Array, "*n j"], weights: Float[Array, "i o"], factors: Float[Array, "r o"]
) -> Float[Array, "*n o"]:
    """`x [weights ; factors]`, where j = i + r. The gradient of frozen weights is not computed.

    Args:
      x: a layer's input, and beside it the inner product of LoRA.
      weights: of the layer.
      factors: LoRA's second factor, of any type; its gradient is summed in float32.
    """
    return x @ _joint(weights, factors)


def _joint(weights: Array, factors: Array) -> Array:
    return jnp.concatenate([weights, factors.astype(weights.dtype)])


def _forward(x, weights, factors):
    y = x.value @ _joint(weights.value, factors.value)
    return y, (x.value, weights.value, factors.value, () if weights.perturbed else None)


def _backward(saved, dy):
    x, weights, factors, trained = saved
    if isinstance(dy, SymbolicZero):
        dy = _zeros(dy)
    over_tokens = [tuple(range(dy.ndim - 1))] * 2
    own, inner = jnp.split(x, [len(weights)], axis=-1)
    d_factors = jnp.tensordot(inner, dy, over_tokens, preferred_element_type=jnp.float32)
    d_weights = jnp.zeros_like(weights) if trained is None else jnp.tensordot(own, dy, over_tokens)
    return dy @ _joint(weights, factors).T, d_weights, d_factors.astype(factors.dtype)


def _zeros(like: Any) -> Array:
    return jnp.zeros(like.shape, like.dtype)


joint_product.defvjp(_forward, _backward, symbolic_zeros=True)
