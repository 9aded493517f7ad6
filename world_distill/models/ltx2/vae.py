"""The video autoencoder of LTX-2 (HaCohen et al., arXiv 2601.03233), version 2.0, as pure functions.

A clip of 1 + 8k frames becomes 1 + k latent frames, 32 times smaller in height and width. The encoder is causal: a
latent frame depends on no later frame, so the first one is the latent of the first frame alone. The decoder looks both
ways in time. Before a clip's first frame, both see the first frame again; after the last, the decoder sees the last
again. Beyond the border of a frame, the encoder sees zeros and the decoder mirrored pixels.

On several devices, each has some of the clips and a part of their width or height, and sends the lines at its borders
to its neighbours before every convolution. All else happens within a pixel or within a box of pixels.

Weights are nested dicts of arrays, kernels [t h w i o], with a leading axis where equal layers are stacked; clips are
[b F H W 3], latents [b f h w c].
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from world_distill.devices.sharding import pixel_axes, pixels_spec
from world_distill.models.layers import rms_norm
from world_distill.structs import PyTree

# Frames, rows and columns that a step to a lower resolution folds into one.
STRIDES = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}
UP = STRIDES["spatiotemporal"]  # every step of the decoder


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder; the defaults are those of LTX-2 19B.

    Attributes:
      channels: latent channels, which are also the encoder's channels at the highest resolution.
      encoder_widths: the encoder's channels after each step to a lower resolution.
      encoder_blocks: residual blocks before each step, and after the last one.
      steps: what each step halves: "spatial" (height and width), "temporal" (the frame rate) or "spatiotemporal".
      decoder_widths: the decoder's channels before each step to a higher resolution, from the highest resolution on; a
        step halves channels, and doubles height, width and frame rate.
      decoder_blocks: residual blocks after each step, in the same order, and before the first one.
      patch: height and width of the squares that are folded into channels before the first convolution.

    Raises:
      ValueError: lists of lengths that do not fit, an unknown step, decoder widths that do not double from one
        resolution to the next, or a decoder that does not undo what the encoder compresses.
    """

    channels: int = 128
    encoder_widths: tuple[int, ...] = (256, 512, 1024, 2048)
    encoder_blocks: tuple[int, ...] = (4, 6, 6, 2, 2)
    steps: tuple[str, ...] = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    decoder_widths: tuple[int, ...] = (256, 512, 1024)
    decoder_blocks: tuple[int, ...] = (5, 5, 5, 5)
    patch: int = 4

    def __post_init__(self):
        if unknown := [step for step in self.steps if step not in STRIDES]:
            raise ValueError(f"vae.steps has {unknown[0]!r}; there are {', '.join(STRIDES)}")
        down, up = len(self.steps), len(self.decoder_widths)
        if (len(self.encoder_widths), len(self.encoder_blocks), len(self.decoder_blocks)) != (down, down + 1, up + 1):
            raise ValueError(
                "vae: each step has a width and a number of blocks, and one number of blocks more is given"
            )
        if any(2 * high != low for high, low in itertools.pairwise(self.decoder_widths)):
            raise ValueError(f"vae.decoder_widths = {self.decoder_widths}: each must be twice the one before")
        if (self.space, self.time) != (self.patch * 2**up, 2**up):
            raise ValueError(
                f"vae.steps make a clip {self.space} times smaller and {self.time} times shorter, the decoder's steps"
                f" {self.patch * 2**up} times larger and {2**up} times longer"
            )

    @property
    def space(self) -> int:
        """Pixels that a latent pixel is high and wide."""
        return self.patch * math.prod(STRIDES[step][1] for step in self.steps)

    @property
    def time(self) -> int:
        """Frames of a latent frame."""
        return math.prod(STRIDES[step][0] for step in self.steps)

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raises a ValueError for sizes that have no latents."""
        if (frames - 1) % self.time:
            raise ValueError(f"{frames} frames: their number must be 1 + a multiple of {self.time}")
        if height % self.space or width % self.space or min(height, width) < 2 * self.space:
            raise ValueError(
                f"{height}x{width} pixels: height and width must be multiples of {self.space}, and twice that at least"
            )


def encode(
    weights: PyTree, clips: Float[Array, "b F H W 3"], config: VaeConfig, *, mesh: Mesh | None = None
) -> Float[Array, "b f h w c"]:
    """Clips in [-1, 1] to normalised latents, float32 (the mode of the posterior).

    Args:
      weights: `encoder`, and each latent channel's `mean` and `std` are used, in the type of `clips`.
      clips: 1 + 8k frames.
      config: sizes.
      mesh: devices that rows, height and width are spread over.

    Raises:
      ValueError: frames, height or width that have no latents.
    """
    b, frames, height, width, _ = clips.shape
    config.check_clip(frames, height, width)
    grid = (b, 1, height // config.space, width // config.space, 1)
    run = functools.partial(_encoder, config=config)
    z = _spread(run, mesh, grid, weights["encoder"], clips).astype(jnp.float32)
    return (z - weights["mean"]) / weights["std"]


def decode(
    weights: PyTree, latents: Float[Array, "b f h w c"], config: VaeConfig, *, mesh: Mesh | None = None
) -> Float[Array, "b F H W 3"]:
    """Normalised latents to clips, float32; values beyond [-1, 1] are left.

    Args:
      weights: `decoder`, and each latent channel's `mean` and `std` are used. The network computes in their type.
      latents: at least two high and wide.
      config: sizes.
      mesh: devices that rows, height and width are spread over.

    Raises:
      ValueError: latents that are one high or wide, and so have nothing to mirror.
    """
    if min(latents.shape[2:4]) < 2:
        raise ValueError(f"latents of {latents.shape[2]}x{latents.shape[3]}: height and width must be 2 at least")
    z = latents.astype(jnp.float32) * weights["std"] + weights["mean"]
    z = z.astype(weights["decoder"]["conv_in"]["kernel"].dtype)
    return _spread(functools.partial(_decoder, config=config), mesh, latents.shape, weights["decoder"], z)


def _spread(run: Callable[..., Array], mesh: Mesh | None, grid: tuple[int, ...], weights: PyTree, x: Array) -> Array:
    """`run(weights, x, frame=...)` with rows and pixels of `x` spread over a mesh as latents of shape `grid` allow."""
    if mesh is None or mesh.size == 1:
        return run(weights, x, frame=_Frame())
    spec = pixels_spec(mesh, grid)
    local = functools.partial(run, frame=_Frame(*pixel_axes(mesh, *grid[2:4])))
    each = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False)
    return each(weights, x)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Along which axes of the mesh the rows and the columns of a frame are cut."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def extend(self, x: Array, *, mirror: bool) -> Array:
        """x with a line of pixels more on every side: the neighbour's, and beyond the border mirrored ones or zeros."""
        return _extend(_extend(x, 2, self.rows, mirror), 3, self.columns, mirror)


