"""`interfaces.Codec` of Wan: the autoencoder's weights, laid out on a mesh, and its work cut into pieces."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from world_distill.devices.sharding import gathered, map_rows, rows_at_once
from world_distill.models.tensor_map import our_shapes
from world_distill.models.wan import vae
from world_distill.models.wan.published import vae_entries
from world_distill.structs import Latents, PyTree


@dataclasses.dataclass(frozen=True)
class WanCodec:
    """Reads `base["vae"]`.

    Args:
      config: sizes of the autoencoder.
      dtype: of its weights.
      piece: latent frames decoded at a time; 0: all.
      rows: clips decoded at a time, over all devices; 0: all; None: as `sharding.rows_at_once` says.
      mesh: devices that the weights lie on.
    """

    config: vae.VaeConfig
    dtype: Any = jnp.dtype("float32")
    piece: int = 0
    rows: int | None = None
    mesh: Mesh | None = None
    parts: tuple[str, ...] = ("vae",)

    def decode(self, base: PyTree, latents: Latents) -> jax.Array:
        weights = gathered(self.mesh, base["vae"])

        def some(latents):
            clips = vae.decode(weights, latents, self.config, piece=self.piece, mesh=self.mesh)
            return jnp.round((clips.astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)

        rows = rows_at_once(self.mesh, len(latents["video"]), self.rows)
        return map_rows(some, rows, latents["video"])

    def encode(self, base: PyTree, clips: jax.Array) -> dict[str, jax.Array]:
        weights = gathered(self.mesh, base["vae"])
        return {"video": vae.encode(weights, clips.astype(jnp.float32) / 127.5 - 1, self.config)}

    def init(self, key: jax.Array) -> PyTree:
        """Random weights."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(self._shapes(), is_leaf=_is_shape)
        sizes = [math.prod(shape) for _, shape in leaves]
        # One draw for all: XLA's CPU compiler takes a minute over a hundred of them.
        parts = jnp.split(jax.random.normal(key, (sum(sizes),), self.dtype), np.cumsum(sizes)[:-1])
        drawn = [_random(path[-1].key, x.reshape(shape)) for (path, shape), x in zip(leaves, parts, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    def axes(self) -> PyTree:
        """Logical axis names of the weights, which are kept in parts and gathered before use."""
        return jax.tree.map(_conv_axes, self._shapes(), is_leaf=_is_shape)

    def _shapes(self) -> PyTree:
        channels = self.config.channels
        return our_shapes(vae_entries(self.config)) | {"mean": (channels,), "std": (channels,)}


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
    return noise / math.sqrt(math.prod(noise.shape[:-1]))
