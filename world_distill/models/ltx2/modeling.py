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

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from world_distill.devices.sharding import constrain, platform_of
from world_distill.models.blocks import scan_blocks, spread_times
from world_distill.models.layers import Linear, Lora, layer_norm, sinusoid, stack, sub
from world_distill.models.ltx2.block import Block, StreamInputs, modulation_rows, table_param
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.rope import audio_positions, rotation, split_rope, video_positions
from world_distill.models.stream_attention import Rotation


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
        self.config, self.name = config, name
        width, channels = config.widths[name], config.channels if name == "video" else config.audio_channels
        self.patch = Linear(channels, width, (None, "embed"), rngs=rngs)
        self.text_in = Linear(config.text_width, width, (None, "embed"), rngs=rngs)
        self.text_out = Linear(width, width, ("embed", None), rngs=rngs)
        self.time = TimeModulation(config, width, 6, rngs=rngs)
        if config.joint:
            self.av_time = TimeModulation(config, width, 4, rngs=rngs)
            self.av_gate = TimeModulation(config, width, 1, rngs=rngs)
        self.table = table_param(2, width, rngs)
        self.head = Linear(width, channels, ("embed", None), rngs=rngs)

    def embed(
        self,
        x: Float[Array, "b p *grid c"],
        t: Float[Array, "b s"],
        text: Float[Array, "b l e"],
        columns: Int[np.ndarray, " p"],
        lora: Lora,
        scale: float,
    ) -> tuple[Float[Array, "b n d"], StreamInputs]:
        """Tokens as the residual stream lies, filled up behind their end, and what goes with them.

        Args:
          x: latents, the p places first.
          t: times.
          text: states for this stream.
          columns: which of `t` each place has.
          lora: factors, a tree like the weights.
          scale: of LoRA's product.
        """
        config, stream, dtype = self.config, self.config.stream, self.patch.kernel.dtype
        grid = x.shape[1:-1]
        tokens = math.prod(grid)
        length = stream.length(tokens)
        h = jnp.pad(x.reshape(len(x), tokens, -1).astype(dtype), ((0, 0), (0, length - tokens), (0, 0)))
        h = self.patch(stream.lay(h), sub(lora, "patch"), scale)
        text = jax.nn.gelu(self.text_in(text.astype(dtype), sub(lora, "text_in"), scale))
        text = self.text_out(text, sub(lora, "text_out"), scale)
        time, modulation = self.time(t, sub(lora, "time"), scale)
        av_modulation = None
        if config.joint:
            _, rows = self.av_time(t, sub(lora, "av_time"), scale)
            _, gate = self.av_gate(t, sub(lora, "av_gate"), scale)
            av_modulation = jnp.concatenate([rows, gate], axis=2)
        columns = np.pad(np.repeat(columns, tokens // len(columns)), (0, length - tokens), mode="edge")
        spread = functools.partial(spread_times, columns=columns)
        rotations = _rotations(config, self.name, grid, length)
        return h, StreamInputs(text, time, modulation, av_modulation, spread, *rotations, tokens)

    def velocity(
        self, h: Float[Array, "b m d"], given: StreamInputs, lora: Lora, scale: float
    ) -> Float[Array, "b n c"]:
        """The stream's result from the last block's, in float32."""
        shift, gain = modulation_rows(self.table, given.time[:, :, None], given.spread)
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
        config, streams, given = self.config, {}, {}
        for name in config.widths:
            columns = np.zeros(x[name].shape[1], int) if times is None else np.asarray(times[name], int)
            ends: StreamEnds = getattr(self, name)
            streams[name], given[name] = ends.embed(x[name], t, text[name], columns, sub(lora, name), scale)

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
            velocity = getattr(self, name).velocity(h, given[name], sub(lora, name), scale)
            velocities[name] = velocity.reshape(x[name].shape)
        return velocities


def _rotations(config: LTX2Config, name: str, grid: tuple[int, ...], length: int) -> tuple[Rotation, Rotation | None]:
    """RoPE of a stream's self-attention by all its axes, and of AV cross-attention by time alone."""
    if name == "video":
        frames, rows, columns = grid
        positions = video_positions((frames, rows, columns), config.fps, config.stride)
    else:
        positions = (audio_positions(grid[0], config.audio_stride, config.audio_hop, config.audio_rate),)

    def of(axes: int, width: int) -> Rotation:
        cos, sin = (
            constrain(config.mesh, table, ("length", "heads", None))
            for table in split_rope(
                positions[:axes], config.ranges[:axes], width=width, heads=config.heads, theta=config.theta,
                repeats=math.prod(grid[axes:]), length=length,
            )
        )  # fmt: skip
        return rotation(cos, sin, platform_of(config.mesh))

    av_rotation = of(1, config.audio_width) if config.joint else None
    return of(len(grid), config.widths[name]), av_rotation
