"""Scaled dot-product attention on one device and on a mesh, and a form of it for CPUs.

With all heads' scores in memory, attention on a CPU is bound by its caches. `blocked_attention` takes one head and one
block of its queries at a time, so that only the scores [b r m] of `r` queries exist. The backward pass makes them again
from the logarithm of the softmax's denominator, as in FlashAttention (Dao et al., arXiv 2205.14135), without its loop
over keys.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices import chips
from world_distill.devices.sharding import dividing_spec, platform_of
from world_distill.models.flash import SAVED, flash_attention, key_tile, tile, vmem

AttentionKind = Literal["blocked", "flash", "splash", "xla", "cudnn"] | None


def attend(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    kind: AttentionKind = None,
    platform: str | None = None,
    keys: int | None = None,
    one_pass: bool = False,
    chip: chips.Chip | None = None,
) -> Float[Array, "b n h e"]:
    """`softmax(q k^T / sqrt(e)) v` of every head.

    Args:
      q: queries.
      k: keys.
      v: values.
      kind: "blocked" (`blocked_attention`), "flash" (`flash_attention`) or "splash" (`splash_attention`; both for TPUs,
        interpreted on a CPU for tests), "cudnn" (GPU, 16-bit), "xla" (all scores in memory), or None for what suits.
      platform: that the program will run on; None: this process's own.
      keys: how many of `k` are keys; what lies behind them only fills up. None: all.
      one_pass: see `splash_attention`.
      chip: that the program will run on, where it is known.
    """
    platform = platform or jax.default_backend()
    kind = kind or suited(platform, q, chip)
    if kind == "flash":
        return flash_attention(q, k, v, keys, interpret=platform == "cpu")
    if kind == "splash":
        return splash_attention(q, k, v, keys, one_pass=one_pass, interpret=platform == "cpu")
    k, v = k[:, :keys], v[:, :keys]
    if kind == "blocked":
        return blocked_attention(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation=kind)


def suited(platform: str, q: Float[Array, "b n h e"], chip: chips.Chip | None = None) -> AttentionKind:
    """The kind of attention for a platform and queries of this number, type and head width.

    A chip whose fast memory does not hold a head's gradient gets JAX's kernel, and so does one that is not known.
    """
    if platform == "cpu":
        return "blocked"
    if platform == "tpu":
        if q.shape[-1] % 128:
            return "xla"
        return "flash" if chip is not None and vmem(*q.shape[1::2]) < chip.vmem_mib * 2**20 else "splash"
    return "cudnn" if q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 else "xla"


def attend_on(
    mesh: Mesh | None,
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    kind: AttentionKind = None,
    *,
    itself: bool,
    keys: int | None = None,
) -> Float[Array, "b n h e"]:
    """`attend` on a mesh.

    Rows lie along data and fsdp, heads along tensor, tokens along context. Over themselves, tokens are exchanged for
    heads (Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509), so that each device sees every token of some heads. On c
    devices each sends 4 (c - 1) / c^2 of a clip's tokens that way (queries, keys, values, results). Where the heads do
    not divide by c, the exchange stays within groups of g devices, which they divide by: 4 (g - 1) / (g c). Each device
    then gathers keys and values of the other groups: 2 (1 / g - 1 / c) more. A ring would send 2 (c - 1) / c (keys,
    values), more from c = 3 on. Keys of a text are on every device of `context`, and nothing is exchanged.

    Args:
      mesh: None or one device: all of this is one sequence.
      q: queries.
      k: keys, of the same tokens or of a text.
      v: values.
      kind: see `attend`.
      itself: whether keys and values are of the tokens themselves.
      keys: how many of `k` are keys; None: all.

    Raises:
      ValueError: heads that do not divide by tensor, or tokens that do not divide by context.
    """

    def local(q, k, v):
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        chip = chips.chip(device.device_kind)
        return attend(q, k, v, kind, platform_of(mesh), keys, _has_room(chip, q, k), chip)

    if mesh is None or mesh.size == 1:
        return local(q, k, v)
    heads, context, tensor = q.shape[2], mesh.shape["context"], mesh.shape["tensor"]
    if heads % tensor:
        raise ValueError(f"{heads} attention heads do not divide by mesh.tensor = {tensor}; use mesh.context")
    exchanged = itself and context > 1
    if exchanged and q.shape[1] % context:
        raise ValueError(f"{q.shape[1]} tokens do not divide by mesh.context = {context}: fill them up")
    # Neighbours on `context`, whose tokens follow each other, are a group: a row of `groups`.
    groups = np.arange(context).reshape(-1, math.gcd(context, heads // tensor))

    def exchange(y, split_axis, concat_axis):
        return jax.lax.all_to_all(y, "context", split_axis, concat_axis, axis_index_groups=groups.tolist(), tiled=True)

    def gather(y):
        return jax.lax.all_gather(y, "context", axis_index_groups=groups.T.tolist(), axis=1, tiled=True)

    def on_device(q, k, v):
        if not exchanged:
            return local(q, k, v)
        q, k, v = (exchange(y, 2, 1) for y in (q, k, v))
        if len(groups) > 1:
            k, v = gather(k), gather(v)
        return exchange(local(q, k, v), 1, 2)

    def spec(y, tokens):
        return dividing_spec(mesh, ("batch", tokens, "heads", None), y.shape)

    source = "length" if itself else None
    specs = (spec(q, "length"), spec(k, source), spec(v, source))
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(q, k, v)


def _has_room(chip: chips.Chip | None, q: Float[Array, "b n h e"], k: Float[Array, "b m h e"]) -> bool:
    """Whether what `splash_attention` keeps for its `one_pass` is at most a 16th of the memory of a device.

    `q` and `k` are one device's.
    """
    parts = -(-k.shape[1] // key_tile(k.shape[1] + -k.shape[1] % tile(k.shape[1])))
    return chip is not None and parts * q.size * q.dtype.itemsize <= chip.hbm_gib * 2**30 / 16


def splash_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    keys: int | None = None,
    *,
    one_pass: bool = False,
    interpret: bool = False,
) -> Float[Array, "b n h e"]:
    """JAX's Pallas kernel for TPU (`splash_attention`); scores never leave the chip's fast memory.

    Queries and keys are filled up to whole tiles, and segment numbers keep apart what is no key.

    Args:
      q: queries.
      k: keys.
      v: values.
      keys: how many of `k` are keys; None: all.
      one_pass: of the backward pass: gradients of queries, keys and values from one computation of the scores, five
        products a tile. Each tile of keys keeps its part of the queries' gradient in memory, in the type of `q`, until
        they are summed. Else two computations, seven products, and no such parts.
      interpret: run the kernel's code on a CPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    tile_q = tile(n)
    n_full, m_full = n + -n % tile_q, m + -m % tile(m)
    tile_k = key_tile(m_full)
    at_once = tile_k if tile_k <= 1024 else tile_k // 2
    more: dict[str, Any] = {} if one_pass else {"block_q_dq": tile_q, "block_kv_dq": tile_k}
    sizes = kernel.BlockSizes(
        block_q=tile_q, block_kv=tile_k, block_kv_compute=at_once, block_q_dkv=tile_q, block_kv_dkv=tile_k,
        block_kv_dkv_compute=at_once, use_fused_bwd_kernel=one_pass, **more,
    )  # fmt: skip
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((n_full, m_full))] * heads), block_sizes=sizes, head_shards=1,
        q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=interpret,
    )  # fmt: skip
    segments = None
    if (keys := m if keys is None else keys) < m_full:  # a mask would be an array as large as a tile
        segments = kernel.SegmentIds(jnp.zeros(n_full, jnp.int32), (jnp.arange(m_full) >= keys).astype(jnp.int32))

    def filled(y, length):
        y = y if length == y.shape[1] else jnp.pad(y, ((0, 0), (0, length - y.shape[1]), (0, 0), (0, 0)))
        return y.transpose(0, 2, 1, 3)

    q = filled(q * q.shape[-1] ** -0.5, n_full)
    y = jax.vmap(lambda q, k, v: run(q, k, v, segment_ids=segments))(q, filled(k, m_full), filled(v, m_full))
    y = y.transpose(0, 2, 1, 3)  # pyright: ignore[reportAttributeAccessIssue]  # a pair only with residuals
    return y if n_full == n else y[:, :n]


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
