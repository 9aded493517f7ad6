"""What families of published clip models share: sizes of a clip, the video stream, and the settings of LoRA."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from world_distill.models.lora import Adapted
from world_distill.structs import LatentSpec


@dataclasses.dataclass(frozen=True, eq=False)
class ClipFamily(Adapted):
    """A transformer that LoRA adapts, an autoencoder of clips, and a text encoder.

    Args:
      config: sizes of the transformer.
      codec: the autoencoder.
      size: height and width of a clip in pixels, multiples of 32 with the published sizes.
      frames: frames of a clip: 1 + a multiple of 4 (Wan) or 8 (LTX-2) with the published sizes.
      dtype: type of the weights in front of the autoencoder, bfloat16 or float32.
      int8: keep the kernels of the transformer's blocks as 8-bit integers, with a scale for each output channel
        (`models.int8`). They take half the memory of bfloat16, and are turned into `dtype` block by block; `remat` =
        "none" keeps all of them in `dtype` for the backward pass. For LoRA alone.
      text_encoder: for `encode` and `generate`: folder with text_encoder/ and tokenizer/ of the published model, or
        "words" for states without weights.
      lora_targets: pattern of the paths of the layers that LoRA adapts.
      lora_scale: factor on the product of LoRA's factors (alpha / rank).
      lora_differences: pattern of the weights that get full differences beside LoRA; empty: none.

    Raises:
      ValueError: a clip that the autoencoder cannot cut into latents.
    """

    config: Any
    codec: Any
    _: dataclasses.KW_ONLY
    size: tuple[int, int]
    frames: int = 121
    dtype: Any = jnp.dtype("bfloat16")
    int8: bool = False
    text_encoder: str = ""
    lora_targets: str = r"blocks\..*"
    lora_scale: float = 1.0
    lora_differences: str = ""

    adapted = "transformer"
    shipped_bases = {}  # noqa: RUF012  (never changed)

    def __post_init__(self):
        if self.frames < 2:
            raise ValueError(f"model.frames = {self.frames}: the first frame is the scene, so that none is generated")
        self.codec.config.check_clip(self.frames, *self.size)
        if self.config.channels != self.codec.config.channels:
            raise ValueError(
                f"model.channels = {self.config.channels}, but model.vae.channels = {self.codec.config.channels}"
            )

    @property
    def video(self) -> LatentSpec:
        """The picture's stream, whose first latent frame is the scene."""
        sizes = self.codec.config
        frames = 1 + (self.frames - 1) // sizes.time
        shape = (frames, *(side // sizes.space for side in self.size), self.config.channels)
        return LatentSpec(shape, moves=np.arange(frames) > 0)


def split_settings(family: type, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config's section `model` in two: fields of the family's class, and the rest, which are sizes of the network.

    Raises:
      ValueError: a size that is no pair.
    """
    names, settings = {field.name for field in dataclasses.fields(family)}, with_tuples(settings)
    own = {key: value for key, value in settings.items() if key in names}
    if "size" in own and len(own["size"]) != 2:
        raise ValueError(f"model.size = {own['size']}: it is (height, width)")
    return own, {key: value for key, value in settings.items() if key not in names}


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with tuples in place of JSON's lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
