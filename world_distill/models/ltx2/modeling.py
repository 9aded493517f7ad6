"""The transformer of LTX-2 (HaCohen et al., arXiv 2601.03233): a video stream and an audio stream.

Tokens are single latents: cells of frames in the video stream, moments in the audio stream. A block gives each stream
self-attention with RoPE, cross-attention to its text and an MLP. Before the MLPs, each stream attends to the other one
(audio-visual, AV, cross-attention), with RoPE by time alone. The timestep modulates all but the attention to texts,
through projections that all blocks share plus tables of each block's own (adaLN-single: Chen et al., PixArt-alpha,
arXiv 2310.00426). Times differ by place: a first frame that is the scene is clean and has time 0.

With `audio="off"` the video stream is alone, as published networks compute it when their modalities are isolated, and
no weight of the other stream exists.

Each stream's tokens are one sequence, filled up behind its end (`models/blocks.py`). The fill is no key of attention,
and nothing reads its results. Norms, modulation and gates are computed in float32 whatever the weights are in.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import constrain
from world_distill.models.attention import AttentionKind
from world_distill.models.blocks import Remat, StreamLayout, gated, scan_blocks, spread_times
from world_distill.models.layers import Linear, Lora, Mlp, layer_norm, rms_norm, sinusoid, stack, sub
from world_distill.models.ltx2.rope import audio_positions, rotate_halves, split_rope, video_positions
from world_distill.models.stream_attention import Rotation, StreamAttention

Audio = Literal["joint", "off"]


@dataclasses.dataclass(frozen=True)
class LTX2Config:
    """Sizes of the network; the defaults are those of LTX-2 (2.0, 19B).

    Attributes:
      audio: "joint" for both streams, "off" for the video stream alone.
      channels: latent channels of the video, in and out.
      width: hidden width of the video stream; its MLP is four times as wide.
      audio_channels: latent channels of the audio, in and out.
      audio_width: hidden width of the audio stream, and of AV cross-attention in both directions.
      depth: blocks.
      heads: attention heads of both streams.
      text_width: width of the text states.
      time_width: features of a timestep.
      eps: of all norms.
      theta: base of RoPE's frequencies.
      fps: frames a second of the clip; RoPE's times are seconds.
      stride: pixel frames, rows and columns of one video latent.
      ranges: seconds, rows and columns that RoPE's positions are fractions of.
      audio_stride: spectrogram frames of one audio latent.
      audio_hop: samples from one spectrogram frame to the next.
      audio_rate: samples a second.
      remat: what the backward pass computes again (`blocks.Remat`).
      attention: what computes the video stream's self-attention and its attention to the text (`attention.attend`);
        None chooses by platform.
      mesh: devices that activations are laid out on; None leaves that to the compiler.
    """

    audio: Audio = "joint"
    channels: int = 128
    width: int = 4096
    audio_channels: int = 128
    audio_width: int = 2048
    depth: int = 48
    heads: int = 32
    text_width: int = 3840
    time_width: int = 256
    eps: float = 1e-6
    theta: float = 10_000.0
    fps: float = 24.0
    stride: tuple[int, int, int] = (8, 32, 32)
    ranges: tuple[int, int, int] = (20, 2048, 2048)
    audio_stride: int = 4
    audio_hop: int = 160
    audio_rate: int = 16_000
    remat: Remat = "full"
    attention: AttentionKind = None
    mesh: Mesh | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Stream -> hidden width."""
        return {"video": self.width} | ({"audio": self.audio_width} if self.joint else {})

    @property
    def joint(self) -> bool:
        """Whether there is an audio stream."""
        return self.audio == "joint"

    @property
    def stream(self) -> StreamLayout:
        """Where activations lie."""
        return StreamLayout(self.mesh)


