"""`interfaces.ModelFamily` for LTX-2 (2.0, 19B): transformer of two streams, text connectors, picture's autoencoder.

The base is `{"transformer": weights, "connectors": weights, "vae": weights}`. LoRA and full differences are of the
transformer. Records store what the text projection gives, one row a token; the connectors read it on the device.

The audio stream moves with the video's and is not decoded. With `audio="off"` the video stream is alone: 13.0 of 18.9 B
parameters, and another model, since the joint one's picture listens to its sound.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from world_distill.models import lora as lora_lib
from world_distill.models.clip_family import ClipFamily, split_settings, with_tuples
from world_distill.models.functional import Functional, functional
from world_distill.models.ltx2.codec import PLACES, LTX2Codec
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig, TextConnectors
from world_distill.models.ltx2.encoders import LTX2Encoders
from world_distill.models.ltx2.layout import LTX2Published
from world_distill.models.ltx2.modeling import LTX2DiT
from world_distill.models.ltx2.vae import VaeConfig
from world_distill.structs import Condition, Latents, LatentSpec, PyTree, Texts, Tokens

# Arrays of the transformer that make the sound. Audio to video is not among them: it is how the picture hears.
AUDIO = r"(blocks\.)?audio\..*|blocks\.video_to_audio\..*"
# Those of them that the picture never hears: they come behind the last block.
UNHEARD = r"audio\.(head\..*|table)"


@dataclasses.dataclass(frozen=True, eq=False)
class LTX2Family(ClipFamily):
    """Sizes and pure functions; see `interfaces.ModelFamily` for the contract, `ClipFamily` for the other arguments.

    Args:
      connectors: sizes of the text connectors.
      audio_counts: let the audio stream count in losses, step noise and log-probabilities. Nothing judges the sound.
      text_projection: file or folder with the checkpoint's text projection; empty: connectors/ of `text_encoder`.
    """

    connectors: ConnectorConfig
    _: dataclasses.KW_ONLY
    size: tuple[int, int] = (512, 768)
    audio_counts: bool = False
    text_projection: str = ""
    lora_targets: str = r"blocks\.video\..*"

    name = "ltx2"

    def __post_init__(self):
        super().__post_init__()
        config, sizes = self.config, self.codec.config
        if config.text_width != self.connectors.width:
            raise ValueError(
                f"model.text_width = {config.text_width}, but model.connectors.width = {self.connectors.width}"
            )
        if config.stride != (sizes.time, sizes.space, sizes.space):
            raise ValueError(f"model.stride = {config.stride}, but model.vae compresses {(sizes.time, sizes.space)}")
        texts, seconds, *sides = self.connectors, *config.ranges
        for name, width, heads in (
            ("width", config.width, config.heads), ("audio_width", config.audio_width, config.heads),
            ("connectors.width", texts.width, texts.heads),
        ):  # fmt: skip
            if width % (2 * heads):  # RoPE turns the halves of a head
                raise ValueError(f"model.{name} = {width} does not divide into {heads} heads of an even width")
        if texts.length % texts.registers:
            raise ValueError(
                f"model.connectors.length = {texts.length} is not a multiple of model.connectors.registers ="
                f" {texts.registers}"
            )
        if self.frames > seconds * config.fps or any(side > most for side, most in zip(self.size, sides, strict=True)):
            raise ValueError(
                f"a clip of {self.size[0]}x{self.size[1]} pixels and {self.frames / config.fps:.3g} s: the model knows"
                f" positions up to {sides[0]}x{sides[1]} and {seconds} s (model.frames / model.fps)"
            )
        if self.audio_counts and not config.joint:
            raise ValueError("model.audio_counts has no effect with model.audio = off: there is no audio stream")

    @property
    def fps(self) -> float:
        return self.config.fps

    @functools.cached_property
    def latents(self) -> Mapping[str, LatentSpec]:
        """The picture, whose first latent frame is the scene, and the sound that belongs to it."""
        found, config = {"video": self.video}, self.config
        if config.joint:
            rate = config.audio_rate / config.audio_hop / config.audio_stride  # latents a second
            moments = round(self.frames / config.fps * rate)
            counts = np.full(moments, self.audio_counts)
            found["audio"] = LatentSpec((moments, config.audio_channels), counts=counts)
        return found

    @property
    def tokens(self) -> int:
        return sum(int(np.prod(spec.shape[:-1])) for spec in self.latents.values())

    @functools.cached_property
    def encoders(self) -> LTX2Encoders:
        sizes = self.connectors
        return LTX2Encoders(
            self.codec, self.size, self.text_encoder, sizes.width, text_projection=self.text_projection,
            text_length=sizes.length,
        )  # fmt: skip

    @property
    def published(self) -> LTX2Published:
        return LTX2Published(self.config, self.connectors, self.codec.config)

    @functools.cached_property
    def network(self) -> Functional:
        """The transformer as a function of its weights."""
        return functional(LTX2DiT, self.config)

    @functools.cached_property
    def connect(self) -> Functional:
        """The connectors as a function of their weights."""
        return functional(TextConnectors, self.connectors)

    def on(self, mesh: Mesh) -> "LTX2Family":
        """The same with its activations laid out on a mesh."""
        parts = {
            name: dataclasses.replace(getattr(self, name), mesh=mesh) for name in ("config", "connectors", "codec")
        }
        return dataclasses.replace(self, **parts)

    def training_notes(self, rank: int | None) -> list[str]:
        if not self.config.joint or self.audio_counts:
            return []
        names = sorted(flatten_dict(self.adapted_part(jax.eval_shape(self.init_base, jax.random.key(0))), sep="."))
        if rank is None:
            setting = "executor.rank = 0"
        else:
            patterns = (rf"({self.lora_targets})\.kernel", self.lora_differences)
            names = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
            setting = f"executor.targets = {self.lora_targets!r}"
            if self.lora_differences:
                setting += f" with executor.differences = {self.lora_differences!r}"
            if idle := [name for name in names if re.fullmatch(UNHEARD, name)]:
                raise ValueError(
                    f"{setting} names {', '.join(idle)}, which would never change: the losses count the picture alone,"
                    " and it does not hear them. Leave them out, or set model.audio_counts = True"
                )
        heard = [name for name in names if re.fullmatch(AUDIO, name)]
        if not heard:
            return []
        return [
            f"{setting} trains {len(heard)} arrays that make the sound, {heard[0]} for one, by losses that count the"
            " picture alone: the sound will suffer. Take targets of the video stream, or set model.audio_counts = True"
        ]

    def init_base(self, key: jax.Array) -> PyTree:
        networks = {"transformer": self.network, "connectors": self.connect}
        base = {name: network.init(jax.random.fold_in(key, i)) for i, (name, network) in enumerate(networks.items())}
        base = jax.tree.map(lambda x: x.astype(self.dtype), base)
        return base | {"vae": self.codec.init(jax.random.fold_in(key, 2))}

    def base_axes(self) -> PyTree:
        return {"transformer": self.network.axes(), "connectors": self.connect.axes(), "vae": self.codec.axes()}

    def read_texts(self, base: PyTree, texts: Texts) -> Texts:
        """What the connectors make of rows, for each stream; every place is a token."""
        if "text" not in texts:
            return texts
        rows = texts["text"]
        found = self.connect(base["connectors"], rows.states, rows.mask)
        return {name: Tokens(states, jnp.ones(states.shape[:2], bool)) for name, states in found.items()}

    def denoise(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        weights, lora = lora_lib.apply_full(base["transformer"], lora)
        text = {name: states.states for name, states in self.read_texts(base, condition.text).items()}
        video = self.latents["video"]
        x = dict(x_t) | {"video": jnp.concatenate([condition.scene["video"], x_t["video"][:, 1:]], axis=1)}
        # The scene's frame has time 0, all else the clip's.
        times = {name: (1,) * spec.shape[0] for name, spec in self.latents.items()}
        times["video"] = tuple(map(int, video.moves))
        both = jnp.stack([jnp.zeros_like(t), t], 1)
        velocity = self.network(weights, x, both, text, lora, self.lora_scale, times)
        free = video.moves.astype(np.float32)[:, None, None, None]
        return velocity | {"video": velocity["video"] * free}


def build(
    *,
    fps: float = 24.0,
    audio: str = "joint",
    vae: Mapping[str, Any] | None = None,
    connectors: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    vae_dtype: str = "bfloat16",
    places: int = PLACES,
    rows: int | None = None,
    **settings: Any,
) -> LTX2Family:
    """The family of LTX-2 (2.0).

    Args:
      fps: frames a second; RoPE and the length of the sound depend on it.
      audio: joint samples picture and sound together, as the published pipelines do; off has the video stream alone.
      vae: sizes of the autoencoder, as in `VaeConfig`.
      connectors: sizes of the text connectors, as in `ConnectorConfig`.
      dtype: type of the weights of transformer and connectors, bfloat16 or float32.
      vae_dtype: type of the autoencoder's weights.
      places: latents of a clip that a device decodes at once; larger clips are decoded in tiles, see `LTX2Codec`.
      rows: clips decoded at a time, over all devices; 0: all; None: as `sharding.rows_at_once` says.
      **settings: those of `LTX2Family`, and sizes of the transformer, as in `LTX2Config`.

    Raises:
      ValueError: sizes that do not fit together, or that the autoencoder cannot cut into latents.
    """
    if audio not in ("joint", "off"):
        raise ValueError(f"model.audio = {audio!r}: it is joint or off")
    own, network = split_settings(LTX2Family, settings)
    config = LTX2Config(audio=audio, fps=fps, **network)
    texts = ConnectorConfig(audio=audio, **with_tuples(connectors or {}))
    codec = LTX2Codec(codec_sizes(vae or {}), jnp.dtype(vae_dtype), places=places, rows=rows)
    return LTX2Family(config, codec, texts, dtype=jnp.dtype(dtype), **own)


def codec_sizes(sizes: Mapping[str, Any]) -> VaeConfig:
    """The autoencoder's sizes, from a config's section."""
    return VaeConfig(**with_tuples(sizes))
