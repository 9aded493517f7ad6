"""What the video autoencoders share: bytes, fresh weights, and where weights lie.

Weights are nested dicts of arrays; a convolution is `{"kernel": [t h w i o], "bias": [o]}`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from world_distill.structs import PyTree


def to_bytes(clips: Float[Array, "b F H W 3"]) -> UInt8[Array, "b F H W 3"]:
    """Values in [-1, 1] as bytes; what lies beyond is clipped."""
    return jnp.round((jnp.clip(clips.astype(jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)


def to_values(clips: UInt8[Array | np.ndarray, "b F H W 3"]) -> Float[Array, "b F H W 3"]:
    """Bytes as float32 values in [-1, 1]."""
    return jnp.asarray(clips).astype(jnp.float32) / 127.5 - 1


def random_weights(key: jax.Array, shapes: PyTree, dtype: Any) -> PyTree:
    """The weights of an untrained autoencoder: kernels of unit gain, gains of 1, biases of 0.

    Args:
      key: of the random numbers.
      shapes: a tree of tuples, by the names of the arrays: "kernel", "bias", "gain", "mean" or "std".
      dtype: of all but the latents' statistics "mean" (0) and "std" (1), which are float32.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=_is_shape)
    sizes = [math.prod(shape) for _, shape in leaves]
    # One draw for all: XLA's CPU compiler takes a minute over a hundred of them.
    parts = jnp.split(jax.random.normal(key, (sum(sizes),), dtype), np.cumsum(sizes)[:-1])
    drawn = [_random(path[-1].key, x.reshape(shape)) for (path, shape), x in zip(leaves, parts, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def logical_axes(shapes: PyTree) -> PyTree:
    """Logical axis names of the weights, which are kept in parts and gathered before use."""
    return jax.tree.map(_conv_axes, shapes, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _conv_axes(shape: tuple[int, ...]) -> tuple[str | None, ...] | None:
    """Names of a convolution's axes: the wider of its channels, in or out, may be cut. Vectors stay whole."""
    if len(shape) < 3:
        return None
    # Convolutions gain nothing from cut channels: the cut saves memory alone.
    return (*[None] * (len(shape) - 2), *(("conv", None) if shape[-2] > shape[-1] else (None, "conv")))


def _random(name: str, noise: jax.Array) -> jax.Array:
    """One array of an untrained autoencoder, from noise of its shape."""
    if name in ("mean", "std"):  # statistics of latents, no weights: they keep their precision
        return jnp.full(noise.shape, float(name == "std"), jnp.float32)
    if name in ("gain", "bias"):
        return jnp.full_like(noise, float(name == "gain"))
    return noise / math.sqrt(math.prod(noise.shape[-5:-1]))  # the axes before these five count stacked layers
