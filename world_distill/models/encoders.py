"""`interfaces.Encoders` of families with an autoencoder of clips and one text encoder.

A scene is a clip of one frame.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.interfaces import TextSpec
from world_distill.models.hashed_words import encode_text
from world_distill.structs import PyTree

WORDS = "words"  # in the place of a folder: states without weights

TextEncoder = Callable[[Sequence[str]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ClipEncoders(abc.ABC):
    """See the module.

    Args:
      codec: encodes the scene.
      image_size: height and width of a clip in pixels.
      text_encoder: folder with `text_encoder/` and `tokenizer/`, or "words" for states without weights.
      text_width: of the text states.
    """

    codec: Any
    image_size: tuple[int, int]
    text_encoder: str
    text_width: int

    needed: ClassVar[str]  # what config.model.text_encoder has to name, for the error where it names nothing

    @abc.abstractmethod
    def open_text_encoder(self) -> TextEncoder:
        """The published text encoder, opened: states [l d] of each text."""

    @property
    def name(self) -> str:
        return self.text_encoder

    @property
    def most_tokens(self) -> int | None:
        """Tokens of a text that the network reads; None: any number."""
        return None

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
        return {"text": TextSpec(self.text_width, np.dtype(dtype), most=self.most_tokens)}

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
    def _states(self) -> TextEncoder:
        if self.text_encoder == WORDS:
            return lambda texts: [encode_text(text, self.text_width) for text in texts]
        if not self.text_encoder:
            raise ValueError(f"no text encoder: set config.model.text_encoder to {self.needed}")
        return self.open_text_encoder()
