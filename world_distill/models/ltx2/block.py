"""A block of LTX-2's transformer: attention of each stream, AV cross-attention between them, MLPs."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from world_distill.models.blocks import gated
from world_distill.models.layers import Lora, Mlp, rms_norm, sub
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.stream_attention import Rotation, StreamAttention


class StreamInputs(NamedTuple):
    """What the layers of one stream read beside its tokens.

    Attributes:
      text: its text states, projected [b l d].
      time: embedding of every time [b s d].
      modulation: of self-attention and MLP, for every time [b s 6 d]: shift, scale and gate of each.
      av_modulation: of AV cross-attention [b s 5 d]: scale and shift from audio to video, the same from video to
        audio, and the gate of what the stream receives. None without the other stream.
      spread: gives each token that of its time, [b s d] to [b n d].
      rotation: RoPE of self-attention.
      av_rotation: RoPE of AV cross-attention.
      tokens: of the stream, without the fill.
    """

    text: Float[Array, "b l d"]
    time: Float[Array, "b s d"]
    modulation: Float[Array, "b s 6 d"]
    av_modulation: Float[Array, "b s 5 d"] | None
    spread: Callable[[Array], Array]
    rotation: Rotation
    av_rotation: Rotation | None
    tokens: int


class StreamBlock(nnx.Module):
    """What a block holds for one stream alone."""

    def __init__(self, config: LTX2Config, name: str, *, rngs: nnx.Rngs):
        self.config = config
        width = config.widths[name]
        attention = functools.partial(
            StreamAttention, width, config.heads, eps=config.eps, mesh=config.mesh, rngs=rngs,
            kind=config.attention if name == "video" else "xla",  # all scores of 126 moments are small
        )  # fmt: skip
        self.self_attention = attention()
        self.cross_attention = attention()
        self.mlp = Mlp(width, 4 * width, rngs=rngs)
        self.table = table_param(6, width, rngs)
        if config.joint:
            self.av_table = table_param(5, width, rngs)

    def attend(self, x: Float[Array, "b n d"], given: StreamInputs, lora: Lora, scale: float) -> Float[Array, "b n d"]:
        """Self-attention, then attention to the text, each added to the residual stream."""
        shift, gain, gate = self._modulation(given)[:3]
        h = _modulate(x, gain, shift, self.config.eps)
        factors, rotations = sub(lora, "self_attention"), (given.rotation, given.rotation)
        h = self.self_attention(h, factors, scale, rotations=rotations, keys=given.tokens)
        x = gated(x, h, gate)
        h = rms_norm(x, eps=self.config.eps)
        return x + self.cross_attention(h, sub(lora, "cross_attention"), scale, text=given.text)

    def feed_forward(
        self, x: Float[Array, "b n d"], given: StreamInputs, lora: Lora, scale: float
    ) -> Float[Array, "b n d"]:
        """The MLP, added to the residual stream."""
        shift, gain, gate = self._modulation(given)[3:]
        stream, factors = self.config.stream, sub(lora, "mlp")
        [h] = stream.up(_modulate(x, gain, shift, self.config.eps), [self.mlp.up], [sub(factors, "up")], scale)
        h = stream.down(jax.nn.gelu(h).reshape(*x.shape[:2], -1), self.mlp.down, sub(factors, "down"), scale)
        return gated(x, h.reshape(x.shape), gate)

    def _modulation(self, given: StreamInputs) -> list[Float[Array, "b n d"]]:
        return modulation_rows(self.table, given.modulation, given.spread)


class Block(nnx.Module):
    """Attention of each stream, AV cross-attention and the MLPs, each added to the residual streams."""

    def __init__(self, config: LTX2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.video = StreamBlock(config, "video", rngs=rngs)
        if config.joint:
            self.audio = StreamBlock(config, "audio", rngs=rngs)
            attention = functools.partial(
                StreamAttention, heads=config.heads, inner=config.audio_width, eps=config.eps, kind="xla",
                mesh=config.mesh, rngs=rngs,
            )  # fmt: skip
            self.audio_to_video = attention(config.width, source=config.audio_width)
            self.video_to_audio = attention(config.audio_width, source=config.width)

    def __call__(
        self, x: dict[str, Float[Array, "b _n _d"]], given: Mapping[str, StreamInputs], lora: Lora, scale: float
    ) -> dict[str, Float[Array, "b _n _d"]]:
        """The residual streams after the block."""
        parts = {name: (getattr(self, name), given[name], sub(lora, name), scale) for name in x}
        x = {name: part.attend(x[name], *args) for name, (part, *args) in parts.items()}
        if self.config.joint:
            x = self._exchange(x, given, lora, scale)
        return {name: part.feed_forward(x[name], *args) for name, (part, *args) in parts.items()}

    def _exchange(
        self, x: dict[str, Float[Array, "b _n _d"]], given: Mapping[str, StreamInputs], lora: Lora, scale: float
    ) -> dict[str, Float[Array, "b _n _d"]]:
        """AV cross-attention. Both directions read the streams as they come in."""
        rows = {
            name: modulation_rows(getattr(self, name).av_table, given[name].av_modulation, given[name].spread)
            for name in x
        }

        def attend(name: str, direction: int, to: str, source: str) -> Array:
            gain, shift = 2 * direction, 2 * direction + 1
            told = {k: _modulate(h, rows[k][gain], rows[k][shift], self.config.eps) for k, h in x.items()}
            h = getattr(self, name)(
                told[to], sub(lora, name), scale, source=told[source],
                rotations=(given[to].av_rotation, given[source].av_rotation), keys=given[source].tokens,
            )  # fmt: skip
            return gated(x[to], h, rows[to][4])

        return {
            "video": attend("audio_to_video", 0, "video", "audio"),
            "audio": attend("video_to_audio", 1, "audio", "video"),
        }


def table_param(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Rows that a layer adds to the shared modulation [r d]."""
    normal = nnx.with_partitioning(jax.nn.initializers.normal(width**-0.5), (None, "embed"))
    return nnx.Param(normal(rngs.params(), (rows, width)))


def modulation_rows(
    table: nnx.Param, modulation: Float[Array, "b s r d"] | None, spread: Callable[[Array], Array]
) -> list[Float[Array, "b n d"]]:
    """Every row of the modulation plus a table, for every token, in float32."""
    assert modulation is not None
    return [spread(row) for row in jnp.moveaxis(table[...].astype(jnp.float32) + modulation.astype(jnp.float32), 2, 0)]


def _modulate(
    x: Float[Array, "b n d"], gain: Float[Array, "b n d"], shift: Float[Array, "b n d"], eps: float
) -> Float[Array, "b n d"]:
    """`norm(x) (1 + gain) + shift`."""
    return (rms_norm(x.astype(jnp.float32), eps=eps) * (1 + gain) + shift).astype(x.dtype)
