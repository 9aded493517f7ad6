"""The yes/no questions that a judge is asked about a clip, as text files that anybody can edit.

A folder holds one file a question, NAME.txt, in which `{task}` and `{agent}` stand for the task's text and its agent;
a brace that is meant is written twice. The package's own folder has `task`, `agent` and `consistency`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import string
from collections.abc import Mapping

FIELDS = ("task", "agent")


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Question templates by name. Raises ValueError for none, an empty one, or fields other than `FIELDS`."""

    questions: Mapping[str, str]

    def __post_init__(self):
        if not self.questions:
            raise ValueError("a rubric without questions")
        for name, template in self.questions.items():
            if not template.strip():
                raise ValueError(f"question {name!r} is empty")
            try:
                parts = list(string.Formatter().parse(template))
            except ValueError as error:
                raise ValueError(f"question {name!r}: {error}; a brace that is meant is written twice") from error
            # A field with an attribute, an index or a format would do more than put a text in its place.
            unknown = [
                f for _, f, spec, conversion in parts if f is not None and (f not in FIELDS or spec or conversion)
            ]
            if unknown:
                allowed = ", ".join(f"{{{f}}}" for f in FIELDS)
                raise ValueError(
                    f"question {name!r} has unknown fields {unknown}; there are {allowed}, and nothing more"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The questions' names, sorted."""
        return tuple(sorted(self.questions))

    @property
    def version(self) -> str:
        """12 hex digits that change when a name or a template does."""
        return hashlib.sha256(json.dumps(dict(self.questions), sort_keys=True).encode()).hexdigest()[:12]

    def render(self, name: str, task: str, agent: str) -> str:
        """The full text of a question. Braces in `task` and `agent` are plain text. KeyError names the questions."""
        if name not in self.questions:
            raise KeyError(f"no question {name!r}; the rubric has {', '.join(self.names)}")
        # One pass over the template: what is put in is not looked at again.
        return self.questions[name].format(task=task, agent=agent).strip()


def load_rubric(path: str | os.PathLike | None = None) -> Rubric:
    """The rubric in folder `path`, or the package's own.

    Raises:
      FileNotFoundError: no such folder, or no NAME.txt in it.
      ValueError: a file is not UTF-8 text, or not a template (see `Rubric`); the message names the file or question.
    """
    folder = pathlib.Path(__file__).with_suffix("") if path is None else pathlib.Path(path)
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{folder}: no rubric there (a folder with one NAME.txt a question)")
    questions = {}
    for file in files:
        try:
            questions[file.stem] = file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error})") from error
    try:
        return Rubric(questions)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
