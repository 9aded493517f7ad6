"""`interfaces.Encoders` of LTX-2: the autoencoder for scenes, Gemma and the checkpoint's projection for texts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.interfaces import TextSpec
from world_distill.models.ltx2.codec import LTX2Codec
from world_distill.structs import PyTree

WORDS = "words"  # states without weights


@dataclasses.dataclass(frozen=True)
class LTX2Encoders:
    """See the module.

    Args:
      codec: encodes the scene.
      image_size: height and width of a clip in pixels.
      text_encoder: folder with `text_encoder/` and `tokenizer/`, or "words".
      text_projection: safetensors file or folder with the projection of Gemma's states; empty: `connectors/` of
        `text_encoder`.
      text_width: of a token's row.
      text_length: tokens that a text may have.
    """

    codec: LTX2Codec
    image_size: tuple[int, int]
    text_encoder: str
    text_projection: str
    text_width: int
    text_length: int

    @property
    def name(self) -> str:
        """The projection if one is named: rows of the distilled model are not those of the one it was made from."""
        return self.text_projection or self.text_encoder

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
        dtype = np.float32 if self.text_encoder == WORDS else jnp.bfloat16
        return {"text": TextSpec(self.text_width, np.dtype(dtype))}

    def scene(self, base: PyTree, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.shape[1:3] != self.image_size:
            raise ValueError(f"scene images are {images.shape[1:3]} pixels; this model takes {self.image_size}")
        return jax.tree.map(np.asarray, self._encode(base, images[:, None]))

    def text(self, texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        return {"text": self._rows(texts)}

    @functools.cached_property
    def _encode(self) -> Callable[..., dict[str, jax.Array]]:
        return jax.jit(self.codec.encode)

    @functools.cached_property
    def _rows(self) -> Callable[[Sequence[str]], list[np.ndarray]]:
        if self.text_encoder == WORDS:
            from world_distill.models.hashed_words import encode_text

            return lambda texts: [encode_text(text, self.text_width) for text in texts]
        if not self.text_encoder:
            raise ValueError(
                "no text encoder: set config.model.text_encoder to a folder with text_encoder/ (Gemma 3), tokenizer/"
                " and, unless config.model.text_projection names a file, connectors/"
            )
        from world_distill.models.ltx2.text import GemmaTextEncoder

        encoder = GemmaTextEncoder(
            self.text_encoder, projection=self.text_projection or None, max_length=self.text_length
        )
        return encoder.encode
