"""Wan's causal video autoencoder (Wan et al., arXiv 2503.20314), versions 2.1 and 2.2, as pure functions.

A clip of 1 + 4k frames becomes 1 + k latent frames; the first stands for the first frame alone. Convolutions look back
in time only, and the layers that halve or double the frame rate leave the first frame alone. So a clip can be worked
off in pieces, any number of latent frames at a time, if every convolution remembers the frames that it looks back to
(`_Tape`). Pieces and whole give the same result; pieces bound the memory. On several devices, each has a part of the
width or height of a clip, and the compiler has them exchange their borders.

Weights are nested dicts of arrays, kernels [t h w i o]; clips are [b F H W 3], latents [b f h w c].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import spread_pixels
from world_distill.structs import PyTree


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder; the defaults are those of Wan2.2-TI2V-5B.

    Attributes:
      channels: latent channels.
      encoder_width: channels of the encoder at the highest resolution.
      decoder_width: channels of the decoder at the highest resolution.
      multiples: channels of each resolution, as multiples of these widths, from the highest on.
      blocks: residual blocks of a resolution.
      halve_time: whether each step to the next lower resolution halves the frame rate, too.
      patch: pixels folded into channels before the first and after the last convolution.
      shortcuts: whether resolutions are bridged by averages and repeats (2.2).
    """

    channels: int = 48
    encoder_width: int = 160
    decoder_width: int = 256
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    halve_time: tuple[bool, ...] = (False, True, True)
    patch: int = 2
    shortcuts: bool = True

    @property
    def space(self) -> int:
        """Pixels that a latent pixel is high and wide."""
        return self.patch * 2 ** (len(self.multiples) - 1)

    @property
    def time(self) -> int:
        """Frames of a latent frame."""
        return 2 ** sum(self.halve_time)

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raises a ValueError for sizes that have no latents."""
        if (frames - 1) % self.time:
            raise ValueError(f"{frames} frames: their number must be 1 + a multiple of {self.time}")
        if height % self.space or width % self.space:
            raise ValueError(f"{height}x{width} pixels: height and width must be multiples of {self.space}")


def encode(
    weights: PyTree, clips: Float[Array, "b F H W 3"], config: VaeConfig, *, piece: int = 0
) -> Float[Array, "b f h w c"]:
    """Clips in [-1, 1] to normalised latents (the mode of the posterior).

    Args:
      weights: `encoder`, `quant`, and each latent channel's `mean` and `std` are used.
      clips: 1 + 4k frames.
      config: sizes.
      piece: latent frames worked on at a time after the first; 0: all at once.

    Raises:
      ValueError: frames, height or width that have no latents.
    """
    config.check_clip(*clips.shape[1:4])
    p = config.patch
    b, frames, height, width, c = clips.shape
    x = clips.reshape(b, frames, height // p, p, width // p, p, c).transpose(0, 1, 2, 4, 6, 5, 3)
    x = x.reshape(b, frames, height // p, width // p, c * p * p)
    moments = _in_pieces(lambda x, tape: _encoder(weights, x, config, tape), x, piece * config.time)
    moments = moments[..., : config.channels].astype(jnp.float32)
    return (moments - weights["mean"]) / weights["std"]


def decode(
    weights: PyTree,
    latents: Float[Array, "b f h w c"],
    config: VaeConfig,
    *,
    piece: int = 0,
    mesh: Mesh | None = None,
) -> Float[Array, "b F H W 3"]:
    """Normalised latents to clips in [-1, 1].

    Args:
      weights: `decoder`, `post_quant`, and each latent channel's `mean` and `std` are used.
      latents: of whole clips.
      config: sizes.
      piece: latent frames worked on at a time; 0: all at once.
      mesh: devices that rows, height and width are spread over.
    """
    p, lay = config.patch, functools.partial(spread_pixels, mesh)
    z = (latents.astype(jnp.float32) * weights["std"] + weights["mean"]).astype(weights["post_quant"]["kernel"].dtype)
    run = lambda z, tape: _decoder(weights, z, config, tape)  # noqa: E731
    x = _in_even_pieces(run, z, piece, lay) if piece else run(z, _Tape(lay=lay))
    b, frames, height, width, c = x.shape
    x = x.reshape(b, frames, height, width, c // (p * p), p, p).transpose(0, 1, 2, 6, 3, 5, 4)
    return jnp.clip(x.reshape(b, frames, height * p, width * p, -1), -1.0, 1.0)


class _Tape:
    """What the convolutions remember of earlier frames, in the order in which they are called."""

    def __init__(self, carried: Sequence[Array] | None = None, lay: Callable[[Array], Array] = lambda x: x):
        self.first = carried is None  # whether this piece begins with the clip's first frame
        self._carried = iter(carried or ())
        self._lay = lay
        self.kept: list[Array] = []

    def extend(self, x: Array, count: int) -> Array:
        """x with the `count` frames before it: zeros before the first."""
        x = self._lay(x)
        before = jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype) if self.first else next(self._carried)
        x = jnp.concatenate([before, x], axis=1)
        self.kept.append(x[:, -count:])
        return x

    def join(self, x: Array) -> Array:
        """x with the one frame before it, if there is one."""
        joined = x if self.first else jnp.concatenate([next(self._carried), x], axis=1)
        self.kept.append(x[:, -1:])
        return joined


class _EvenTape(_Tape):
    """That of a piece that is as long as every other: the clip's first frame is the last of the first piece.

    What stands before it there is nothing: the convolutions see zeros. One program serves all pieces, then.
    """

    def __init__(self, carried: Sequence[Array] | None, begins: Array, lay: Callable[[Array], Array]):
        """`begins` tells the first piece, when the program runs; without `carried`, zeros were before."""
        super().__init__(carried, lay)
        self.first, self._begins, self._blank = False, begins, carried is None

    def extend(self, x: Array, count: int, *, doubled: bool = False) -> Array:
        """As in `_Tape`; `doubled` leaves the first frame out, too."""
        x = self._lay(x)
        there = jnp.arange(x.shape[1]) >= x.shape[1] - (0 if doubled else 1)
        x = jnp.where((there | ~self._begins)[:, None, None, None], x, 0)
        before = jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype) if self._blank else next(self._carried)
        x = jnp.concatenate([before, x], axis=1)
        self.kept.append(x[:, -count:])
        return x

    def keep_first(self, x: Array, pairs: Array) -> Array:
        """`pairs`, two frames for each of `x`, but in the first piece the first frame as it was."""
        return jnp.where(self._begins, jnp.repeat(x, 2, axis=1), pairs)


def _in_even_pieces(run: Callable[[Array, _Tape], Array], x: Array, piece: int, lay: Callable[[Array], Array]) -> Array:
    """`run` over a clip, `piece` frames at a time, of which the first time only the last counts."""
    rest = x.shape[1] - 1
    count = 1 + -(-rest // piece)
    # What is filled in at the end comes after everything else, and so changes nothing.
    x = jnp.pad(x, [(0, 0), (piece - 1, (count - 1) * piece - rest)] + [(0, 0)] * (x.ndim - 2))
    pieces = jnp.moveaxis(x.reshape(x.shape[0], count, piece, *x.shape[2:]), 1, 0)

    def step(carried, job):
        part, number = job
        tape = _EvenTape(carried, number == 0, lay)
        y = run(part, tape)
        return tape.kept, y

    shapes, _ = jax.eval_shape(step, None, (pieces[0], jnp.int32(0)))
    carried = [lay(jnp.zeros(shape.shape, shape.dtype)) for shape in shapes]
    _, ys = jax.lax.scan(step, carried, (pieces, jnp.arange(count)))
    ys = jnp.moveaxis(ys, 0, 1)
    ys = ys.reshape(ys.shape[0], -1, *ys.shape[3:])
    each = ys.shape[1] // count
    return ys[:, each - 1 : each + rest * each // piece]


def _in_pieces(run: Callable[[Array, _Tape], Array], x: Array, piece: int) -> Array:
    """`run` over a clip at once (piece 0), or over its first frame and then `piece` frames at a time."""
    rest = x.shape[1] - 1
    if not piece or not rest:
        return run(x, _Tape())
    tape = _Tape()
    first = run(x[:, :1], tape)
    count = -(-rest // piece)
    # What is filled in at the end comes after everything else, and so changes nothing.
    x = jnp.pad(x[:, 1:], [(0, 0), (0, count * piece - rest)] + [(0, 0)] * (x.ndim - 2))
    pieces = jnp.moveaxis(x.reshape(x.shape[0], count, piece, *x.shape[2:]), 1, 0)

    def step(carried, part):
        tape = _Tape(carried)
        y = run(part, tape)
        return tape.kept, y

    _, ys = jax.lax.scan(step, tape.kept, pieces)
    ys = jnp.moveaxis(ys, 0, 1)
    ys = ys.reshape(ys.shape[0], -1, *ys.shape[3:])
    return jnp.concatenate([first, ys[:, : rest * ys.shape[1] // (count * piece)]], axis=1)


# The networks --------------------------------------------------------------------------------------------------------


def _encoder(weights: PyTree, x: Array, config: VaeConfig, tape: _Tape) -> Array:
    p = weights["encoder"]
    x = _causal(p["conv_in"], x, tape)
    for level, out in enumerate(config.multiples):
        part, start = p[f"down_{level}"], x
        for i in range(config.blocks):
            x = _residual(part[f"res_{i}"], x, tape)
        lower = level < len(config.multiples) - 1
        halves = lower and config.halve_time[level]
        if lower:
            x = _conv(part["space"], jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0))), (1, 2, 2), same=False)
        if halves:
            joined = tape.join(x)
            if tape.first:
                x = (
                    x
                    if x.shape[1] == 1
                    else jnp.concatenate([x[:, :1], _conv(part["time"], joined, (2, 1, 1))], axis=1)
                )
            else:
                x = _conv(part["time"], joined, (2, 1, 1))
        if config.shortcuts:
            x = x + _average(start, out * config.encoder_width, 2 if halves else 1, 2 if lower else 1)
    x = _middle(p, x, tape)
    x = _causal(p["conv_out"], jax.nn.silu(_norm(p["norm_out"], x)), tape)
    return _conv(weights["quant"], x)


def _decoder(weights: PyTree, z: Array, config: VaeConfig, tape: _Tape) -> Array:
    p = weights["decoder"]
    x = _middle(p, _causal(p["conv_in"], _conv(weights["post_quant"], z), tape), tape)
    doubles = (*reversed(config.halve_time), False)
    for level, out in enumerate(reversed(config.multiples)):
        part, start = p[f"up_{level}"], x
        for i in range(config.blocks + 1):
            x = _residual(part[f"res_{i}"], x, tape)
        if level == len(config.multiples) - 1:
            break
        if doubles[level]:
            x = _double_time(part["time"], x, tape)
        x = _conv(part["space"], jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))
        if config.shortcuts:
            x = x + _repeat(start, out * config.decoder_width, 2 if doubles[level] else 1, tape.first)
    return _causal(p["conv_out"], jax.nn.silu(_norm(p["norm_out"], x)), tape)


def _middle(p: PyTree, x: Array, tape: _Tape) -> Array:
    x = _residual(p["mid_0"], x, tape)
    x = _attention(p["attention"], x)
    return _residual(p["mid_1"], x, tape)


def _residual(p: PyTree, x: Array, tape: _Tape) -> Array:
    h = _causal(p["conv1"], jax.nn.silu(_norm(p["norm1"], x)), tape)
    h = _causal(p["conv2"], jax.nn.silu(_norm(p["norm2"], h)), tape)
    return h + (_conv(p["shortcut"], x) if "shortcut" in p else x)


def _attention(p: PyTree, x: Array) -> Array:
    """Self-attention of one head within each frame."""
    b, f, h, w, c = x.shape
    q, k, v = jnp.split(_conv(p["qkv"], _norm(p["norm"], x)).reshape(b * f, h * w, 1, 3 * c), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    return x + _conv(p["out"], y)


def _double_time(p: PyTree, x: Array, tape: _Tape) -> Array:
    """Two frames for each, but one for the clip's first, which the others do not see."""
    head, rest = (x[:, :1], x[:, 1:]) if tape.first else (x[:, :0], x)
    even = isinstance(tape, _EvenTape)
    joined = tape.extend(rest, 2, doubled=True) if even else tape.extend(rest, 2)
    if not rest.shape[1]:
        return head
    b, f, h, w, c = rest.shape
    pairs = _conv(p, joined).reshape(b, f, h, w, 2, c).transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * f, h, w, c)
    return tape.keep_first(x, pairs) if even else jnp.concatenate([head, pairs], axis=1)