class Given(NamedTuple):
    """What all blocks are told about one stream.

    Attributes:
      text: its text states, projected [b l d].
      modulation: of self-attention and MLP, for every time [b s 6 d]: shift, scale and gate of each.
      av_modulation: of AV cross-attention [b s 5 d]: scale and shift from audio to video, the same from video to
        audio, and the gate of what the stream receives. None without the other stream.
      spread: gives each token that of its time, [b s d] to [b n d].
      rotation: RoPE of self-attention.
      av_rotation: RoPE of AV cross-attention.
      tokens: of the stream, without the fill.
    """

    text: Float[Array, "b l d"]
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
        self.table = _table(6, width, rngs)
        if config.joint:
            self.av_table = _table(5, width, rngs)

    def attend(self, x: Float[Array, "b n d"], given: Given, lora: Lora, scale: float) -> Float[Array, "b n d"]:
        """Self-attention, then attention to the text, each added to the residual stream."""
        shift, gain, gate = self._modulation(given)[:3]
        h = _modulate(x, gain, shift, self.config.eps)
        factors, rotations = sub(lora, "self_attention"), (given.rotation, given.rotation)
        h = self.self_attention(h, factors, scale, rotations=rotations, keys=given.tokens)
        x = gated(x, h, gate)
        h = rms_norm(x, eps=self.config.eps)
        return x + self.cross_attention(h, sub(lora, "cross_attention"), scale, text=given.text)

    def feed(self, x: Float[Array, "b n d"], given: Given, lora: Lora, scale: float) -> Float[Array, "b n d"]:
        """The MLP, added to the residual stream."""
        shift, gain, gate = self._modulation(given)[3:]
        stream, factors = self.config.stream, sub(lora, "mlp")
        [h] = stream.up(_modulate(x, gain, shift, self.config.eps), [self.mlp.up], [sub(factors, "up")], scale)
        h = stream.down(jax.nn.gelu(h).reshape(*x.shape[:2], -1), self.mlp.down, sub(factors, "down"), scale)
        return gated(x, h.reshape(x.shape), gate)

    def _modulation(self, given: Given) -> list[Float[Array, "b n d"]]:
        return _rows(self.table, given.modulation, given.spread)


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
        self, x: dict[str, Float[Array, "b _n _d"]], given: Mapping[str, Given], lora: Lora, scale: float
    ) -> dict[str, Float[Array, "b _n _d"]]:
        """The residual streams after the block."""
        parts = {name: (getattr(self, name), given[name], sub(lora, name), scale) for name in x}
        x = {name: part.attend(x[name], *args) for name, (part, *args) in parts.items()}
        if self.config.joint:
            x = self._exchange(x, given, lora, scale)
        return {name: part.feed(x[name], *args) for name, (part, *args) in parts.items()}

    def _exchange(
        self, x: dict[str, Float[Array, "b _n _d"]], given: Mapping[str, Given], lora: Lora, scale: float
    ) -> dict[str, Float[Array, "b _n _d"]]:
        """AV cross-attention. Both directions read the streams as they come in."""
        eps, video, audio = self.config.eps, given["video"], given["audio"]
        *video_rows, video_gate = _rows(self.video.av_table, video.av_modulation, video.spread)
        *audio_rows, audio_gate = _rows(self.audio.av_table, audio.av_modulation, audio.spread)

        def inputs(direction: int) -> list[Array]:  # 0: from audio to video, 1: from video to audio
            gain, shift = 2 * direction, 2 * direction + 1
            rows = {"video": video_rows, "audio": audio_rows}
            return [_modulate(x[name], rows[name][gain], rows[name][shift], eps) for name in ("video", "audio")]

        seen, heard = inputs(0)
        to_video = self.audio_to_video(
            seen, sub(lora, "audio_to_video"), scale, source=heard,
            rotations=(video.av_rotation, audio.av_rotation), keys=audio.tokens,
        )  # fmt: skip
        seen, heard = inputs(1)
        to_audio = self.video_to_audio(
            heard, sub(lora, "video_to_audio"), scale, source=seen,
            rotations=(audio.av_rotation, video.av_rotation), keys=video.tokens,
        )  # fmt: skip
        return {"video": gated(x["video"], to_video, video_gate), "audio": gated(x["audio"], to_audio, audio_gate)}


