"""Clips that are too large for a device's memory, in tiles that overlap and are blended where they do.

Tiles are cut in time, height and width, all of one size, so that one program serves all. Tile i of latents covers, of
the clip, the frames and pixels of its latents alone: 1 + 8k frames from 8 times its first latent frame on.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Sizes = tuple[int, int, int]  # of time, height and width


def tile_shape(grid: Sizes, fits: Callable[[Sizes], bool], overlap: Sizes) -> Sizes:
    """The size of tiles that are worked off one at a time: the whole grid, if that fits.

    Args:
      grid: latent frames, rows and columns of a clip.
      fits: whether tiles of a size are small enough.
      overlap: latents that neighbouring tiles share, at least.

    Raises:
      ValueError: tiles would have to be smaller than twice their overlap.
    """
    counts, (f, h, w) = [1, 1, 1], grid
    while not fits((f, h, w)):
        # One cut more where a tile is longest beside what cuts make it compute twice.
        axis = max(range(3), key=lambda i: (f, h, w)[i] / overlap[i])
        counts[axis] += 1
        f, h, w = (-(-(n + (k - 1) * o) // k) for n, k, o in zip(grid, counts, overlap, strict=True))
        if (f, h, w)[axis] < 2 * overlap[axis]:
            raise ValueError(f"latents of {grid} do not fit into memory, even in tiles of {(f, h, w)}")
    return f, h, w


def in_tiles(
    run: Callable[[Array], Array], x: Float[Array, "b f h w c"], grid: Sizes, tile: Sizes, overlap: Sizes, *,
    scale: Sizes, scale_after: Sizes,
) -> Float[Array, "b g p q d"]:  # fmt: skip
    """`run(x)` by tiles; in an overlap, a tile's share grows in a straight line, from 0 a quarter into the overlap.

    Args:
      run: from tiles of `x` to tiles of the result.
      x: latents or clips.
      grid: latent frames, rows and columns of the whole.
      tile: the same of a tile.
      overlap: latents that neighbouring tiles share, at least.
      scale: frames (after the first), rows and columns of `x` for each of the latents.
      scale_after: those of the result.
    """
    if tile == grid:
        return run(x)
    starts = [_starts(*sizes) for sizes in zip(grid, tile, overlap, strict=True)]
    sizes, results = _extent(tile, scale), _extent(tile, scale_after)
    windows = [
        jnp.asarray(_windows(start * by, size, margin * by // 4), jnp.float32)
        for start, by, size, margin in zip(starts, scale_after, results, overlap, strict=True)
    ]

    def corner(numbers: Array, scale: Sizes) -> list[Any]:
        """Where a tile begins, along all axes of an array."""
        first = (jnp.asarray(start * by)[n] for start, by, n in zip(starts, scale, numbers, strict=True))
        return [0, *first, 0]

    def step(total: Array, numbers: Array) -> tuple[Array, None]:
        part = jax.lax.dynamic_slice(x, corner(numbers, scale), (len(x), *sizes, x.shape[-1]))
        f, h, w = (window[n] for window, n in zip(windows, numbers, strict=True))
        y = run(part) * f[:, None, None, None] * h[:, None, None] * w[:, None]
        at = corner(numbers, scale_after)
        there = jax.lax.dynamic_slice(total, at, y.shape)
        return jax.lax.dynamic_update_slice(total, there + y, at), None

    part = jax.eval_shape(run, jax.ShapeDtypeStruct((len(x), *sizes, x.shape[-1]), x.dtype))
    total = jnp.zeros((len(x), *_extent(grid, scale_after), part.shape[-1]), jnp.float32)
    numbers = np.array(list(itertools.product(*(range(len(s)) for s in starts))))
    return jax.lax.scan(step, total, jnp.asarray(numbers))[0]


def _starts(whole: int, tile: int, overlap: int) -> np.ndarray:
    """Where tiles begin that cover an axis, spread evenly."""
    count = 1 if tile == whole else math.ceil((whole - overlap) / (tile - overlap))
    return np.linspace(0, whole - tile, count).round().astype(int)


def _extent(latents: Sizes, scale: Sizes) -> Sizes:
    """Frames, rows and columns of so many latents."""
    return (1 + (latents[0] - 1) * scale[0], latents[1] * scale[1], latents[2] * scale[2])


def _windows(starts: np.ndarray, size: int, margin: int) -> np.ndarray:
    """Each tile's share [tiles, size] in the result along an axis: at every place, the tiles' shares sum to 1."""
    end = starts[-1] + size
    from_start, from_end = np.arange(1, size + 1), np.arange(size, 0, -1)
    shares = np.zeros((len(starts), end))
    for share, start in zip(shares, starts, strict=True):
        # The clip's own ends are no seams.
        distance = np.minimum(from_start if start else end, from_end if start + size < end else end)
        share[start : start + size] = np.maximum(distance - margin, 0)
    shares /= shares.sum(0)
    return np.stack([share[start : start + size] for share, start in zip(shares, starts, strict=True)])