def _extend(x: Array, axis: int, devices: tuple[str, ...], mirror: bool) -> Array:
    if not devices:
        sides = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.pad(x, sides, mode="reflect" if mirror else "constant")
    line = lambda i: jax.lax.slice_in_dim(x, i, i + 1, axis=axis)  # noqa: E731
    size, count, place = x.shape[axis], jax.lax.axis_size(devices), jax.lax.axis_index(devices)
    # Who has no neighbour on a side receives zeros.
    before = jax.lax.ppermute(line(size - 1), devices, [(i, i + 1) for i in range(count - 1)])
    after = jax.lax.ppermute(line(0), devices, [(i + 1, i) for i in range(count - 1)])
    if mirror:  # the line next to the border's own; of a part with one line, the neighbour has it
        first, last = (line(1), line(size - 2)) if size > 1 else (after, before)
        before, after = jnp.where(place == 0, first, before), jnp.where(place == count - 1, last, after)
    return jnp.concatenate([before, x, after], axis=axis)


# The networks --------------------------------------------------------------------------------------------------------


def _encoder(p: PyTree, x: Array, *, frame: _Frame, config: VaeConfig) -> Array:
    conv = functools.partial(_causal, frame=frame)
    # The columns of a square come before its rows.
    x = rearrange(x, "b f (h p) (w q) c -> b f h w (c q p)", p=config.patch, q=config.patch)
    x = conv(p["conv_in"], x)
    for level, step in enumerate(config.steps):
        part = p[f"down_{level}"]
        x = _down(part["step"], _blocks(part["blocks"], x, conv), STRIDES[step], conv)
    x = conv(p["conv_out"], jax.nn.silu(_norm(_blocks(p["middle"], x, conv))))
    return x[..., : config.channels]  # the last channel is the logarithm of the posterior's variance


