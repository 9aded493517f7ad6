"""Frozen text encoders of published models, run by transformers in PyTorch: how they open, and what they refuse."""

import abc
import importlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.interfaces import TextError


class TorchTextEncoder(abc.ABC):
    """A frozen text encoder in PyTorch, on a GPU if PyTorch sees one. It has the network, its tokenizer and its device.

    Args:
      folder: a model in diffusers' layout, with `text_encoder/` and `tokenizer/`; nothing is downloaded.
      max_length: tokens that a text may have, the one that the tokenizer adds included. A longer one is an error, where
        published pipelines cut it without a word: without its end a solution tells of another clip, and a task asks for
        less.
      dtype: of weights and computation: "bfloat16" or "float32".
      batch: texts at a time; a batch is as long as its longest text.

    Raises:
      UserError: a package is not installed.
      ValueError: an unknown dtype, a folder without these parts, or weights that lack some of the encoder's.
    """

    title: str  # what people call the encoder
    model: str  # and the model whose folder is needed
    model_types: tuple[str, ...]  # of transformers' config.json
    network_class: str  # of transformers
    packages: tuple[str, ...] = ("torch",)
    tokenizer_options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    dtypes = ("float32", "bfloat16")

    def __init__(self, folder: str | os.PathLike, *, max_length: int, dtype: str, batch: int):
        folder = pathlib.Path(folder)
        self.check_dtype(dtype)
        try:
            for package in self.packages:
                importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"{self.title} needs {error.name}, which is in the extra `torch`: pip install -e '.[torch]'"
            ) from error
        self.check_folder(folder)
        import torch

        self.max_length, self.batch = max_length, batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, self.network = self._load(folder, getattr(torch, dtype))

    @classmethod
    def check_dtype(cls, dtype: str) -> None:
        """Raises a ValueError for the name of a type that text encoders do not compute in."""
        if dtype not in cls.dtypes:
            raise ValueError(f"dtype {dtype!r} of a text encoder; there are: {', '.join(cls.dtypes)}")

    @classmethod
    def check_folder(cls, folder: pathlib.Path) -> None:
        """Raises a ValueError for a folder without the encoder's parts."""
        for part in ("text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise ValueError(f"{folder} has no {part}/: give the folder of {cls.model} in diffusers' layout")

    @abc.abstractmethod
    def tidy(self, text: str) -> str:
        """The text as the encoder was trained on it; "" where there is nothing in it."""

    @abc.abstractmethod
    def states(self, texts: Sequence[str]) -> list[np.ndarray]:
        """States [l d] of each tidy text of one batch, true length, no padding."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """States [l d] of each text, true length, no padding.

        Raises:
          TextError: a text has nothing in it, or more than `max_length` tokens.
        """
        tidy = [self.tidy(text) for text in texts]
        for text, words in zip(texts, tidy, strict=True):
            if not words and text:  # the empty text has a meaning, to guidance: its state is that of the added token
                raise TextError(f"cannot encode a text without characters: {text!r}")
            if (length := len(self.tokenizer(words).input_ids)) > self.max_length:
                raise TextError(
                    f"a text has {length} tokens, and the encoder takes {self.max_length}: shorten it, nothing is cut"
                    f" here: {text!r}"
                )
        return [states for i in range(0, len(tidy), self.batch) for states in self.states(tidy[i : i + self.batch])]

    def _load(self, folder: pathlib.Path, dtype: Any) -> tuple[Any, Any]:
        """Tokenizer and network."""
        import transformers

        where = folder / "text_encoder"
        try:
            config = transformers.AutoConfig.from_pretrained(where, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, **self.tokenizer_options
            )
            if config.model_type not in self.model_types:  # before all its weights are read
                raise ValueError(f"it is {config.model_type}, not {self.title}")
            network, found = getattr(transformers, self.network_class).from_pretrained(
                where, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # of tokenizers, safetensors and transformers: each has kinds of its own
            raise ValueError(f"{folder}: text encoder or tokenizer cannot be read ({error})") from error
        if missing := sorted(found["missing_keys"]):  # transformers draws these at random and says so in its log only
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(f"{where} lacks weights: {', '.join(missing[:5])}{more}")
        return tokenizer, network.eval().to(self.device)
