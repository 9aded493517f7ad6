"""The transformer of Wan2.2-TI2V-5B (Wan et al., arXiv 2503.20314).

Tokens are 1x2x2 patches of the latents. A block is self-attention with 3-D RoPE, cross-attention to the text and an
MLP. The timestep modulates self-attention and MLP through one projection that all blocks share plus a table of each
block's own. The first latent frame is the scene: its tokens are clean and have time 0, so times differ by frame.

Tokens keep two axes, frames and the places in a frame: on a device mesh the places lie along the axis `context`, and
what belongs to a frame is there on every device. Attention alone sees them as one sequence. On the residual stream
places lie along `tensor`, too (`models/blocks.py`).

Norms, modulation and gates are computed in float32 whatever the weights are in, and the residual stream is kept in the
weights' type in between: bfloat16 differs visibly otherwise.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import pin_row_major
from world_distill.models.attention import AttentionKind, attend_on
from world_distill.models.blocks import Remat, StreamLayout, scan_blocks
from world_distill.models.layers import (
    LayerNorm,
    Linear,
    Lora,
    Mlp,
    apply_rope,
    layer_norm,
    rms_norm,
    rope_tables,
    sinusoid,
    stack,
    sub,
)


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
      attention: what computes attention: blocked, splash, cudnn or xla; None chooses by platform (`attention.attend`).
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


class Attention(nnx.Module):
    """Multi-head attention with RMSNorm on queries and keys over all heads at once."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.q = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.k = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.v = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.out = Linear(width, width, ("heads", "embed"), rngs=rngs)
        ones = nnx.with_partitioning(jax.nn.initializers.ones, ("heads",))
        self.q_norm = nnx.Param(ones(rngs.params(), (width,)))
        self.k_norm = nnx.Param(ones(rngs.params(), (width,)))

    def __call__(
        self,
        x: Float[Array, "b f m d"],
        text: Float[Array, "b l d"] | None,
        rope: tuple | None,
        lora: Lora,
        scale: float,
        places: int | None = None,
    ) -> Float[Array, "b f m d"]:
        heads, eps, shape = self.config.heads, self.config.eps, x.shape
        split = lambda y, like: y.reshape(*like[:-1], heads, shape[-1] // heads)  # noqa: E731
        source = x.shape if text is None else text.shape
        x = self.config.stream.rows(x)
        context = x if text is None else self.config.stream.rows(text)
        q = rms_norm(self.q(x, sub(lora, "q"), scale), self.q_norm[...], eps)
        k = rms_norm(self.k(context, sub(lora, "k"), scale), self.k_norm[...], eps)
        v = self.v(context, sub(lora, "v"), scale)
        names = ("batch", None, "length", "heads") if text is None else ("batch", None, "heads")
        v = pin_row_major(self.config.mesh, v, names)
        q, k, v = split(q, shape), split(k, source), split(v, source)
        if rope is not None:
            q, k = (apply_rope(y.astype(jnp.float32), *rope).astype(y.dtype) for y in (q, k))
        y = attend_on(self.config.mesh, q, k, v, self.config.attention, places)
        return self.out(y.reshape(x.shape), sub(lora, "out"), scale).reshape(shape)


class Block(nnx.Module):
    """Self-attention, text cross-attention and MLP, each added to the residual stream."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.self_attention = Attention(config, rngs=rngs)
        self.cross_norm = LayerNorm(config.width, rngs=rngs)
        self.cross_attention = Attention(config, rngs=rngs)
        self.mlp = Mlp(config.width, config.mlp, rngs=rngs)
        normal = nnx.with_partitioning(jax.nn.initializers.normal(config.width**-0.5), (None, "embed"))
        self.table = nnx.Param(normal(rngs.params(), (6, config.width)))

    def __call__(
        self,
        x: Float[Array, "b f m d"],
        modulation: Float[Array, "b f 6 d"],
        text: Float[Array, "b l d"],
        rope: tuple,
        lora: Lora,
        scale: float,
        places: int | None = None,
    ) -> Float[Array, "b f m d"]:
        eps, stream = self.config.eps, self.config.stream
        rows, gather, scatter = stream.rows, stream.gather, stream.scatter
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(
            self.table[...].astype(jnp.float32) + modulation.astype(jnp.float32), 2, 0
        )
        h = gather(_modulate(x, scale1, shift1, eps))
        h = self.self_attention(h, None, rope, sub(lora, "self_attention"), scale, places)
        x = _gated(x, scatter(h), gate1)
        h = gather(self.cross_norm(x, eps))
        x = x + scatter(self.cross_attention(h, text, None, sub(lora, "cross_attention"), scale))
        h = self.mlp(rows(gather(_modulate(x, scale2, shift2, eps))), sub(lora, "mlp"), scale)
        return _gated(x, scatter(h.reshape(x.shape)), gate2)


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
        t: Float[Array, "b f"],
        text: Float[Array, "b l e"],
        lora: Lora = None,
        scale: float = 1.0,
    ) -> Float[Array, "b f h w c"]:
        """Velocity `eps - x_0` of every latent frame, in float32.

        Args:
          x: noisy latents, the scene's frame clean.
          t: time of each frame, 1 noise, 0 clean.
          text: states of the text encoder, padded with zeros to the length that the model was trained with: what is
            padded attends like any other token.
          lora: factors, a tree like the weights.
          scale: of LoRA's product.

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
        text = self.text_out(text, sub(lora, "text_out"), scale)
        time = sinusoid(1000.0 * t.astype(jnp.float32), config.time_width).astype(dtype)
        time = jax.nn.silu(self.time_in(time, sub(lora, "time_in"), scale))
        time = self.time_out(time, sub(lora, "time_out"), scale)  # [b f d]
        modulation = self.time_table(jax.nn.silu(time), sub(lora, "time_table"), scale).reshape(b, f, 6, -1)
        places = grid[1] * grid[2]
        spare = config.stream.spare_places(places)
        rope = rope_tables(grid, config.rope_dims, theta=config.theta)
        rope = tuple(np.pad(y.reshape(f, places, -1), ((0, 0), (0, spare), (0, 0))) for y in rope)

        h = x.astype(dtype).reshape(b, f, grid[1], p, grid[2], p, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        h = jnp.pad(h.reshape(b, f, places, -1), ((0, 0), (0, 0), (0, spare), (0, 0)))
        lay = config.stream.lay
        h = self.patch(lay(h), sub(lora, "patch"), scale)
        graph, blocks = nnx.split(self.blocks)

        def block(h, layer):
            weights, layer_lora = layer
            return lay(nnx.merge(graph, weights)(h, modulation, text, rope, layer_lora, scale, places))

        h = scan_blocks(block, h, (blocks, sub(lora, "blocks")), config.remat, lay=lay)
        shift, gain = jnp.moveaxis(self.table[...].astype(jnp.float32) + time.astype(jnp.float32)[:, :, None], 2, 0)
        h = self.head(_modulate(h, gain, shift, config.eps), sub(lora, "head"), scale)
        h = h[:, :, :places].reshape(b, f, grid[1], grid[2], p, p, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        return h.reshape(x.shape).astype(jnp.float32)


def _modulate(x: Float[Array, "b f m d"], scale: Float[Array, "b f d"], shift: Float[Array, "b f d"], eps: float):
    """`norm(x) (1 + scale) + shift` with the scale and shift of each token's frame."""
    h = layer_norm(x.astype(jnp.float32), eps)
    return (h * (1 + scale[:, :, None]) + shift[:, :, None]).astype(x.dtype)


def _gated(x: Float[Array, "b f m d"], h: Float[Array, "b f m d"], gate: Float[Array, "b f d"]):
    """`x + gate h` with the gate of each token's frame."""
    return (x.astype(jnp.float32) + h.astype(jnp.float32) * gate[:, :, None]).astype(x.dtype)
