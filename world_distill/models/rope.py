"""3-D rotary embedding (Su et al., arXiv 2104.09864) of long sequences on accelerators."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from world_distill.models.layers import apply_rope, rope_tables


def rope_waves(
    grid: tuple[int, int, int], axis_dims: tuple[int, int, int], theta: float
) -> tuple[Float[Array, "n e"], Float[Array, "n e"]]:
    """cos and sin of `rope_tables`, for every dimension of a head: two neighbours share an angle.

    Args:
      grid: tokens along time, height and width.
      axis_dims: a head's dimensions that each of them owns; their sum is e.
      theta: base of the frequencies.

    Raises:
      ValueError: an odd number of dimensions.
    """
    tables = []
    for axis, (size, dims) in enumerate(zip(grid, axis_dims, strict=True)):
        shape = [size if other == axis else 1 for other in range(3)]
        own = rope_tables((size, 1, 1), (dims, 0, 0), theta)
        tables.append([np.repeat(table, 2, axis=-1).reshape(*shape, dims) for table in own])

    def joined(parts: Sequence[np.ndarray]) -> Float[Array, "n e"]:
        # On the device, of one small table an axis: as constants, the whole would be a large part of the program.
        whole = [jnp.broadcast_to(part, (*grid, part.shape[-1])) for part in parts]
        return jnp.concatenate(whole, axis=-1).reshape(-1, sum(axis_dims))

    cos, sin = zip(*tables, strict=True)
    return joined(cos), joined(sin)


def rotate(
    x: Float[Array, "b *n h e"], cos: Float[Array, "*n e"], sin: Float[Array, "*n e"], platform: str
) -> Float[Array, "b *n h e"]:
    """`layers.apply_rope`, given waves: rotates interleaved pairs (x[2i], x[2i+1]) of every head."""
    if platform == "cpu":
        y = x.astype(jnp.promote_types(x.dtype, cos.dtype))
        return apply_rope(y, cos[..., 0::2], sin[..., 0::2]).astype(x.dtype)
    width = x.shape[-1]
    # (-x[1], x[0], -x[3], x[2], ...), by a product with 0, 1 and -1, which is exact: a TPU would have to lay out pairs
    # along the innermost axis anew, and makes the product on the way.
    turn = np.zeros((width, width), np.float32)
    even, odd = np.arange(0, width, 2), np.arange(1, width, 2)
    turn[odd, even], turn[even, odd] = -1, 1
    return (x * cos[..., None, :] + by_signs(x, turn) * sin[..., None, :]).astype(x.dtype)


def by_signs(x: Float[Array, "*n e"], signs: Float[np.ndarray, "e e"]) -> Float[Array, "*n e"]:
    """`x @ signs`, where each column of `signs` has one 1 or -1 and zeros: exact in the type of `x`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # a TPU would round float32 to bfloat16
    return jnp.matmul(x, signs.astype(x.dtype), precision=precision)
