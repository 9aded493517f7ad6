"""Sizes of LTX-2's transformer."""

import dataclasses
from typing import Literal

from jax.sharding import Mesh

from world_distill.models.attention import AttentionKind
from world_distill.models.blocks import Remat, StreamLayout

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
