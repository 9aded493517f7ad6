"""`interfaces.Encoders` of Wan: the autoencoder for scenes, umT5 for texts."""

import dataclasses
from typing import ClassVar

from world_distill.models.encoders import ClipEncoders, TextEncoder

# Texts are padded to so many tokens, with zeros that attend like any other token: so the model was trained.
TEXT_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class WanEncoders(ClipEncoders):
    """See `ClipEncoders`."""

    needed: ClassVar[str] = "the published model's folder (the one that holds text_encoder/ and tokenizer/)"

    def open_text_encoder(self) -> TextEncoder:
        from world_distill.models.wan.text import UMT5TextEncoder

        return UMT5TextEncoder(self.text_encoder, max_length=TEXT_LENGTH).encode
