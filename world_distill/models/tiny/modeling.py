"""A small image-to-video transformer, of the layers that the real families use.

Tokens are the latent pixels of all frames. The first latent frame is the scene: it is put in clean, with its tokens'
time at 0, and never predicted (as Wan2.2-TI2V-5B and LTX-2 do it). A block is self-attention with 3-D RoPE, text
cross-attention and an MLP; the timestep enters by adaptive norms, shared over blocks but for a table per block (as in
Wan), together with the mean of the text's states (as the pooled text in MM-DiT). RoPE tells tokens how far apart they
are, and lets no token tell another *where* it is; so the places enter once more as sinusoids at the input. The
network predicts the clean latents, and the velocity follows from them, `v = (x_t - x_0) / t`: with patches of
pixels for latents this is the easier target (Li and He, arXiv 2511.13720). The head adds the change to the scene's
frame, so that the narrow residual stream need not carry what stands still.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from world_distill.models.blocks import scan_blocks
from world_distill.models.layers import (
    Attention,
    Linear,
    Lora,
    Mlp,
    modulate,
    rms_norm,
    rope_tables,
    sinusoid,
    stack,
    sub,
)

# The velocity's denominator is bounded below, so that an error in x_0 is not blown up without limit as t -> 0.
T_MIN = 0.05
PLACE_DIMS = (8, 16, 16)  # features of a token's time, row and column


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Sizes of the network.

    Attributes:
      grid: latent frames, height, width (the first frame is the scene).
      channels: latent channels.
      text_width: width of the text encoder's states.
      width, depth, heads, mlp: hidden width, blocks, attention heads, MLP width as a multiple of `width`.
      add_scene: the head gives the change to the scene's frame; the first base that shipped had a head that gave all of
        a frame.
      remat: recompute each block's activations in the backward pass.
      unroll: blocks that one turn of the layer scan computes (CPU backward passes gain from `depth`).
    """

    grid: tuple[int, int, int]
    channels: int
    text_width: int = 64
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp: int = 3
    add_scene: bool = True
    remat: bool = False
    unroll: int = 1

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Rotary dimensions of a head for time, height, width."""
        head = self.width // self.heads
        time = 2 * (head // 8)
        space = 2 * ((head - time) // 4)
        return head - 2 * space, space, space


class Block(nnx.Module):
    """Self-attention, text cross-attention and MLP, each added to the residual stream."""

    def __init__(self, config: TinyConfig, *, rngs: nnx.Rngs):
        self.self_attention = Attention(config.width, config.heads, rngs=rngs)
        self.cross_attention = Attention(config.width, config.heads, rngs=rngs)
        self.mlp = Mlp(config.width, config.mlp * config.width, rngs=rngs)
        normal = nnx.with_partitioning(jax.nn.initializers.normal(0.02), (None, "embed"))
        self.table = nnx.Param(normal(rngs.params(), (6, config.width)))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        modulation: Float[Array, "b f 6 d"],
        text: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"],
        rope: tuple,
        lora: Lora,
        scale: float,
    ) -> Float[Array, "b n d"]:
        # One modulation a frame: all tokens of a frame share their time.
        per_frame = modulation + self.table[...]
        tokens = x.shape[1] // per_frame.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            jnp.repeat(per_frame[:, :, i], tokens, axis=1) for i in range(6)
        )
        h = self.self_attention(modulate(x, scale1, shift1), rope=rope, lora=sub(lora, "self_attention"), scale=scale)
        x = x + gate1 * h
        x = x + self.cross_attention(rms_norm(x), text, text_mask, lora=sub(lora, "cross_attention"), scale=scale)
        return x + gate2 * self.mlp(modulate(x, scale2, shift2), sub(lora, "mlp"), scale)


class TinyDiT(nnx.Module):
    """The transformer; blocks are stacked along a leading layer axis and scanned over."""

    def __init__(self, config: TinyConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch = Linear(config.channels, config.width, (None, "embed"), rngs=rngs)
        self.place = Linear(sum(PLACE_DIMS), config.width, (None, "embed"), rngs=rngs, bias=False)
        self.text_in = Linear(config.text_width, config.width, (None, "embed"), rngs=rngs)
        self.text_out = Linear(config.width, config.width, ("embed", None), rngs=rngs)
        self.pooled = Linear(config.width, config.width, ("embed", None), rngs=rngs)
        self.time_in = Linear(256, config.width, (None, "embed"), rngs=rngs)
        self.time_out = Linear(config.width, config.width, ("embed", None), rngs=rngs)
        self.time_table = Linear(config.width, 6 * config.width, ("embed", None), rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.depth, rngs=rngs)
        self.head_table = Linear(config.width, 2 * config.width, ("embed", None), rngs=rngs, zero=True)
        # A patch of a moving thing has more degrees of freedom than the residual stream is wide: 95 % of its variance
        # lies in 96 dimensions. A hidden layer lets the head draw on a curved set of patches.
        self.head_in = Linear(config.width, 4 * config.width, ("embed", "mlp"), rngs=rngs)
        self.head = Linear(4 * config.width, config.channels, ("mlp", None), rngs=rngs, zero=True)

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        t: Float[Array, "b f"],
        text: Float[Array, "b l e"],
        text_mask: Bool[Array, "b l"],
        lora: Lora = None,
        scale: float = 1.0,
    ) -> Float[Array, "b f h w c"]:
        """Clean latents from noisy ones `x`, with one time a frame; the first frame is returned as it is."""
        config = self.config
        b = x.shape[0]
        text = self.text_out(jax.nn.silu(self.text_in(text, sub(lora, "text_in"), scale)), sub(lora, "text_out"), scale)
        weights = text_mask[..., None] / jnp.maximum(text_mask.sum(-1), 1)[:, None, None]
        pooled = self.pooled(jnp.sum(text * weights, axis=1), sub(lora, "pooled"), scale)
        time = jax.nn.silu(self.time_in(sinusoid(1000.0 * t, 256), sub(lora, "time_in"), scale))
        time = self.time_out(time, sub(lora, "time_out"), scale)
        time = time + pooled[:, None]  # [b f d]
        modulation = self.time_table(jax.nn.silu(time), sub(lora, "time_table"), scale)
        modulation = modulation.reshape(b, t.shape[1], 6, config.width)
        rope = rope_tables(config.grid, config.rope_dims, theta=100.0)

        graph, blocks = nnx.split(self.blocks)

        def block_of(h, layer):
            weights, layer_lora = layer
            block = nnx.merge(graph, weights)
            return block(h, modulation, text, text_mask, rope, layer_lora, scale)

        h = self.patch(x.reshape(b, -1, config.channels), sub(lora, "patch"), scale)
        h = h + self.place(jnp.asarray(place_table(config)), sub(lora, "place"), scale)
        remat = "full" if config.remat else "none"
        h = scan_blocks(block_of, h, (blocks, sub(lora, "blocks")), remat, unroll=config.unroll)
        # The scene's own frame is known; only the others go through the head.
        tokens = h.shape[1] // t.shape[1]
        h, time = h[:, tokens:], time[:, 1:]
        table = self.head_table(jax.nn.silu(time), sub(lora, "head_table"), scale)
        shift, gain = jnp.split(table, 2, axis=-1)
        h = modulate(h, jnp.repeat(gain, tokens, axis=1), jnp.repeat(shift, tokens, axis=1))
        h = jax.nn.gelu(self.head_in(h, sub(lora, "head_in"), scale))
        h = self.head(h, sub(lora, "head"), scale).reshape(b, -1, *x.shape[2:])
        scene = x[:, :1]
        return jnp.concatenate([scene, scene + h if config.add_scene else h], axis=1)


def place_table(config: TinyConfig) -> np.ndarray:
    """Sinusoids of every token's time, row and column, [f*h*w, 40] float32."""
    axes = []
    for count, width in zip(config.grid, PLACE_DIMS, strict=True):
        angles = np.arange(count)[:, None] * np.pi / count * 2.0 ** np.arange(-1, width // 2 - 1)
        axes.append(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1))
    places = np.stack(np.meshgrid(*[np.arange(n) for n in config.grid], indexing="ij"), axis=-1).reshape(-1, 3)
    return np.concatenate([axes[i][places[:, i]] for i in range(3)], axis=-1).astype(np.float32)
