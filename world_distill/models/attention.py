"""Scaled dot-product attention, and a form of it for CPUs.

With all heads' scores in memory, attention on a CPU is bound by its caches. `blocked_attention` takes one head and one
block of its queries at a time, so that only the scores [b r m] of `r` queries exist. The backward pass makes them again
from the logarithm of the softmax's denominator, as in FlashAttention (Dao et al., arXiv 2205.14135), without its loop
over keys.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

AttentionKind = Literal["blocked", "xla", "cudnn"] | None

# What its backward pass needs beside the inputs, under the name by which `jax.checkpoint` may keep it.
SAVED = "attention"


def attend(
    q: Float[Array, "b n h e"], k: Float[Array, "b m h e"], v: Float[Array, "b m h e"], kind: AttentionKind = None
) -> Float[Array, "b n h e"]:
    """`softmax(q k^T / sqrt(e)) v` of every head. None is "blocked" on CPUs; elsewhere JAX decides."""
    if kind == "blocked" or (kind is None and jax.default_backend() == "cpu"):
        return blocked_attention(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation=kind)


def blocked_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b m h e"], v: Float[Array, "b m h e"], rows: int = 256
) -> Float[Array, "b n h e"]:
    """What `jax.nn.dot_product_attention(q, k, v)` gives, with at most `rows` queries of a head at a time.

    Scores and sums are float32 whatever the inputs are. Heads run one after the other: they should not be sharded.
    """
    b, n, h, e = q.shape
    blocks = -(-n // rows)
    rows = -(-n // blocks)  # of even size: less than a row a block is filled up
    q = jnp.pad(q, ((0, 0), (0, rows * blocks - n), (0, 0), (0, 0)))
    q = q.reshape(b, blocks, rows, h, e).transpose(3, 1, 0, 2, 4)
    k, v = (y.transpose(2, 0, 1, 3) for y in (k, v))
    y = jax.lax.map(lambda head: _head(*head), (q, k, v))
    return y.transpose(2, 1, 3, 0, 4).reshape(b, rows * blocks, h, e)[:, :n]


@jax.custom_vjp
def _head(q: Float[Array, "c b r e"], k: Float[Array, "b m e"], v: Float[Array, "b m e"]) -> Float[Array, "c b r e"]:
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    def one(q):
        scores = _scores(q, k)
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        y = _product("brm,bme->bre", p.astype(v.dtype), v) / total
        return y.astype(q.dtype), top + jnp.log(total)

    y, log_total = (checkpoint_name(x, SAVED) for x in jax.lax.map(one, q))
    return y, (q, k, v, y, log_total)


def _backward(saved, dy):
    q, k, v, y, log_total = saved
    # The softmax's derivative takes off each row's sum of p dp, which is dy . y.
    mean = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)

    def one(sums, block):
        dk, dv = sums
        q, dy, mean, log_total = block
        p = jnp.exp(_scores(q, k) - log_total)
        ds = (p * (_product("bre,bme->brm", dy, v) - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        dk = dk + _product("brm,bre->bme", ds, q)
        dv = dv + _product("brm,bre->bme", p.astype(dy.dtype), dy)
        return (dk, dv), _product("brm,bme->bre", ds, k).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one, (zeros, zeros), (q, dy, mean, log_total))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


_head.defvjp(_forward, _backward)


def _scores(q: Float[Array, "b r e"], k: Float[Array, "b m e"]) -> Float[Array, "b r m"]:
    return _product("bre,bme->brm", q, k) * q.shape[-1] ** -0.5


def _product(axes: str, a: Array, b: Array) -> Array:
    """Their product in float32. Of batches, so that `remat="dots"` does not keep scores."""
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
