"""Rotary embedding of LTX-2 (HaCohen et al., arXiv 2601.03233): fractional positions, other frequencies in each head.

A token's position along an axis is the centre p of what it spans, in seconds or in pixels, as a fraction of the axis's
range P. Its angles are

    (2 p / P - 1) theta^(k / (K - 1)) pi / 2,    k = 0 .. K - 1,

with K = d / 2 / axes frequencies for all heads of a layer together (d channels). Axes alternate from channel to channel
and frequencies rise across the heads. Channels are split in halves within a head, and channel i turns with channel
i + e / 2 of the e that a head has.

Angles reach 1.6e4, where a rounding of a position changes a cosine by 1e-3. Tables are therefore made on the host, with
the roundings of the published code: positions, fractions and angles in float32, frequencies in float64 before they are
rounded. Every channel belongs to one axis, so tables of the axes suffice, and a program holds no table of all tokens.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from world_distill.models.rope import by_signs


def video_positions(
    grid: tuple[int, int, int], fps: float, stride: tuple[int, int, int]
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " h"], Float[np.ndarray, " w"]]:
    """Centres of latent frames in seconds, of latent rows and of latent columns in pixels.

    Args:
      grid: latent frames, rows and columns.
      fps: frames a second of the clip.
      stride: pixel frames, rows and columns of one latent cell; the first latent frame is a single pixel frame.
    """
    frames = _edges(grid[0], stride[0]) / np.float32(fps)
    rows, columns = (
        np.arange(n + 1, dtype=np.float32) * np.float32(s) for n, s in zip(grid[1:], stride[1:], strict=True)
    )
    return _centres(frames), _centres(rows), _centres(columns)


def audio_positions(length: int, stride: int, hop: int, rate: int) -> Float[np.ndarray, " a"]:
    """Centres of latent moments of sound in seconds.

    Args:
      length: latent moments.
      stride: spectrogram frames of one moment; the first moment is a single one.
      hop: samples from one spectrogram frame to the next.
      rate: samples a second.
    """
    return _centres(_edges(length, stride) * np.float32(hop) / np.float32(rate))


def _edges(places: int, stride: int) -> np.ndarray:
    """Where places of a causal autoencoder begin, and where the last one ends: the first place is one long."""
    return np.maximum(np.arange(places + 1, dtype=np.float32) * np.float32(stride) + np.float32(1 - stride), 0)


def _centres(edges: np.ndarray) -> np.ndarray:
    return (edges[:-1] + edges[1:]) / np.float32(2)


def axis_tables(
    fractions: Sequence[Float[np.ndarray, " _"]], width: int, theta: float
) -> list[tuple[Float[np.ndarray, "_ c"], Float[np.ndarray, "_ c"]]]:
    """cos and sin of every axis for the c = width / 2 channels that turn; 0 in channels of other axes.

    The sum over axes is the table of a token. Channels that are left over come first; they stay as they are.

    Args:
      fractions: position of every place of an axis, as a fraction of the axis's range.
      width: channels of all heads together.
      theta: base of the frequencies.
    """
    axes, channels = len(fractions), width // 2
    count = channels // axes
    frequencies = (theta ** np.linspace(0.0, 1.0, count) * np.pi / 2).astype(np.float32)
    spare = channels - axes * count
    tables = []
    for axis, fraction in enumerate(fractions):
        angles = (fraction * np.float32(2) - np.float32(1))[:, None] * frequencies
        cos, sin = np.zeros((2, len(fraction), channels), np.float32)
        cos[:, spare + axis :: axes], sin[:, spare + axis :: axes] = np.cos(angles), np.sin(angles)
        if axis == 0:
            cos[:, :spare] = 1
        tables.append((cos, sin))
    return tables


def split_rope(
    positions: Sequence[Float[np.ndarray, " _"]],
    ranges: Sequence[int],
    *,
    width: int,
    heads: int,
    theta: float,
    repeats: int = 1,
    length: int | None = None,
) -> tuple[Float[Array, "n h e"], Float[Array, "n h e"]]:
    """cos and sin of every token and head, for the half of a head's channels.

    Args:
      positions: of the places of each axis; tokens are all combinations, the last axis fastest.
      ranges: of the axes, in the unit of their positions.
      width: channels of all heads together.
      heads: among which channels are divided.
      theta: base of the frequencies.
      repeats: neighbouring tokens of one position, along axes that do not turn.
      length: tokens to fill up to, with rows of 0; None: none are added.
    """
    fractions = [p / np.float32(r) for p, r in zip(positions, ranges, strict=True)]
    axes = len(fractions)

    def expand(tables: Sequence[np.ndarray]) -> Float[Array, "n h e"]:
        # On the device, from small tables: each lies along its own axis of a grid.
        sizes = [[-1 if axis == own else 1 for axis in range(axes)] for own in range(axes)]
        parts = [jnp.asarray(table).reshape(*size, width // 2) for table, size in zip(tables, sizes, strict=True)]
        whole = jnp.repeat(sum(parts[1:], parts[0]).reshape(-1, heads, width // heads // 2), repeats, axis=0)
        return whole if length is None else jnp.pad(whole, ((0, length - len(whole)), (0, 0), (0, 0)))

    cos, sin = zip(*axis_tables(fractions, width, theta), strict=True)
    return expand(cos), expand(sin)


def rotate_halves(
    x: Float[Array, "b n h d"], cos: Float[Array, "n h e"], sin: Float[Array, "n h e"]
) -> Float[Array, "b n h d"]:
    """Turns channel i of every head with channel i + d / 2, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotation(
    cos: Float[Array, "n h e"], sin: Float[Array, "n h e"], platform: str
) -> Callable[[Float[Array, "b n h d"]], Float[Array, "b n h d"]]:
    """`rotate_halves` by these tables, made for a platform."""
    if platform != "tpu":
        return functools.partial(rotate_halves, cos=cos, sin=sin)
    # A TPU would fill each half up to 128 channels. It swaps them with a product of 0, 1 and -1, as `rope.rotate` does.
    cos, sin = (jnp.concatenate([table, table], axis=-1) for table in (cos, sin))
    half = cos.shape[-1] // 2
    swap = np.zeros((2 * half, 2 * half), np.float32)
    swap[np.arange(half) + half, np.arange(half)], swap[np.arange(half), np.arange(half) + half] = -1, 1
    return lambda x: (x * cos + by_signs(x, swap) * sin).astype(x.dtype)
