"""umT5, the text encoder of Wan (Chung et al., arXiv 2304.09151; Wan et al., arXiv 2503.20314), run by transformers.

A text is cleaned as Wan's pipelines do it: broken Unicode mended, HTML entities resolved, white space made single.
Its states are those of its own tokens, the closing one included. Wan itself sees 512 tokens, zero behind the text's
end, and attends to those zeros as well; the padding comes later, when batches are made.
"""

import html
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from world_distill.errors import UserError
from world_distill.interfaces import TextError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}


def clean(text: str) -> str:
    """A text as the encoder was trained on it."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class UMT5TextEncoder:
    """Frozen umT5 in PyTorch, on a GPU if PyTorch sees one.

    Args:
      folder: a model in diffusers' layout, with `text_encoder/` and `tokenizer/`; nothing is downloaded.
      max_length: tokens that a text may have, the closing one included. A longer one is an error, where Wan's
        pipelines cut it without a word: without its end a solution tells of another clip, and a task asks for less.
      dtype: of weights and computation: "bfloat16" (11 GB for Wan's umT5-XXL) or "float32" (twice that).
      stored: of the states that come out: "bfloat16" or "float32".
      batch: texts at a time; a batch is as long as its longest text.

    Raises:
      UserError: PyTorch or ftfy is not installed.
      ValueError: an unknown dtype, a folder without these parts, or weights that lack some of the encoder's.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        max_length: int = 512,
        dtype: str = "bfloat16",
        stored: str = "bfloat16",
        batch: int = 16,
    ):
        for value in (dtype, stored):
            if value not in DTYPES:
                raise ValueError(f"dtype {value!r} of a text encoder; there are: {', '.join(DTYPES)}")
        try:
            import ftfy  # noqa: F401
            import torch
        except ImportError as error:
            raise UserError(
                f"umT5 needs {error.name}, which is in the extra `torch`: pip install -e '.[torch]'"
            ) from error
        self.max_length, self.batch, self._stored = max_length, batch, DTYPES[stored]
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer, self._network = _load(pathlib.Path(folder), getattr(torch, dtype), self._device)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """States [l d] of each text, true length, no padding.

        Raises:
          TextError: a text has nothing in it, or more than `max_length` tokens.
        """
        cleaned = [clean(text) for text in texts]
        for text, tidy in zip(texts, cleaned, strict=True):
            if not tidy and text:  # the empty text has a meaning, to guidance: its state is the closing token's
                raise TextError(f"cannot encode a text without characters: {text!r}")
            if (length := len(self._tokenizer(tidy).input_ids)) > self.max_length:
                raise TextError(
                    f"a text has {length} tokens, and the encoder takes {self.max_length}: shorten it, nothing is cut"
                    f" here: {text!r}"
                )
        parts = [self._encode(cleaned[i : i + self.batch]) for i in range(0, len(cleaned), self.batch)]
        return [states for part in parts for states in part]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        import torch

        tokens = self._tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            states = self._network(tokens.input_ids, tokens.attention_mask).last_hidden_state
        # numpy has no bfloat16 of its own; float32 holds it exactly.
        array = states.float().cpu().numpy().astype(self._stored)
        mask = tokens.attention_mask.bool().cpu().numpy()
        return [row[real] for row, real in zip(array, mask, strict=True)]


def _load(folder: pathlib.Path, dtype, device):
    """Tokenizer and network from a folder in diffusers' layout."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no {part}/: give the folder of a Wan model in diffusers' layout")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        loaded: Any = UMT5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, local_files_only=True, output_loading_info=True
        )
        network, found = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: text encoder or tokenizer cannot be read ({error})") from error
    if found["missing_keys"]:  # transformers draws these at random and says so in its log only
        raise ValueError(f"{folder / 'text_encoder'} lacks weights: {', '.join(sorted(found['missing_keys']))}")
    return tokenizer, network.eval().to(device)
