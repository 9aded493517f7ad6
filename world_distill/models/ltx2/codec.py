"""`interfaces.Codec` of LTX-2's picture: the autoencoder's weights, laid out on a mesh, and its work cut into tiles."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from world_distill.devices.sharding import gathered, map_rows, pixel_axes, rows_at_once
from world_distill.models import autoencoders
from world_distill.models.ltx2 import tiles, vae
from world_distill.models.ltx2.vae_tensors import vae_entries
from world_distill.models.tensor_map import our_shapes
from world_distill.structs import Latents, PyTree

PLACES = 6144  # latents of a clip of 121 frames at 512x768


@dataclasses.dataclass(frozen=True)
class LTX2Codec:
    """Reads `base["vae"]`; latents are those of the stream "video", and of a sound track nothing is decoded.

    A clip is worked on as a whole if a device's part of it has at most `places` latents: 121 frames at 512x768 on one
    device, four times as much on four that share the clip. Larger clips are cut into tiles that overlap. Tiles are not
    exact, since a pixel depends on latents up to 21 places away. With random weights of the published depth, whose
    residual branches are scaled by .3, the worst line of pixels at a seam is off by 13 % of the clip's standard
    deviation (root mean square). An overlap of 2 latents makes that 91 %. No trained weights were measured.

    XLA's compiler for v5e plans 1.3 GiB of temporaries on each of four chips that share a clip of 121 frames at
    512x768, 6.8 GiB on a chip that has it alone, and, for 1088x1920 in tiles, 9.6 GiB on each of four.

    Args:
      config: sizes of the autoencoder.
      dtype: of its weights, in which it decodes; it encodes in float32.
      places: latents of one clip that a device works on at once.
      overlap: latent frames, rows and columns that neighbouring tiles share.
      rows: clips worked on at a time, over all devices; 0: all; None: as `sharding.rows_at_once` says.
      mesh: devices that the weights lie on.
    """

    config: vae.VaeConfig
    dtype: Any = jnp.dtype("bfloat16")
    places: int = PLACES
    overlap: tuple[int, int, int] = (6, 6, 6)
    rows: int | None = None
    mesh: Mesh | None = None
    parts: tuple[str, ...] = ("vae",)

    def decode(self, base: PyTree, latents: Latents) -> jax.Array:
        weights = gathered(self.mesh, base["vae"])
        grid = latents["video"].shape[1:4]
        run = functools.partial(vae.decode, weights, config=self.config, mesh=self.mesh)
        some = lambda z: autoencoders.to_bytes(self._in_tiles(run, z, grid, decodes=True))  # noqa: E731
        return map_rows(some, rows_at_once(self.mesh, len(latents["video"]), self.rows), latents["video"])

    def encode(self, base: PyTree, clips: jax.Array) -> dict[str, jax.Array]:
        weights = gathered(self.mesh, base["vae"])
        frames, height, width = clips.shape[1:4]
        self.config.check_clip(frames, height, width)
        space = self.config.space
        grid = (1 + (frames - 1) // self.config.time, height // space, width // space)
        run = functools.partial(vae.encode, weights, config=self.config, mesh=self.mesh)
        some = lambda clips: self._in_tiles(run, autoencoders.to_values(clips), grid, decodes=False)  # noqa: E731
        return {"video": map_rows(some, rows_at_once(self.mesh, len(clips), self.rows), clips)}

    def _in_tiles(self, run: Callable[..., jax.Array], x: jax.Array, grid: tiles.Sizes, *, decodes: bool) -> jax.Array:
        tile = tiles.tile_shape(grid, self._fits, self.overlap)
        latents, pixels = (1, 1, 1), (self.config.time, self.config.space, self.config.space)
        before, after = (latents, pixels) if decodes else (pixels, latents)
        return tiles.in_tiles(run, x, grid, tile, self.overlap, scale=before, scale_after=after)

    def _fits(self, tile: tiles.Sizes) -> bool:
        """Whether a device's part of a tile has at most `places` latents."""
        devices = 1
        if self.mesh is not None:
            devices = math.prod(self.mesh.shape[axis] for axes in pixel_axes(self.mesh, *tile[1:]) for axis in axes)
        return math.prod(tile) <= self.places * devices

    def init(self, key: jax.Array) -> PyTree:
        """Random weights."""
        return autoencoders.random_weights(key, our_shapes(vae_entries(self.config)), self.dtype)

    def axes(self) -> PyTree:
        """Logical axis names of the weights, which are kept in parts and gathered before use."""
        return autoencoders.logical_axes(our_shapes(vae_entries(self.config)))
