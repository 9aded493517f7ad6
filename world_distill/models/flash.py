"""Attention of every token to every token as two Pallas kernels for TPUs: FlashAttention without masks.

A video model attends without masks, so that only keys that fill up the last tile have to be kept out. JAX's splash
kernel compares segment numbers for them at every score; here the last tile has a body of its own. The backward pass
computes the scores once for all three gradients and sums the queries' in VMEM, the fast memory of a core, where a
head's whole gradient lies until it is done. What that costs a core is read from the compiler's schedules by
`tests/benchmarks/attention_tiles.py`.

Dao et al., arXiv 2205.14135 and 2307.08691. Shapes: heads h (of all rows), queries n, keys m, width e.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# What the backward pass of attention needs beside the inputs, under the name by which `jax.checkpoint` may keep it.
SAVED = "attention"

LANES = 128  # a register of a core has 8 x 128 numbers
_LOWEST = -1e30
# Beside a head's gradient: two tiles of each argument and result, scores, and sums.
_ROOM = 24 * 2**20


def tile(length: int) -> int:
    """Rows of a tile, 128 to 1024: the most whose whole tiles add less than a 16th to a sequence of this length."""
    for rows in (1024, 512, 256):
        if -length % rows <= length // 16:
            return rows
    return 128


def key_tile(length: int) -> int:
    """Keys of a tile, for a length of whole tiles: those that cost least of what divides it.

    The more keys, the less often sums are rescaled; 4,096 would save another 3 %, and do not fit JAX's kernel in VMEM.
    By the schedules of the compiled kernels (`tests/benchmarks/attention_tiles.py`).
    """
    return next((keys for keys in (2048, 1536) if length % keys == 0), tile(length))


def turn_keys(tile_k: int) -> int:
    """Keys of a tile whose scores are computed in one turn."""
    return tile_k if tile_k <= 1024 else tile_k // 2


def vmem(queries: int, width: int) -> int:
    """Bytes of a core's VMEM that the backward pass asks for, with a head's gradient of this many queries."""
    filled = queries + -queries % tile(queries)
    return 4 * filled * width + _ROOM


def flash_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    keys: int | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b n h e"]:
    """`softmax(q k^T / sqrt(e)) v` of every head, on one device.

    Args:
      q: queries; heads have to be a multiple of 128 wide.
      k: keys.
      v: values.
      keys: how many of `k` are keys; None: all.
      interpret: run the kernels' code on a CPU, for tests.
    """
    b, n, h, e = q.shape
    m = k.shape[1]
    keys = m if keys is None else keys
    n_full, m_full = n + -n % tile(n), m + -m % tile(m)

    def by_head(x, length):
        x = x if length == x.shape[1] else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        return x.transpose(0, 2, 1, 3).reshape(b * h, length, e)

    y = cast(Array, _attend(keys, interpret, by_head(q * e**-0.5, n_full), by_head(k, m_full), by_head(v, m_full)))
    y = y.reshape(b, h, n_full, e).transpose(0, 2, 1, 3)
    return y if n_full == n else y[:, :n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    keys: int, interpret: bool, q: Float[Array, "h n e"], k: Float[Array, "h m e"], v: Float[Array, "h m e"]
) -> Float[Array, "h n e"]:
    return _forward(keys, interpret, q, k, v)[0]


def _attend_and_save(keys, interpret, q, k, v):
    y, lse = (checkpoint_name(x, SAVED) for x in _forward(keys, interpret, q, k, v))
    return y, (q, k, v, y, lse)


def _gradients(keys, interpret, saved, dy):
    q, k, v, y, lse = saved
    # What the softmax takes off every score's gradient: one number a query.
    mean = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1)[:, None]
    if keys == k.shape[1]:
        return _backward(keys, interpret, q, k, v, dy, lse, mean)
    real = (jnp.arange(k.shape[1]) < keys)[:, None]
    # That kernel has no mask: keys that are 0 add nothing to the gradient of the queries.
    dq, dk, dv = _backward(keys, interpret, q, jnp.where(real, k, 0), v, dy, lse, mean)
    return dq, jnp.where(real, dk, 0), jnp.where(real, dv, 0)


_attend.defvjp(_attend_and_save, _gradients)


def _forward(
    keys: int, interpret: bool, q: Float[Array, "h n e"], k: Float[Array, "h m e"], v: Float[Array, "h m e"]
) -> tuple[Float[Array, "h n e"], Float[Array, "h 1 n"]]:
    """(attention, the logarithm of the softmax's denominator)."""
    (h, n, e), m = q.shape, k.shape[1]
    tile_q, tile_k = tile(n), key_tile(m)
    tiles, at_once = -(-keys // tile_k), turn_keys(tile_k)

    def kernel(q_ref, k_ref, v_ref, y_ref, lse_ref, top_ref, sum_ref, acc_ref):
        j = pl.program_id(2)

        @pl.when(j == 0)
        def _():
            top_ref[...] = jnp.full_like(top_ref, _LOWEST)
            sum_ref[...] = jnp.zeros_like(sum_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def turn(first: int, real: int):
            """Keys `first` to `first + at_once` of the tile, of which those before `real` are keys."""
            part = pl.ds(first, at_once)
            s = _dot(q_ref[...], k_ref[part, :], 1, 1)
            if real < first + at_once:
                s = jnp.where(jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) < real - first, s, _LOWEST)
            before = top_ref[...]
            top = jnp.maximum(before, s.max(axis=1, keepdims=True))
            p = jnp.exp(s - _across(top, at_once))
            shrink = jnp.exp(before - top)
            top_ref[...] = top
            sum_ref[...] = shrink * sum_ref[...] + p.sum(axis=1, keepdims=True)
            v = v_ref[part, :]
            acc_ref[...] = _across(shrink, e) * acc_ref[...] + _dot(p.astype(v.dtype), v, 1, 0)

        def all_keys(real: int):
            for first in range(0, min(tile_k, real), at_once):
                turn(first, real)

        _last_apart(j, tiles, lambda last: all_keys(keys - (tiles - 1) * tile_k if last else tile_k))

        @pl.when(j == tiles - 1)
        def _():
            y_ref[...] = (acc_ref[...] / _across(sum_ref[...], e)).astype(y_ref.dtype)
            lse_ref[...] = (top_ref[...] + jnp.log(sum_ref[...])).T[:1]

    of_q, of_k = _tiles(tile_q, e, lambda h, i, j: i), _tiles(tile_k, e, lambda h, i, j: j)
    return pl.pallas_call(
        kernel,
        grid=(h, n // tile_q, tiles),
        in_specs=[of_q, of_k, of_k],
        out_specs=[of_q, pl.BlockSpec((None, 1, tile_q), lambda h, i, j: (h, 0, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((h, 1, n), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((tile_q, width), jnp.float32) for width in (LANES, LANES, e)],
        compiler_params=_params(_ROOM),
        cost_estimate=_cost(2, q, k),
        interpret=interpret,
        name="flash_forward",
    )(q, k, v)


def _backward(
    keys: int,
    interpret: bool,
    q: Float[Array, "h n e"],
    k: Float[Array, "h m e"],
    v: Float[Array, "h m e"],
    dy: Float[Array, "h n e"],
    lse: Float[Array, "h 1 n"],
    mean: Float[Array, "h 1 n"],
) -> tuple[Float[Array, "h n e"], Float[Array, "h m e"], Float[Array, "h m e"]]:
    """Gradients in queries, keys and values."""
    (h, n, e), m = q.shape, k.shape[1]
    tile_q, tile_k = tile(n), key_tile(m)
    tiles_q, tiles_k, at_once = n // tile_q, -(-keys // tile_k), turn_keys(tile_k)

    def kernel(q_ref, k_ref, v_ref, dy_ref, lse_ref, mean_ref, dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc):
        j, i = pl.program_id(1), pl.program_id(2)
        rows = pl.ds(pl.multiple_of(i * tile_q, tile_q), tile_q)

        @pl.when(j == 0)
        def _():
            dq_acc[rows, :] = jnp.zeros((tile_q, e), jnp.float32)

        @pl.when(i == 0)
        def _():
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)

        q, dy = q_ref[...], dy_ref[...]
        for first in range(0, tile_k, at_once):
            part = pl.ds(first, at_once)
            k, v = k_ref[part, :], v_ref[part, :]
            s = _dot(k, q, 1, 1) - lse_ref[...]  # keys by queries: what a query has, lies in a row
            if keys < m:
                s = jnp.minimum(s, 0.0)  # true of all keys; those that fill up could be infinite
            p = jnp.exp(s)
            dv_acc[part, :] += _dot(p.astype(dy.dtype), dy, 1, 0)
            ds = ((_dot(v, dy, 1, 1) - mean_ref[...]) * p).astype(q.dtype)
            dk_acc[part, :] += _dot(ds, q, 1, 0)
            dq_acc[rows, :] += _dot(ds, k, 0, 0)

        @pl.when(i == tiles_q - 1)
        def _():
            dk_ref[...] = dk_acc[...].astype(dk_ref.dtype)
            dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

        @pl.when(j == tiles_k - 1)
        def _():
            dq_ref[...] = dq_acc[rows, :].astype(dq_ref.dtype)

    of_q, of_k = _tiles(tile_q, e, lambda h, j, i: i), _tiles(tile_k, e, lambda h, j, i: j)
    of_row = pl.BlockSpec((None, 1, tile_q), lambda h, j, i: (h, 0, i))
    # Until the last keys, the first tile stands for all: else every turn would write an unfinished one.
    of_dq = _tiles(tile_q, e, lambda h, j, i: jnp.where(j == tiles_k - 1, i, 0))
    return pl.pallas_call(
        kernel,
        grid=(h, tiles_k, tiles_q),
        in_specs=[of_q, of_k, of_k, of_q, of_row, of_row],
        out_specs=[of_dq, of_k, of_k],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[pltpu.VMEM((rows, e), jnp.float32) for rows in (n, tile_k, tile_k)],
        compiler_params=_params(vmem(n, e)),
        cost_estimate=_cost(5, q, k),
        interpret=interpret,
        name="flash_backward",
    )(q, k, v, dy, lse, mean)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The product of two matrices over one axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _across(x: Float[Array, "r 128"], width: int) -> Float[Array, "r w"]:
    """A number a row, which fills a register's lanes, in so many columns."""
    return x if width == LANES else jnp.tile(x, (1, width // LANES))


def _last_apart(j: Array, tiles: int, body: Callable[[bool], None]) -> None:
    """`body(last)` of tile j: two programs, one of them for the last tile."""
    if tiles == 1:
        body(True)
    else:
        jax.lax.cond(j == tiles - 1, lambda: body(True), lambda: body(False))


def _tiles(rows: int, width: int, number: Callable) -> pl.BlockSpec:
    """Of an array [h rows width], a head's tile of that number."""
    return pl.BlockSpec((None, rows, width), lambda *at: (at[0], number(*at), 0))


def _params(vmem_bytes: int) -> pltpu.CompilerParams:
    # Two cores of a chip may share heads; sums go from tile to tile.
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_bytes)


def _cost(products: int, q: Float[Array, "h n e"], k: Float[Array, "h m e"]) -> pl.CostEstimate:
    scores = q.shape[0] * q.shape[1] * k.shape[1]
    read = 2 * (q.size + k.size) * q.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * scores * q.shape[2], transcendentals=scores, bytes_accessed=read)