class TimeModulation(nnx.Module):
    """A timestep's embedding, and rows of modulation that all blocks share (adaLN-single)."""

    def __init__(self, config: LTX2Config, width: int, rows: int, *, rngs: nnx.Rngs):
        self.config, self.rows = config, rows
        self.input = Linear(config.time_width, width, (None, "embed"), rngs=rngs)
        self.output = Linear(width, width, ("embed", None), rngs=rngs)
        self.modulation = Linear(width, rows * width, ("embed", None), rngs=rngs)

    def __call__(
        self, t: Float[Array, "b s"], lora: Lora, scale: float
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s r d"]]:
        features = sinusoid(1000.0 * t.astype(jnp.float32), self.config.time_width).astype(self.input.kernel.dtype)
        h = jax.nn.silu(self.input(features, sub(lora, "input"), scale))
        h = self.output(h, sub(lora, "output"), scale)
        rows = self.modulation(jax.nn.silu(h), sub(lora, "modulation"), scale)
        return h, rows.reshape(*t.shape, self.rows, -1)


class StreamEnds(nnx.Module):
    """What one stream has outside the blocks."""

    def __init__(self, config: LTX2Config, name: str, *, rngs: nnx.Rngs):
        self.config = config
        width, channels = config.widths[name], config.channels if name == "video" else config.audio_channels
        self.patch = Linear(channels, width, (None, "embed"), rngs=rngs)
        self.text_in = Linear(config.text_width, width, (None, "embed"), rngs=rngs)
        self.text_out = Linear(width, width, ("embed", None), rngs=rngs)
        self.time = TimeModulation(config, width, 6, rngs=rngs)
        if config.joint:
            self.av_time = TimeModulation(config, width, 4, rngs=rngs)
            self.av_gate = TimeModulation(config, width, 1, rngs=rngs)
        self.table = _table(2, width, rngs)
        self.head = Linear(width, channels, ("embed", None), rngs=rngs)

    def embed(self, x: Float[Array, "b n c"], lora: Lora, scale: float) -> Float[Array, "b m d"]:
        """Tokens as the residual stream lies, filled up behind their end."""
        stream = self.config.stream
        spare = stream.length(x.shape[1]) - x.shape[1]
        h = jnp.pad(x.astype(self.patch.kernel.dtype), ((0, 0), (0, spare), (0, 0)))
        return self.patch(stream.lay(h), sub(lora, "patch"), scale)

    def project_text(self, text: Float[Array, "b l e"], lora: Lora, scale: float) -> Float[Array, "b l d"]:
        """The text states in the stream's width."""
        h = jax.nn.gelu(self.text_in(text.astype(self.text_in.kernel.dtype), sub(lora, "text_in"), scale))
        return self.text_out(h, sub(lora, "text_out"), scale)

    def velocity(
        self, h: Float[Array, "b m d"], time: Float[Array, "b s d"], given: Given, lora: Lora, scale: float
    ) -> Float[Array, "b n c"]:
        """The stream's result from the last block's, in float32."""
        shift, gain = _rows(self.table, time[:, :, None], given.spread)
        # The blocks' norms are RMSNorms; this one takes off the mean, too.
        h = layer_norm(h.astype(jnp.float32), self.config.eps) * (1 + gain) + shift
        h = self.head(h.astype(self.head.kernel.dtype), sub(lora, "head"), scale)
        return h[:, : given.tokens].astype(jnp.float32)


class LTX2DiT(nnx.Module):
    """The transformer; blocks are stacked along a leading layer axis and scanned over."""

    def __init__(self, config: LTX2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.video = StreamEnds(config, "video", rngs=rngs)
        if config.joint:
            self.audio = StreamEnds(config, "audio", rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.depth, rngs=rngs)

    def __call__(
        self,
        x: Mapping[str, Float[Array, "b ..."]],
        t: Float[Array, "b s"],
        text: Mapping[str, Float[Array, "b l e"]],
        lora: Lora = None,
        scale: float = 1.0,
        times: Mapping[str, tuple[int, ...]] | None = None,
    ) -> dict[str, Float[Array, "b ..."]]:
        """Velocity `eps - x_0` of every place of every stream, in float32.

        Each stream's own times enter its part of AV cross-attention, as LTX-2.0 was trained (in diffusers,
        `use_cross_timestep=False`).

        Args:
          x: noisy latents: "video" [b f h w c], and "audio" [b a c] unless audio is off.
          t: times, 1 noise, 0 clean.
          text: of each stream, what its connector made of the text (`connectors.py`). All states are attended to.
          lora: factors, a tree like the weights.
          scale: of LoRA's product.
          times: stream -> which of `t` each of its places (latent frames, moments) has; None: t has one, that of all.

        Raises:
          ValueError: several times, and `times` does not say whose.
        """
        if times is None and t.shape[1] != 1:
            raise ValueError(f"{t.shape[1]} times, and `times` does not say which places have which")
        config = self.config
        streams, given, embeddings = {}, {}, {}
        for name in config.widths:
            ends: StreamEnds = getattr(self, name)
            places, factors = x[name].shape[1], sub(lora, name)
            tokens = math.prod(x[name].shape[1:-1])
            streams[name] = ends.embed(x[name].reshape(len(t), tokens, -1), factors, scale)
            length = streams[name].shape[1]
            columns = np.zeros(places, int) if times is None else np.asarray(times[name])
            columns = np.pad(np.repeat(columns, tokens // places), (0, length - tokens), mode="edge")
            embeddings[name], modulation = ends.time(t, sub(factors, "time"), scale)
            av_modulation = None
            if config.joint:
                _, rows = ends.av_time(t, sub(factors, "av_time"), scale)
                _, gate = ends.av_gate(t, sub(factors, "av_gate"), scale)
                av_modulation = jnp.concatenate([rows, gate], axis=2)
            rotation, av_rotation = _rotations(config, name, x[name].shape[1:-1], length)
            given[name] = Given(
                ends.project_text(text[name], factors, scale), modulation, av_modulation,
                functools.partial(spread_times, columns=columns), rotation, av_rotation, tokens,
            )  # fmt: skip

        lay = functools.partial(jax.tree.map, config.stream.lay)
        graph, blocks = nnx.split(self.blocks)

        def block(h, layer):
            weights, layer_lora = layer
            own: Any = nnx.merge(graph, weights)
            config.stream.settle(own, own.video.mlp)
            return lay(own(h, given, layer_lora, scale))

        streams = scan_blocks(block, streams, (blocks, sub(lora, "blocks")), config.remat, lay=lay)
        velocities = {}
        for name, h in streams.items():
            ends = getattr(self, name)
            velocities[name] = ends.velocity(h, embeddings[name], given[name], sub(lora, name), scale)
        return {name: v.reshape(x[name].shape) for name, v in velocities.items()}


def _rotations(config: LTX2Config, name: str, grid: tuple[int, ...], length: int) -> tuple[Rotation, Rotation | None]:
    """RoPE of a stream's self-attention by all its axes, and of AV cross-attention by time alone."""
    if name == "video":
        frames, rows, columns = grid
        positions = video_positions((frames, rows, columns), config.fps, config.stride)
    else:
        positions = (audio_positions(grid[0], config.audio_stride, config.audio_hop, config.audio_rate),)

    def rotation(axes: int, width: int) -> Rotation:
        cos, sin = (
            constrain(config.mesh, table, ("length", "heads", None))
            for table in split_rope(
                positions[:axes], config.ranges[:axes], width=width, heads=config.heads, theta=config.theta,
                repeats=math.prod(grid[axes:]), length=length,
            )
        )  # fmt: skip
        return functools.partial(rotate_halves, cos=cos, sin=sin)

    av_rotation = rotation(1, config.audio_width) if config.joint else None
    return rotation(len(grid), config.widths[name]), av_rotation


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    normal = nnx.with_partitioning(jax.nn.initializers.normal(width**-0.5), (None, "embed"))
    return nnx.Param(normal(rngs.params(), (rows, width)))


def _rows(
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
