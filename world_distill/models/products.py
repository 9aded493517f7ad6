"""A product with a layer's weights and with LoRA's factors at once.

A product of LoRA's rank alone leaves most of a matrix unit idle, and its result is written out and read again. Beside
the weights, factors cost no more than their share of the larger product: `[x | x A] [W ; B]` is `x W + x A B`, and the
gradient of `x W`, with `A` beside `W`, is made in the same way. The layer's weights are copied for that, which next to
a product with a clip's tokens takes no time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def joint_product(x: Array, weights: Array, factors: Array, axis: int) -> Array:
    """`x` times the weights with the factors beside them, summed over all axes of the weights but the last.

    Gradients of factors are float32. That of frozen weights is not computed.

    Args:
      x: [... i], or [... h e] where the weights are [h e o].
      weights: of the layer.
      factors: like the weights but for the size of `axis`, in any type.
      axis: 0: factors stand under the weights, and `x` is wider by their rows. -1: they stand to the right, and the
        result is wider by their columns.
    """
    return _times(x, _joint(weights, factors, axis))


def _joint(weights: Array, factors: Array, axis: int) -> Array:
    return jnp.concatenate([weights, factors.astype(weights.dtype)], axis)


def _times(x: Array, weights: Array) -> Array:
    return jnp.tensordot(x, weights, weights.ndim - 1)


def _forward(x, weights, factors, axis):
    y = _times(x.value, _joint(weights.value, factors.value, axis))
    return y, (x.value, weights.value, factors.value, () if weights.perturbed else None)


def _zeros(like: Any) -> Array:
    return jnp.zeros(like.shape, like.dtype)


def _backward(axis, saved, dy):
    x, weights, factors, trained = saved
    if isinstance(dy, SymbolicZero):
        dy = _zeros(dy)
    dx = jnp.tensordot(dy, _joint(weights, factors, axis), [(-1,), (-1,)])
    lead = tuple(range(dy.ndim - 1))
    size = weights.shape[axis]
    if axis == 0:
        (x, x_factors), dy_factors = jnp.split(x, [size], -1), dy
    else:
        x_factors, (dy, dy_factors) = x, jnp.split(dy, [size], -1)
    d_factors = jnp.tensordot(x_factors, dy_factors, [lead, lead], preferred_element_type=jnp.float32)
    d_weights = jnp.zeros_like(weights) if trained is None else jnp.tensordot(x, dy, [lead, lead])
    return dx, d_weights, d_factors.astype(factors.dtype)


joint_product.defvjp(_forward, _backward, symbolic_zeros=True)
