"""Gemma 3, the text encoder of LTX-2 (Gemma Team, arXiv 2503.19786; HaCohen et al., arXiv 2601.03233), by transformers.

LTX-2 reads the states of all layers of Gemma, 49 for each token. They are normalised and projected to one row a token
here, once a text: a text of 60 tokens is then half a megabyte, and its states would be 23. What comes behind the rows,
the connectors, is a part of the base and runs on the device.

The projection belongs to the checkpoint: that of the distilled model is another than that of the one it was made from.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from world_distill.errors import UserError
from world_distill.interfaces import TextError
from world_distill.models.ltx2.connectors import project_states

MAX_LENGTH = 1024  # tokens that the model was trained with
DTYPES = ("float32", "bfloat16")
# The projection's name in `connectors/` of diffusers' layout, and in the original file.
PROJECTIONS = ("text_proj_in.weight", "text_embedding_projection.aggregate_embed.weight")


class GemmaTextEncoder:
    """Frozen Gemma 3 in PyTorch, on a GPU if PyTorch sees one, and LTX-2's projection of its states in JAX.

    Args:
      folder: a model in diffusers' layout, with `text_encoder/` and `tokenizer/`; nothing is downloaded.
      projection: a safetensors file, or a folder of them, that holds the projection; None takes `connectors/` of
        `folder`.
      max_length: tokens that a text may have, the opening one included. A longer one is an error, where LTX-2's
        pipelines cut it without a word: without its end a solution tells of another clip.
      dtype: of Gemma's weights and computation: "bfloat16" (24 GB for Gemma-3-12B) or "float32" (twice that).
      batch: texts at a time; a batch is as long as its longest text.

    Raises:
      UserError: PyTorch is not installed.
      ValueError: an unknown dtype, a folder without these parts, weights that lack some of the encoder's, or a
        projection that is not there or of another encoder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        projection: str | os.PathLike | None = None,
        max_length: int = MAX_LENGTH,
        dtype: str = "bfloat16",
        batch: int = 4,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} of a text encoder; there are: {', '.join(DTYPES)}")
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"Gemma needs {error.name}, which is in the extra `torch`: pip install -e '.[torch]'"
            ) from error
        self.max_length, self.batch = max_length, batch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = pathlib.Path(folder)
        self._tokenizer, self._network = _load(folder, getattr(torch, dtype), self._device)
        kernel = read_projection(pathlib.Path(projection) if projection else folder / "connectors")
        sizes = self._network.config
        states = sizes.hidden_size * (sizes.num_hidden_layers + 1)
        if kernel.shape[0] != states:
            raise ValueError(
                f"the projection takes {kernel.shape[0]} numbers a token, and the text encoder of {folder} gives"
                f" {sizes.num_hidden_layers + 1} states of {sizes.hidden_size}: they are of two models"
            )
        self._project: Callable[..., jax.Array] = functools.partial(jax.jit(project_states), kernel=jnp.asarray(kernel))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Rows [l d] bfloat16 of each text, true length, no padding.

        Raises:
          TextError: a text has nothing in it, or more than `max_length` tokens.
        """
        tidy = [text.strip() for text in texts]
        for text, stripped in zip(texts, tidy, strict=True):
            if not stripped and text:  # the empty text has a meaning, to guidance: its row is the opening token's
                raise TextError(f"cannot encode a text without characters: {text!r}")
            if (length := len(self._tokenizer(stripped).input_ids)) > self.max_length:
                raise TextError(
                    f"a text has {length} tokens, and the encoder takes {self.max_length}: shorten it, nothing is cut"
                    f" here: {text!r}"
                )
        parts = [self._encode(tidy[i : i + self.batch]) for i in range(0, len(tidy), self.batch)]
        return [rows for part in parts for rows in part]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        import torch

        # Gemma's positions are relative, so a text's states do not depend on how much stands in front of it. Lengths
        # are multiples of 64: each is a program of its own.
        tokens = self._tokenizer(
            texts, padding=True, pad_to_multiple_of=64, return_attention_mask=True, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            found = self._network(tokens.input_ids, tokens.attention_mask, output_hidden_states=True)
            states = torch.stack(found.hidden_states, dim=-1).float().cpu().numpy()
        mask = tokens.attention_mask.bool().cpu().numpy()
        rows = np.asarray(self._project(states, mask)).astype(jnp.bfloat16)
        return [row[real] for row, real in zip(rows, mask, strict=True)]


def read_projection(path: pathlib.Path) -> np.ndarray:
    """The kernel [i o] of LTX-2's text projection, from a safetensors file or a folder of them.

    Raises:
      ValueError: none of the files holds it.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        with safetensors.safe_open(file, "np") as opened:
            for name in PROJECTIONS:
                if name in opened.keys():  # noqa: SIM118  (not a mapping)
                    return opened.get_tensor(name).T
    raise ValueError(
        f"{path} holds no text projection ({' or '.join(PROJECTIONS)}): it stands in connectors/ of diffusers' layout,"
        " and in the original single file"
    )


def _load(folder: pathlib.Path, dtype, device):
    """Tokenizer, padding on the left, and the language part of Gemma."""
    from transformers import AutoModel, AutoTokenizer

    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no {part}/: give the folder of LTX-2 in diffusers' layout")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left", local_files_only=True)
        loaded: Any = AutoModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, local_files_only=True, output_loading_info=True
        )
        network, found = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: text encoder or tokenizer cannot be read ({error})") from error
    if found["missing_keys"]:  # transformers draws these at random and says so in its log only
        raise ValueError(f"{folder / 'text_encoder'} lacks weights: {', '.join(sorted(found['missing_keys']))}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    language = getattr(network, "language_model", network)  # the vision tower is not asked
    return tokenizer, language.eval().to(device)
