"""`interfaces.Encoders` of LTX-2: the autoencoder for scenes, Gemma and the checkpoint's projection for texts."""

import dataclasses
import functools
import pathlib
from typing import ClassVar

from world_distill.models.encoders import WORDS, ClipEncoders, TextEncoder


@dataclasses.dataclass(frozen=True)
class LTX2Encoders(ClipEncoders):
    """See `ClipEncoders` for the other arguments.

    Args:
      text_projection: safetensors file or folder with the projection of Gemma's states; empty: `connectors/` of
        `text_encoder`.
      text_length: tokens that a text may have.
    """

    text_projection: str = ""
    text_length: int = 1024

    needed: ClassVar[str] = (
        "a folder with text_encoder/ (Gemma 3), tokenizer/ and, unless config.model.text_projection names a file,"
        " connectors/"
    )

    @property
    def name(self) -> str:
        return self.text_projection or self.text_encoder

    @property
    def most_tokens(self) -> int:
        return self.text_length

    @functools.cached_property
    def text_weights(self) -> str:
        """Digest of the text projection: that of a distilled model is another than that of the one it was made from."""
        from world_distill.models.ltx2.text import projection_digest

        return "" if self._projection is None else projection_digest(self._projection)

    @property
    def _projection(self) -> pathlib.Path | None:
        if self.text_encoder in ("", WORDS):
            return None
        return pathlib.Path(self.text_projection or f"{self.text_encoder}/connectors")

    def open_text_encoder(self) -> TextEncoder:
        from world_distill.models.ltx2.text import GemmaTextEncoder

        encoder = GemmaTextEncoder(self.text_encoder, projection=self._projection, max_length=self.text_length)
        if encoder.width != self.text_width:
            raise ValueError(
                f"the text projection in {self._projection} makes rows of {encoder.width} numbers, and"
                f" config.model.connectors.width = {self.text_width}: they are of two models"
            )
        return encoder.encode
