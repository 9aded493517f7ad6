"""Attention of a clip's tokens over themselves, over a text or over another stream, laid out on a device mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import pin_order
from world_distill.models.attention import AttentionKind, attend_on
from world_distill.models.blocks import StreamLayout
from world_distill.models.layers import Linear, Lora, sub

Rotation = Callable[[Array], Array]  # RoPE of queries or keys [b n h e]


class StreamAttention(nnx.Module):
    """Multi-head attention with RMSNorm on queries and keys over all heads at once.

    Args:
      width: of the tokens.
      heads: attention heads.
      inner: width of all heads together; None: `width`.
      source: width of the tokens that give keys and values; None: `width`.
      eps: of the norms.
      kind: what computes attention (`attention.attend`).
      mesh: devices that the tokens lie on; None leaves their layout to the compiler.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        inner: int | None = None,
        source: int | None = None,
        eps: float = 1e-6,
        kind: AttentionKind = None,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.heads, self.eps, self.mesh = heads, eps, mesh
        self.kind: AttentionKind = kind
        inner, source = inner or width, source or width
        self.q = Linear(width, inner, ("embed", "heads"), rngs=rngs)
        self.k = Linear(source, inner, ("embed", "heads"), rngs=rngs)
        self.v = Linear(source, inner, ("embed", "heads"), rngs=rngs)
        self.out = Linear(inner, width, ("heads", "embed"), rngs=rngs)
        ones = nnx.with_partitioning(jax.nn.initializers.ones, ("heads",))
        self.q_norm = nnx.Param(ones(rngs.params(), (inner,)))
        self.k_norm = nnx.Param(ones(rngs.params(), (inner,)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        lora: Lora,
        scale: float,
        *,
        text: Float[Array, "b l e"] | None = None,
        source: Float[Array, "b m e"] | None = None,
        rotations: tuple[Rotation, Rotation] | None = None,
        keys: int | None = None,
    ) -> Float[Array, "b n d"]:
        """Result for every token of `x`.

        Args:
          x: tokens that ask, as the residual stream lies.
          lora: factors, a tree like the weights.
          scale: of LoRA's product.
          text: attend to these, which every device has.
          source: attend to these, another stream that lies as `x` does. Neither: `x` attends to itself.
          rotations: RoPE of queries and of keys; None: no RoPE.
          keys: how many of the tokens that are attended to are keys; None: all.
        """
        stream = StreamLayout(self.mesh)
        layers, factors = (self.q, self.k, self.v), [sub(lora, name) for name in "qkv"]
        if text is not None:
            [q] = stream.up(x, layers[:1], factors[:1], scale)
            h = stream.rows(text)
            k, v = (layer(h, factor, scale) for layer, factor in zip(layers[1:], factors[1:], strict=True))
        elif source is not None:
            [q] = stream.up(x, layers[:1], factors[:1], scale)
            k, v = stream.up(source, layers[1:], factors[1:], scale)
        else:
            q, k, v = stream.up(x, layers, factors, scale)
        told = x if text is None and source is None else source if text is None else text
        split = lambda y, like: y.reshape(*like.shape[:-1], self.heads, -1)  # noqa: E731
        q, k, v = split(q, x), split(k, told), split(v, told)
        # As the attention kernel of TPUs reads them: head by head.
        by_head = functools.partial(pin_order, self.mesh, names=("batch", "length", "heads", None), order=(0, 2, 1, 3))
        q = by_head(q)
        if text is None:
            k, v = by_head(k), by_head(v)
        q, k = norm_heads(q, self.q_norm[...], self.eps), norm_heads(k, self.k_norm[...], self.eps)
        if rotations is not None:
            q, k = (rotate(y) for rotate, y in zip(rotations, (q, k), strict=True))
        y = attend_on(self.mesh, q, k, v, self.kind, itself=told is x, keys=keys)
        return stream.down(y, self.out, sub(lora, "out"), scale).reshape(x.shape)


def norm_heads(x: Float[Array, "b n h e"], weight: Float[Array, " d"], eps: float) -> Float[Array, "b n h e"]:
    """RMSNorm over all heads at once, in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=(-2, -1), keepdims=True) + eps)
    return (y * weight.reshape(x.shape[-2:])).astype(x.dtype)
