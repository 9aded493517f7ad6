"""The transformer of Wan2.2-TI2V-5B (Wan et al., arXiv 2503.20314).

Tokens are 1x2x2 patches of the latents. A block is self-attention with 3-D RoPE, cross-attention to the text and an
MLP. The timestep modulates self-attention and MLP through one projection that all blocks share plus a table of each
block's own. The first latent frame is the scene: its tokens are clean and have time 0, so times differ by frame.

The tokens of a clip are one sequence, filled up behind its end (`models/blocks.py`, which also says how tokens lie on
a device mesh). The fill is no key of attention, and nothing reads its results.

Norms, modulation and gates are computed in float32 whatever the weights are in, and the residual stream is kept in the
weights' type in between: bfloat16 differs visibly otherwise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import constrain, platform_of
from world_distill.models.attention import AttentionKind
from world_distill.models.blocks import Remat, StreamLayout, gated, scan_blocks, spread_times
from world_distill.models.layers import (
    LayerNorm,
    Linear,
    Lora,
    Mlp,
    layer_norm,
    sinusoid,
    stack,
    sub,
)
from world_distill.models.rope import rope_waves, rotate
from world_distill.models.stream_attention import Rotation, StreamAttention


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of the network; the defaults are those of Wan2.2-TI2V-5B.

    Attributes:
      channels: latent channels, in and out.
      width: hidden width.
      depth: blocks.
      heads: attention heads.
      mlp: hidden width of the MLP.
      text_width: width of the text encoder's states.
      time_width: features of a timestep.
      patch: latent pixels a token is high and wide.
      eps: of all norms.
      theta: of RoPE.
      remat: what the backward pass computes again: "none", all but matrix products and attention ("dots"), all but
        attention ("attention"), or each block ("full"). All but "none" keep the inputs of blocks; "offload" is "full"
        with these in the host's memory until they are needed.
      attention: what computes attention: blocked, flash, splash, cudnn or xla; None chooses (`attention.attend`).
      mesh: devices that activations are laid out on; None leaves that to the compiler.
    """

    channels: int = 48
    width: int = 3072
    depth: int = 30
    heads: int = 24
    mlp: int = 14336
    text_width: int = 4096
    time_width: int = 256
    patch: int = 2
    eps: float = 1e-6
    theta: float = 10_000.0
    remat: Remat = "full"
    attention: AttentionKind = None
    mesh: Mesh | None = None

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Rotary dimensions of a head for time, height, width."""
        head = self.width // self.heads
        space = 2 * (head // 6)
        return head - 2 * space, space, space

    @property
    def stream(self) -> StreamLayout:
        """Where activations lie."""
        return StreamLayout(self.mesh)


class Block(nnx.Module):
    """Self-attention, text cross-attention and MLP, each added to the residual stream."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        attention = functools.partial(
            StreamAttention, config.width, config.heads, eps=config.eps, kind=config.attention, mesh=config.mesh,
            rngs=rngs,
        )  # fmt: skip
        self.self_attention = attention()
        self.cross_norm = LayerNorm(config.width, rngs=rngs)
        self.cross_attention = attention()
        self.mlp = Mlp(config.width, config.mlp, rngs=rngs)
        normal = nnx.with_partitioning(jax.nn.initializers.normal(config.width**-0.5), (None, "embed"))
        self.table = nnx.Param(normal(rngs.params(), (6, config.width)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        modulation: Float[Array, "b s 6 d"],
        spread: Callable[[Array], Array],
        text: Float[Array, "b l d"],
        rotation: Rotation,
        lora: Lora,
        scale: float,
        keys: int | None = None,
    ) -> Float[Array, "b n d"]:
        """`spread` gives each token that of its time, [b s d] to [b n d]; for the rest see `WanDiT`."""
        eps, stream = self.config.eps, self.config.stream
        table = self.table[...].astype(jnp.float32) + modulation.astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = (spread(y) for y in jnp.moveaxis(table, 2, 0))
        h = _modulate(x, scale1, shift1, eps)
        factors = sub(lora, "self_attention")
        h = self.self_attention(h, factors, scale, rotations=(rotation, rotation), keys=keys)
        x = gated(x, h, gate1)
        h = self.cross_norm(x, eps)
        x = x + self.cross_attention(h, sub(lora, "cross_attention"), scale, text=text)
        factors = sub(lora, "mlp")
        [h] = stream.up(_modulate(x, scale2, shift2, eps), [self.mlp.up], [sub(factors, "up")], scale)
        h = stream.down(jax.nn.gelu(h).reshape(*x.shape[:2], -1), self.mlp.down, sub(factors, "down"), scale)
        return gated(x, h.reshape(x.shape), gate2)


class WanDiT(nnx.Module):
    """The transformer; blocks are stacked along a leading layer axis and scanned over."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.width, config.patch**2 * config.channels
        self.patch = Linear(patch, width, (None, "embed"), rngs=rngs)
        self.text_in = Linear(config.text_width, width, (None, "embed"), rngs=rngs)
        self.text_out = Linear(width, width, ("embed", None), rngs=rngs)
        self.time_in = Linear(config.time_width, width, (None, "embed"), rngs=rngs)
        self.time_out = Linear(width, width, ("embed", None), rngs=rngs)
        self.time_table = Linear(width, 6 * width, ("embed", None), rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.depth, rngs=rngs)
        normal = nnx.with_partitioning(jax.nn.initializers.normal(width**-0.5), (None, "embed"))
        self.table = nnx.Param(normal(rngs.params(), (2, width)))
        self.head = Linear(width, patch, ("embed", None), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        t: Float[Array, "b s"],
        text: Float[Array, "b l e"],
        lora: Lora = None,
        scale: float = 1.0,
        times: tuple[int, ...] | None = None,
    ) -> Float[Array, "b f h w c"]:
        """Velocity `eps - x_0` of every latent frame, in float32.

        Args:
          x: noisy latents, the scene's frame clean.
          t: times of frames, 1 noise, 0 clean.
          text: states of the text encoder, padded with zeros to the length that the model was trained with: what is
            padded attends like any other token.
          lora: factors, a tree like the weights.
          scale: of LoRA's product.
          times: which of `t` each frame has; None: its own.

        Raises:
          ValueError: a height or width that is not a multiple of the patch.
        """
        config = self.config
        b, f, height, width, _ = x.shape
        p = config.patch
        if height % p or width % p:
            raise ValueError(f"latents are {height}x{width}; both must be multiples of {p}")
        grid = (f, height // p, width // p)
        dtype = self.patch.kernel.dtype
        text = jax.nn.gelu(self.text_in(text.astype(dtype), sub(lora, "text_in"), scale))
        text = constrain(config.mesh, self.text_out(text, sub(lora, "text_out"), scale), ("batch", None, None))
        time = sinusoid(1000.0 * t.astype(jnp.float32), config.time_width).astype(dtype)
        time = jax.nn.silu(self.time_in(time, sub(lora, "time_in"), scale))
        time = self.time_out(time, sub(lora, "time_out"), scale)  # [b s d]
        modulation = self.time_table(jax.nn.silu(time), sub(lora, "time_table"), scale)
        modulation = modulation.reshape(*t.shape, 6, -1)
        tokens = math.prod(grid)
        spare = config.stream.length(tokens) - tokens
        rope = rope_waves(grid, config.rope_dims, theta=config.theta)
        cos, sin = (jnp.pad(y, ((0, spare), (0, 0))) for y in rope)
        rotation = functools.partial(rotate, cos=cos, sin=sin, platform=platform_of(config.mesh))
        columns = np.repeat(np.arange(f) if times is None else np.asarray(times), tokens // f)
        spread = functools.partial(spread_times, columns=np.pad(columns, (0, spare), mode="edge"))

        h = x.astype(dtype).reshape(b, f, grid[1], p, grid[2], p, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        h = jnp.pad(h.reshape(b, tokens, -1), ((0, 0), (0, spare), (0, 0)))
        lay = config.stream.lay
        h = self.patch(lay(h), sub(lora, "patch"), scale)
        graph, blocks = nnx.split(self.blocks)

        def block(h, layer):
            weights, layer_lora = layer
            own: Any = nnx.merge(graph, weights)
            config.stream.settle(own, own.mlp)
            return lay(own(h, modulation, spread, text, rotation, layer_lora, scale, tokens))

        h = scan_blocks(block, h, (blocks, sub(lora, "blocks")), config.remat, lay=lay)
        shift, gain = jnp.moveaxis(self.table[...].astype(jnp.float32) + time.astype(jnp.float32)[:, :, None], 2, 0)
        h = self.head(_modulate(h, spread(gain), spread(shift), config.eps), sub(lora, "head"), scale)
        h = h[:, :tokens].reshape(b, *grid, p, p, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        return h.reshape(x.shape).astype(jnp.float32)


def _modulate(x: Float[Array, "b n d"], scale: Float[Array, "b n d"], shift: Float[Array, "b n d"], eps: float):
    """`norm(x) (1 + scale) + shift`."""
    return (layer_norm(x.astype(jnp.float32), eps) * (1 + scale) + shift).astype(x.dtype)
