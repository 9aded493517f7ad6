"""From Gemma's states to what LTX-2's two streams attend to (HaCohen et al., arXiv 2601.03233).

On the host, once a text: `normalise_states` brings every layer's states to one range, and `project_states` maps all
layers of a token to one row. Rows of real tokens are what records store.

On the device, in front of every forward pass: a connector for each stream, which is a transformer over the row of
tokens. Learned registers take the places behind the text's end, so that every place attends and is attended to, and no
mask is left.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from world_distill.devices.sharding import constrain
from world_distill.models.blocks import scan_blocks
from world_distill.models.layers import Linear, Mlp, rms_norm, stack
from world_distill.models.ltx2.config import Audio
from world_distill.models.ltx2.rope import rotate_halves, split_rope
from world_distill.models.stream_attention import norm_heads


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of the connectors; the defaults are those of LTX-2 (2.0).

    Attributes:
      audio: "off" leaves out the audio stream's connector.
      width: of the rows; the MLP is four times as wide.
      heads: attention heads.
      depth: blocks of each connector.
      registers: learned rows; they repeat along the text.
      length: places of the text that the model was trained with, a multiple of `registers`.
      states: hidden states of the text encoder, its embeddings included.
      eps: of all norms.
      theta: base of RoPE's frequencies.
      places: that RoPE's positions are fractions of.
      mesh: devices that activations are laid out on; None leaves that to the compiler.
    """

    audio: Audio = "joint"
    width: int = 3840
    heads: int = 30
    depth: int = 2
    registers: int = 128
    length: int = 1024
    states: int = 49
    eps: float = 1e-6
    theta: float = 10_000.0
    places: int = 4096
    mesh: Mesh | None = None


class ConnectorBlock(nnx.Module):
    """Self-attention with RoPE and MLP, each added to the row of tokens."""

    def __init__(self, config: ConnectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.q = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.k = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.v = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.out = Linear(width, width, ("heads", "embed"), rngs=rngs)
        ones = nnx.with_partitioning(jax.nn.initializers.ones, (None,))
        self.q_norm = nnx.Param(ones(rngs.params(), (width,)))
        self.k_norm = nnx.Param(ones(rngs.params(), (width,)))
        self.mlp = Mlp(width, 4 * width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d"], cos: Float[Array, "l h e"], sin: Float[Array, "l h e"]
    ) -> Float[Array, "b l d"]:
        config = self.config
        h = rms_norm(x, eps=config.eps)
        q, k, v = (layer(h).reshape(*x.shape[:2], config.heads, -1) for layer in (self.q, self.k, self.v))
        q, k = norm_heads(q, self.q_norm[...], config.eps), norm_heads(k, self.k_norm[...], config.eps)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        # 30 heads divide by few meshes: each device takes all heads of some queries.
        q = constrain(config.mesh, q, ("batch", "stream", None, None))
        k, v = (constrain(config.mesh, y, ("batch", None, None, None)) for y in (k, v))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.mlp(rms_norm(x, eps=config.eps))


class Connector(nnx.Module):
    """One stream's transformer over a text."""

    def __init__(self, config: ConnectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.with_partitioning(jax.nn.initializers.normal(1.0), (None, "embed"))
        self.registers = nnx.Param(normal(rngs.params(), (config.registers, config.width)))
        self.blocks = stack(lambda rngs: ConnectorBlock(config, rngs=rngs), config.depth, rngs=rngs)

    def __call__(self, rows: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        config, length = self.config, rows.shape[1]
        registers = jnp.tile(self.registers[...], (length // config.registers, 1))
        x = jnp.where(mask[..., None], rows.astype(registers.dtype), registers)
        places = np.arange(length, dtype=np.float32)
        cos, sin = split_rope([places], [config.places], width=config.width, heads=config.heads, theta=config.theta)
        graph, blocks = nnx.split(self.blocks)

        def block(x, weights):
            own: Any = nnx.merge(graph, weights)
            return own(x, cos, sin)

        return rms_norm(scan_blocks(block, x, blocks, "none"), eps=config.eps)


class TextConnectors(nnx.Module):
    """The connectors of all streams."""

    def __init__(self, config: ConnectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.video = Connector(config, rngs=rngs)
        if config.audio == "joint":
            self.audio = Connector(config, rngs=rngs)

    def __call__(self, rows: Float[Array, "b l d"], mask: Bool[Array, "b l"]) -> dict[str, Float[Array, "b m d"]]:
        """What each stream attends to: m = `config.length` states, all of them valid.

        Args:
          rows: of `project_states`, real tokens first.
          mask: True where a token is real.

        Raises:
          ValueError: more places than the model was trained with.
        """
        length = self.config.length
        if rows.shape[1] > length:
            raise ValueError(f"a text of {rows.shape[1]} tokens; the model was trained with at most {length}")
        rows = jnp.pad(rows, ((0, 0), (0, length - rows.shape[1]), (0, 0)))
        mask = jnp.pad(mask, ((0, 0), (0, length - mask.shape[1])))
        streams = ("video", "audio") if self.config.audio == "joint" else ("video",)
        return {name: getattr(self, name)(rows, mask) for name in streams}


def normalise_states(
    states: Float[Array, "b l d k"], mask: Bool[Array, "b l"], eps: float = 1e-6
) -> Float[Array, "b l d*k"]:
    """States of every layer less their mean, over a fraction of their range: 8 (x - mean) / (max - min), float32.

    Mean and range are those of one text's layer, over its real tokens and all channels. Padding becomes 0.

    Args:
      states: of all k layers of the text encoder, the embeddings first.
      mask: True where a token is real; at least one is.
      eps: added to the count of the mean and to the range, as in the published code.
    """
    states, real = states.astype(jnp.float32), mask[:, :, None, None]
    count = mask.sum(1).reshape(-1, 1, 1, 1) * states.shape[2]
    mean = jnp.where(real, states, 0).sum(axis=(1, 2), keepdims=True) / (count + eps)
    low = jnp.where(real, states, jnp.inf).min(axis=(1, 2), keepdims=True)
    high = jnp.where(real, states, -jnp.inf).max(axis=(1, 2), keepdims=True)
    normal = jnp.where(real, (states - mean) / (high - low + eps) * 8, 0)
    return normal.reshape(*mask.shape, -1)


def project_states(
    states: Float[Array, "b l d k"], mask: Bool[Array, "b l"], kernel: Float[Array, "d*k o"]
) -> Float[Array, "b l o"]:
    """One row for every token, float32: the normalised states of all layers times `kernel`.

    No row depends on padding, so that padding may be cut off before.
    """
    return normalise_states(states, mask) @ kernel.astype(jnp.float32)
