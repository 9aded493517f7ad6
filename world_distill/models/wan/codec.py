"""`interfaces.Codec` of Wan: the autoencoder's weights, laid out on a mesh, and its work cut into pieces."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from world_distill.devices.sharding import gathered, map_rows, rows_at_once
from world_distill.models import autoencoders
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
            return autoencoders.to_bytes(vae.decode(weights, latents, self.config, piece=self.piece, mesh=self.mesh))

        rows = rows_at_once(self.mesh, len(latents["video"]), self.rows)
        return map_rows(some, rows, latents["video"])

    def encode(self, base: PyTree, clips: jax.Array) -> dict[str, jax.Array]:
        weights = gathered(self.mesh, base["vae"])
        return {"video": vae.encode(weights, autoencoders.to_values(clips), self.config)}

    def init(self, key: jax.Array) -> PyTree:
        """Random weights."""
        return autoencoders.random_weights(key, self._shapes(), self.dtype)

    def axes(self) -> PyTree:
        """Logical axis names of the weights, which are kept in parts and gathered before use."""
        return autoencoders.logical_axes(self._shapes())

    def _shapes(self) -> PyTree:
        channels = self.config.channels
        return our_shapes(vae_entries(self.config)) | {"mean": (channels,), "std": (channels,)}