def _average(x: Array, outputs: int, time: int, space: int) -> Array:
    """Boxes of pixels folded into channels, and these averaged in groups; zeros before an odd first frame."""
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    b, f, h, w, c = x.shape
    x = x.reshape(b, f // time, time, h // space, space, w // space, space, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], outputs, -1).mean(-1)


def _repeat(x: Array, outputs: int, time: int, first: bool) -> Array:
    """Channels repeated and unfolded into boxes of pixels; the clip's first frame keeps its last copy only."""
    b, f, h, w, c = x.shape
    x = jnp.repeat(x, outputs * time * 4 // c, axis=-1).reshape(b, f, h, w, outputs, time, 2, 2)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, f * time, 2 * h, 2 * w, outputs)
    return x[:, time - 1 :] if first else x


# Layers --------------------------------------------------------------------------------------------------------------


def _causal(p: PyTree, x: Array, tape: _Tape) -> Array:
    return _conv(p, tape.extend(x, p["kernel"].shape[0] - 1))


def _conv(p: PyTree, x: Array, strides: tuple[int, int, int] = (1, 1, 1), *, same: bool = True) -> Array:
    """A convolution that keeps height and width (`same`), or not, and never goes beyond the frames given."""
    kernel = p["kernel"]
    sides = [(size // 2, size // 2) if same else (0, 0) for size in kernel.shape[1:3]]
    dims = ("NDHWC", "DHWIO", "NDHWC")
    y = jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, [(0, 0), *sides], dimension_numbers=dims)
    return y + p["bias"].astype(x.dtype)


def _norm(p: PyTree, x: Array) -> Array:
    """Each pixel's channels scaled to a root mean square of 1, times a gain."""
    x32 = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True))
    return (x32 / jnp.maximum(length, 1e-12) * np.sqrt(x.shape[-1])).astype(x.dtype) * p["gain"].astype(x.dtype)
