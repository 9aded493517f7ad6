"""Layers shared by the video transformers: linear maps with LoRA, RMSNorm, attention, 3-D RoPE, timestep embedding.

Parameters carry logical axis names (`nnx.with_partitioning`); `sharding.RULES` maps these names to mesh axes. LoRA
factors are not part of a module: they come in as an argument, a dict that mirrors the module's own tree, so one set of
base weights serves the Demonstrator (None) and any number of Executors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from world_distill.models.int8 import Int8Kernel

Lora = dict | None


def sub(lora: Lora, name: str) -> Lora:
    """The part of a LoRA tree that belongs to the sub-module `name`; None where there is none."""
    return None if lora is None else lora.get(name)


class Linear(nnx.Module):
    """`x W + b`, plus `scale (x A) B` when LoRA factors are given (Hu et al., arXiv 2106.09685).

    Args:
      axes: logical axis names of the kernel's input and output dimension.
      zero: start from zero weights (output layers and gates).
    """

    def __init__(self, inputs: int, outputs: int, axes, *, rngs: nnx.Rngs, bias: bool = True, zero: bool = False):
        self.axes = tuple(axes)
        make = jax.nn.initializers.zeros if zero else jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(nnx.with_partitioning(make, axes)(rngs.params(), (inputs, outputs)))
        zeros = nnx.with_partitioning(jax.nn.initializers.zeros, (axes[1],))
        self.bias = nnx.data(nnx.Param(zeros(rngs.params(), (outputs,))) if bias else None)

    def __call__(self, x: Float[Array, "*n i"], lora: Lora = None, scale: float = 1.0) -> Float[Array, "*n o"]:
        y = x @ self.dense_kernel
        if lora is not None:
            y = y + scale * ((x @ lora["a"].astype(x.dtype)) @ lora["b"].astype(x.dtype))
        return self.add_bias(y)

    @property
    def dense_kernel(self) -> Float[Array | np.ndarray, "i o"]:
        """The kernel to compute with, whether it is kept as int8 or not."""
        kernel = self.kernel.get_value()
        return kernel.dense() if isinstance(kernel, Int8Kernel) else kernel

    def add_bias(self, y: Float[Array, "*n o"]) -> Float[Array, "*n o"]:
        """`y + b`."""
        return y if self.bias is None else y + self.bias[...]


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules of one kind as one, their weights stacked along a leading axis "layers", for a scan over them."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs):
        return make(rngs)

    return build(rngs)


def rms_norm(
    x: Float[Array, "*n d"], weight: Float[Array, " d"] | None = None, eps: float = 1e-6
) -> Float[Array, "*n d"]:
    """RMSNorm over the last axis (Zhang and Sennrich, arXiv 1910.07467), in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (y if weight is None else y * weight).astype(x.dtype)


def layer_norm(x: Float[Array, "*n d"], eps: float = 1e-6) -> Float[Array, "*n d"]:
    """LayerNorm over the last axis without scale and bias (Ba et al., arXiv 1607.06450), in float32."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    # Both sums in one pass; what is left of rounding is a 1e7th of mean^2.
    variance = jnp.maximum(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    y = (x32 - mean) * jax.lax.rsqrt(variance + eps)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        ones = nnx.with_partitioning(jax.nn.initializers.ones, ("embed",))
        zeros = nnx.with_partitioning(jax.nn.initializers.zeros, ("embed",))
        self.scale = nnx.Param(ones(rngs.params(), (width,)))
        self.bias = nnx.Param(zeros(rngs.params(), (width,)))

    def __call__(self, x: Float[Array, "*n d"], eps: float = 1e-6) -> Float[Array, "*n d"]:
        y = layer_norm(x.astype(jnp.float32), eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def modulate(x: Float[Array, "b n d"], scale, shift) -> Float[Array, "b n d"]:
    """Adaptive layer norm's affine part: `norm(x) (1 + scale) + shift` (Peebles and Xie, arXiv 2212.09748)."""
    return rms_norm(x) * (1 + scale) + shift


def sinusoid(t: Float[Array, "*n"], width: int, max_period: float = 10_000.0) -> Float[Array, "*n w"]:
    """[cos | sin] features of `t` at `width / 2` geometric frequencies."""
    frequencies = np.exp(-np.log(max_period) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angles = t[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_tables(
    grid: tuple[int, int, int], axis_dims: tuple[int, int, int], theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [f*h*w, sum(axis_dims) / 2] of a 3-D rotary embedding (Su et al., arXiv 2104.09864).

    Computed in float64 on the host: single precision is visibly off at long clips. Positions are grid indices; each
    axis owns `axis_dims` of the head's dimensions.
    """
    if any(d % 2 for d in axis_dims):
        raise ValueError(f"rotary dimensions must be even, got {axis_dims}")
    positions = np.stack(np.meshgrid(*[np.arange(n) for n in grid], indexing="ij"), axis=-1).reshape(-1, 3)
    angles = [
        positions[:, i, None] * theta ** (-np.arange(0, d, 2, dtype=np.float64) / d) for i, d in enumerate(axis_dims)
    ]
    angles = np.concatenate(angles, axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rope(
    x: Float[Array, "b *n h d"], cos: Float[Array | np.ndarray, "*n e"], sin: Float[Array | np.ndarray, "*n e"]
) -> Float[Array, "b *n h d"]:
    """Rotates interleaved pairs (x[2i], x[2i+1]) of every head by the tables' angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


class Attention(nnx.Module):
    """Multi-head attention with RMSNorm on queries and keys (per head), over itself or over a context."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.k = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.v = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.out = Linear(width, width, ("heads", "embed"), rngs=rngs)
        ones = nnx.with_partitioning(jax.nn.initializers.ones, (None,))
        self.q_norm = nnx.Param(ones(rngs.params(), (width // heads,)))
        self.k_norm = nnx.Param(ones(rngs.params(), (width // heads,)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
        rope: tuple | None = None,
        lora: Lora = None,
        scale: float = 1.0,
    ) -> Float[Array, "b n d"]:
        source = x if context is None else context
        q = rearrange(self.q(x, sub(lora, "q"), scale), "b n (h e) -> b n h e", h=self.heads)
        k = rearrange(self.k(source, sub(lora, "k"), scale), "b m (h e) -> b m h e", h=self.heads)
        v = rearrange(self.v(source, sub(lora, "v"), scale), "b m (h e) -> b m h e", h=self.heads)
        q, k = rms_norm(q, self.q_norm[...]), rms_norm(k, self.k_norm[...])
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        mask = None if mask is None else mask[:, None, None, :]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.out(rearrange(y, "b n h e -> b n (h e)"), sub(lora, "out"), scale)


class Mlp(nnx.Module):
    """Two linear maps around a tanh-GELU."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Float[Array, "*n d"], lora: Lora = None, scale: float = 1.0) -> Float[Array, "*n d"]:
        return self.down(jax.nn.gelu(self.up(x, sub(lora, "up"), scale)), sub(lora, "down"), scale)
