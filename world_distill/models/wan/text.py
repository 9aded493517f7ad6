"""umT5, the text encoder of Wan (Chung et al., arXiv 2304.09151; Wan et al., arXiv 2503.20314), run by transformers.

A text is cleaned as Wan's pipelines do it: broken Unicode mended, HTML entities resolved, white space made single.
Its states are those of its own tokens, the closing one included. Wan itself sees 512 tokens, zero behind the text's
end, and attends to those zeros as well; the padding comes later, when batches are made.
"""

import html
import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from world_distill.models.text_encoders import TorchTextEncoder


def clean(text: str) -> str:
    """A text as the encoder was trained on it."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class UMT5TextEncoder(TorchTextEncoder):
    """Frozen umT5; see `TorchTextEncoder` for its other arguments and its errors.

    Args:
      dtype: of weights and computation: "bfloat16" (11 GB for Wan's umT5-XXL) or "float32" (twice that).
      stored: of the states that come out: "bfloat16" or "float32".
    """

    title, model, network_class = "umT5", "a Wan model", "UMT5EncoderModel"
    model_types, packages = ("umt5",), ("ftfy", "torch")

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        max_length: int = 512,
        dtype: str = "bfloat16",
        stored: str = "bfloat16",
        batch: int = 16,
    ):
        self.check_dtype(stored)
        self._stored = jnp.dtype(stored)
        super().__init__(folder, max_length=max_length, dtype=dtype, batch=batch)

    def tidy(self, text: str) -> str:
        return clean(text)

    def states(self, texts: Sequence[str]) -> list[np.ndarray]:
        import torch

        tokens = self.tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            states = self.network(tokens.input_ids, tokens.attention_mask).last_hidden_state
        # numpy has no bfloat16 of its own; float32 holds it exactly.
        array = states.float().cpu().numpy().astype(self._stored)
        mask = tokens.attention_mask.bool().cpu().numpy()
        return [row[real] for row, real in zip(array, mask, strict=True)]
