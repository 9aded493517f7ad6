"""`interfaces.ModelFamily` for Wan2.2-TI2V-5B: transformer, autoencoder 2.2, umT5 text states.

The base is `{"transformer": weights, "vae": weights}`. LoRA and full differences are of the transformer.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from world_distill.models import lora as lora_lib
from world_distill.models.functional import Functional, functional
from world_distill.models.wan import vae
from world_distill.models.wan.codec import WanCodec
from world_distill.models.wan.encoders import WanEncoders
from world_distill.models.wan.modeling import WanConfig, WanDiT
from world_distill.models.wan.published import WanPublished
from world_distill.structs import Condition, Latents, LatentSpec, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class WanFamily(lora_lib.Adapted):
    """Sizes and pure functions; see `interfaces.ModelFamily` for the contract.

    Args:
      config: sizes of the transformer.
      codec: the autoencoder.
      size: height and width of a clip in pixels.
      frames: of a clip.
      fps: frames a second of a clip.
      dtype: of the transformer's weights.
      text_encoder: see `WanEncoders`.
      lora_targets: pattern of the layers that LoRA adapts.
      lora_scale: factor on the product of LoRA's factors (alpha / rank).
      lora_differences: pattern of the weights that get full differences beside LoRA.
      int8: keep the kernels of the blocks as int8.
    """

    config: WanConfig
    codec: WanCodec
    size: tuple[int, int]
    frames: int
    fps: float
    dtype: Any = jnp.dtype("bfloat16")
    text_encoder: str = ""
    lora_targets: str = r"blocks\..*"
    lora_scale: float = 1.0
    lora_differences: str = ""
    int8: bool = False

    name = "wan"
    adapted = "transformer"
    shipped_bases = {}  # noqa: RUF012  (never changed)

    def __post_init__(self):
        self.codec.config.check_clip(self.frames, *self.size)

    @functools.cached_property
    def latents(self) -> Mapping[str, LatentSpec]:
        """The picture alone, whose first latent frame is the scene."""
        sizes = self.codec.config
        frames = 1 + (self.frames - 1) // sizes.time
        shape = (frames, *(side // sizes.space for side in self.size), self.config.channels)
        return {"video": LatentSpec(shape, moves=np.arange(frames) > 0)}

    @property
    def tokens(self) -> int:
        return math.prod(self.latents["video"].shape[:3]) // self.config.patch**2

    @functools.cached_property
    def encoders(self) -> WanEncoders:
        return WanEncoders(self.codec, self.size, self.text_encoder, self.config.text_width)

    @property
    def published(self) -> WanPublished:
        return WanPublished(self.config, self.codec.config)

    @functools.cached_property
    def network(self) -> Functional:
        """The transformer as a function of its weights."""
        return functional(WanDiT, self.config)

    def on(self, mesh: Mesh) -> "WanFamily":
        """The same with its activations laid out on a mesh: rows, places in a frame, heads."""
        config, codec = dataclasses.replace(self.config, mesh=mesh), dataclasses.replace(self.codec, mesh=mesh)
        return dataclasses.replace(self, config=config, codec=codec)

    def init_base(self, key: jax.Array) -> PyTree:
        transformer = self.network.init(jax.random.fold_in(key, 0))
        return {
            "transformer": jax.tree.map(lambda x: x.astype(self.dtype), transformer),
            "vae": self.codec.init(jax.random.fold_in(key, 1)),
        }

    def base_axes(self) -> PyTree:
        return {"transformer": self.network.axes(), "vae": self.codec.axes()}

    def denoise(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        weights, lora = lora_lib.apply_full(base["transformer"], lora)
        free = self.latents["video"].moves.astype(np.float32)
        x = jnp.concatenate([condition.scene["video"], x_t["video"][:, 1:]], axis=1)
        # The text's mask is left out on purpose, see `encoders.TEXT_LENGTH`.
        states = condition.text["text"].states
        # The scene's frame has time 0.
        times = tuple(map(int, self.latents["video"].moves))
        velocity = self.network(weights, x, jnp.stack([jnp.zeros_like(t), t], 1), states, lora, self.lora_scale, times)
        return {"video": velocity * free[:, None, None, None]}


def build(
    *,
    size: tuple[int, int] = (704, 1280),
    frames: int = 121,
    fps: float = 24.0,
    vae: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    int8: bool = False,
    vae_dtype: str = "float32",
    piece: int = 0,
    rows: int | None = None,
    text_encoder: str = "",
    lora_targets: str = r"blocks\..*",
    lora_scale: float = 1.0,
    lora_differences: str = "",
    **network: Any,
) -> WanFamily:
    """The family of Wan2.2-TI2V-5B and its relatives.

    Args:
      size: height and width of a clip in pixels, multiples of 32 with the published sizes.
      frames: frames of a clip: 1 + a multiple of 4 with the published sizes.
      fps: frames a second.
      vae: sizes of the autoencoder, as in `VaeConfig`.
      dtype: type of the transformer's weights, bfloat16 or float32.
      int8: keep the kernels of the blocks as 8-bit integers, with a scale for each output channel (`models.int8`).
        They take half the memory of bfloat16, and are turned into `dtype` block by block; `remat` = "none" keeps all
        of them in `dtype` for the backward pass. For LoRA alone.
      vae_dtype: type of the autoencoder's weights.
      piece: latent frames decoded at a time; 0: all.
      rows: clips decoded at a time, over all devices; 0: all; None: as `sharding.rows_at_once` says.
      text_encoder: for `encode` and `generate`: folder with text_encoder/ and tokenizer/ of the published model, or
        "words" for states without weights.
      lora_targets: pattern of the paths of the layers that LoRA adapts.
      lora_scale: factor of LoRA's product.
      lora_differences: pattern of the weights that get full differences beside LoRA; empty: none.
      **network: sizes of the transformer, as in `WanConfig`.

    Raises:
      ValueError: sizes that the network cannot cut into latents and patches.
    """
    config, codec = WanConfig(**network), codec_sizes(vae or {})
    if config.channels != codec.channels:
        raise ValueError(f"model.channels = {config.channels}, but model.vae.channels = {codec.channels}")
    unit = codec.space * config.patch
    if any(side % unit for side in size):
        raise ValueError(f"model.size = {tuple(size)}: height and width must be multiples of {unit}")
    return WanFamily(
        config, WanCodec(codec, jnp.dtype(vae_dtype), piece, rows), size=(size[0], size[1]), frames=frames, fps=fps,
        dtype=jnp.dtype(dtype), text_encoder=text_encoder, lora_targets=lora_targets, lora_scale=lora_scale,
        lora_differences=lora_differences, int8=int8,
    )  # fmt: skip


def codec_sizes(sizes: Mapping[str, Any]) -> vae.VaeConfig:
    """The autoencoder's sizes, from a config's section."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    return vae.VaeConfig(**fields)
