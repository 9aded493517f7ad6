"""The texts with which a VLM is asked for tasks and solutions, as files that anybody can edit.

A folder holds `instructions.txt` (what is wanted), `format.txt` (how it is to be written) and `request.txt` (the
sentence after the picture). In the first and the last `{max_pairs}` and `{seconds}` stand for the number of tasks and
the length of a clip, and a brace that is meant is written twice; `format.txt` is sent as it is.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import string

from world_distill.interfaces import TaskPair

FIELDS = ("max_pairs", "seconds")
_LEAST_REPEATED = 4  # words; fewer may stand in a prompt by chance
_FILES = ("instructions", "format", "request")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The three texts. Raises ValueError for an empty one, or for fields other than `FIELDS`."""

    instructions: str
    format: str
    request: str

    def __post_init__(self):
        for name in _FILES:
            text = getattr(self, name)
            if not text.strip():
                raise ValueError(f"{name}.txt is empty")
            if name != "format":
                _check_fields(name, text)

    @property
    def version(self) -> str:
        """12 hex digits that change when a text does."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def before(self, *, max_pairs: int, seconds: float) -> str:
        """What is sent before the picture: the same for all pictures, so that a server's prefix cache holds it."""
        return f"{_filled(self.instructions, max_pairs, seconds)}\n\n{self.format.strip()}"

    def repeated(self, pair: TaskPair) -> bool:
        """Whether the task or the solution of a pair stands in the prompt word for word, as its example does."""
        texts = [_plain(text) for text in (pair.task, pair.solution)]
        return any(len(text.split()) >= _LEAST_REPEATED and f" {text} " in self._words for text in texts)

    @functools.cached_property
    def _words(self) -> str:
        return f" {_plain(f'{self.instructions} {self.format} {self.request}')} "

    def after(self, *, max_pairs: int, seconds: float) -> str:
        """What is sent after the picture."""
        return _filled(self.request, max_pairs, seconds)


def load_prompt(path: str | os.PathLike | None = None) -> Prompt:
    """The prompt in folder `path`, or the package's own.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not UTF-8 text or not a template (see `Prompt`); the message names the folder.
    """
    folder = pathlib.Path(path) if path else pathlib.Path(__file__).with_suffix("")
    missing = [f"{name}.txt" for name in _FILES if not (folder / f"{name}.txt").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: an annotator's prompt needs {', '.join(missing)} there, too")
    try:
        return Prompt(*((folder / f"{name}.txt").read_text(encoding="utf-8").strip() for name in _FILES))
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{folder}: {error}") from error


def _plain(text: str) -> str:
    """Letters and digits alone: JSON, line breaks and quotes make no difference."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def _check_fields(name: str, text: str) -> None:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{name}.txt: {error}; a brace that is meant is written twice") from error
    # A field with an attribute, an index or a format would do more than put a number in its place.
    unknown = [f for _, f, spec, conversion in parts if f is not None and (f not in FIELDS or spec or conversion)]
    if unknown:
        allowed = ", ".join(f"{{{f}}}" for f in FIELDS)
        raise ValueError(f"{name}.txt has unknown fields {unknown}; there are {allowed}, and nothing more")


def _filled(text: str, max_pairs: int, seconds: float) -> str:
    return text.format(max_pairs=max_pairs, seconds=f"{seconds:g}").strip()
