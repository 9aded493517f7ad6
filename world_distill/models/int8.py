"""Frozen kernels as 8-bit integers, with one float32 scale for each output channel.

    scale[o] = max_i |W[i, o]| / 127,    values = round(W / scale),    W ~ values scale

Rounding is symmetric and to the nearest (Krishnamoorthi, arXiv 1806.08342). Activations, LoRA and gradients keep their
types, as in QLoRA (Dettmers et al., arXiv 2305.14314): a kernel is turned into the model's dtype where it is used.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from world_distill.structs import PyTree

LARGEST = 127  # -128 is left out, so that a kernel and its negative are rounded alike


@struct.dataclass
class Int8Kernel:
    """A kernel [*layers i o] in a tree of weights, at half the bytes of bfloat16.

    Its leaves may be anything that describes the two arrays, such as shardings.
    """

    values: Any  # [*layers i o] int8
    scale: Any  # [*layers 1 o] float32
    dtype: Any = struct.field(pytree_node=False)  # of the kernel that it stands for

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dense(self) -> Array:
        """The kernel in its dtype; products are made in float32."""
        return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)


def quantise(kernel: Float[Array, "*layers i o"]) -> Int8Kernel:
    """The kernel as int8 (traceable)."""
    w = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=-2, keepdims=True)
    # A channel of zeros would divide by nothing.
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    return Int8Kernel(jnp.round(w / scale).astype(jnp.int8), scale, kernel.dtype)


def quantised(weights: PyTree, paths: Iterable[str]) -> PyTree:
    """A nested dict of weights with the kernels at these dotted paths as int8 (traceable)."""
    flat: dict[str, Any] = dict(flatten_dict(weights, sep="."))
    return unflatten_dict(flat | {path: quantise(flat[path]) for path in paths}, sep=".")


def quantised_axes(axes: PyTree, shapes: PyTree) -> PyTree:
    """Logical axis names of the weights that `quantised` gives, from those of the dense ones.

    Args:
      axes: a tuple of names, or None, for each dense weight.
      shapes: the quantised weights, or what describes them.
    """

    def names(weight: Any, axes: Any) -> Any:
        if not isinstance(weight, Int8Kernel):
            return axes
        *layers, _, outputs = axes
        return Int8Kernel(axes, (*layers, None, outputs), weight.dtype)

    return jax.tree.map(names, shapes, axes, is_leaf=lambda x: isinstance(x, Int8Kernel))


def block_kernels(axes: PyTree) -> list[str]:
    """Dotted paths of the kernels of stacked blocks, from a tree of logical axis names."""
    flat: dict[str, Any] = dict(flatten_dict(axes, sep="."))
    return [path for path, names in flat.items() if path.endswith(".kernel") and names and names[0] == "layers"]