def _decoder(p: PyTree, z: Array, *, frame: _Frame, config: VaeConfig) -> Array:
    conv = functools.partial(_both_ways, frame=frame)
    x = _blocks(p["middle"], conv(p["conv_in"], z), conv)
    for level in range(len(config.decoder_widths)):
        part = p[f"up_{level}"]
        x = _blocks(part["blocks"], _up(part["step"], x, conv), conv)
    # Pixels in float32: the last bits would be rounded away before they become bytes.
    x = conv(p["conv_out"], jax.nn.silu(_norm(x)), dtype=jnp.float32)
    return rearrange(x, "b f h w (c q p) -> b f (h p) (w q) c", p=config.patch, q=config.patch)


def _blocks(p: PyTree, x: Array, conv: Callable[..., Array]) -> Array:
    """Residual blocks whose weights are stacked along a leading axis."""

    def block(x: Array, p: PyTree) -> tuple[Array, None]:
        h = conv(p["conv1"], jax.nn.silu(_norm(x)))
        return x + conv(p["conv2"], jax.nn.silu(_norm(h))), None

    return jax.lax.scan(block, x, p)[0]


def _down(p: PyTree, x: Array, strides: tuple[int, int, int], conv: Callable[..., Array]) -> Array:
    """Boxes of pixels folded into channels after a convolution, plus the boxes before it, averaged in groups."""
    # Twice the first frame, so that it has a box of its own: no later frame comes into it.
    x = jnp.concatenate([x[:, : strides[0] - 1], x], axis=1)
    y = _fold(conv(p, x), strides)
    return y + _fold(x, strides).reshape(*y.shape, -1).mean(-1)


def _up(p: PyTree, x: Array, conv: Callable[..., Array]) -> Array:
    """Channels unfolded into boxes of pixels after a convolution, plus those before it, repeated; no first frame."""
    y, shortcut = _unfold(conv(p, x)), _unfold(x)
    y = y + jnp.tile(shortcut, y.shape[-1] // shortcut.shape[-1])
    return y[:, UP[0] - 1 :]


def _fold(x: Array, strides: tuple[int, int, int]) -> Array:
    t, p, q = strides
    return rearrange(x, "b (f t) (h p) (w q) c -> b f h w (c t p q)", t=t, p=p, q=q)


def _unfold(x: Array) -> Array:
    t, p, q = UP
    return rearrange(x, "b f h w (c t p q) -> b (f t) (h p) (w q) c", t=t, p=p, q=q)


# Layers --------------------------------------------------------------------------------------------------------------


def _causal(p: PyTree, x: Array, *, frame: _Frame) -> Array:
    """A convolution that sees earlier frames only; before the first, the first again."""
    x = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)), mode="edge")
    return _conv(p, frame.extend(x, mirror=False)).astype(x.dtype)


def _both_ways(p: PyTree, x: Array, *, frame: _Frame, dtype: Any = None) -> Array:
    """A convolution that sees a frame before and one after; beyond the ends, the first and the last again."""
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
    return _conv(p, frame.extend(x, mirror=True)).astype(dtype or x.dtype)


def _conv(p: PyTree, x: Array) -> Array:
    """A convolution that never goes beyond x, float32.

    It is the sum of one over single frames for each of the kernel's frames. XLA's compiler for TPUs takes minutes over
    convolutions in three dimensions with many channels, and lays out their inputs anew.
    """
    taps, rows, columns, _, outputs = p["kernel"].shape
    b, frames, height, width, channels = x.shape
    frames, shape = frames - taps + 1, (height - rows + 1, width - columns + 1, outputs)

    def add(y: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        place, kernel = tap
        each = jax.lax.dynamic_slice_in_dim(x, place, frames, axis=1).reshape(b * frames, height, width, channels)
        return y + jax.lax.conv_general_dilated(
            each, kernel.astype(x.dtype), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        ), None  # fmt: skip

    y = jnp.broadcast_to(p["bias"].astype(jnp.float32), (b * frames, *shape))
    return jax.lax.scan(add, y, (jnp.arange(taps), p["kernel"]))[0].reshape(b, frames, *shape)


def _norm(x: Array) -> Array:
    """Each pixel's channels scaled to a root mean square of 1."""
    return rms_norm(x, eps=1e-8)
