"""`interfaces.Encoders` of Wan: the autoencoder for scenes, umT5 for texts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.interfaces import TextSpec
from world_distill.models.wan.codec import WanCodec
from world_distill.structs import PyTree

# Texts are padded to so many tokens, with zeros that attend like any other token: so the model was trained.
TEXT_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class WanEncoders:
    """See the module.

    Args:
      codec: encodes the scene.
      image_size: height and width of a clip in pixels.
      text_encoder: folder with `text_encoder/` and `tokenizer/`, or "words" for states without weights.
      text_width: of the text states.
    """

    codec: WanCodec
    image_size: tuple[int, int]
    text_encoder: str
    text_width: int

    @property
    def name(self) -> str:
        return self.text_encoder

    @property
    def parts(self) -> tuple[str, ...]:
        return self.codec.parts

    @property
    def scenes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        sizes = self.codec.config
        height, width = (side // sizes.space for side in self.image_size)
        return {"video": jax.ShapeDtypeStruct((1, height, width, sizes.channels), jnp.float32)}

    @property
    def texts(self) -> Mapping[str, TextSpec]:
        dtype = np.float32 if self.text_encoder == "words" else jnp.bfloat16
        return {"text": TextSpec(self.text_width, np.dtype(dtype))}

    def scene(self, base: PyTree, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.shape[1:3] != self.image_size:
            raise ValueError(f"scene images are {images.shape[1:3]} pixels; this model takes {self.image_size}")
        return jax.tree.map(np.asarray, self._encode(base, images[:, None]))

    def text(self, texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        return {"text": self._states(texts)}

    @functools.cached_property
    def _encode(self) -> Callable[..., dict[str, jax.Array]]:
        return jax.jit(self.codec.encode)

    @functools.cached_property
    def _states(self) -> Callable[[Sequence[str]], list[np.ndarray]]:
        if self.text_encoder == "words":
            from world_distill.models.hashed_words import encode_text

            return lambda texts: [encode_text(text, self.text_width) for text in texts]
        if not self.text_encoder:
            raise ValueError(
                "no text encoder: set config.model.text_encoder to the published model's folder (the one that holds"
                " text_encoder/ and tokenizer/)"
            )
        from world_distill.models.wan.text import UMT5TextEncoder

        return UMT5TextEncoder(self.text_encoder, max_length=TEXT_LENGTH).encode
