"""The yes/no questions that a judge is asked about a clip, as text files that anybody can edit.

A folder holds one file a question, NAME.txt, in which `{task}` and `{agent}` stand for the task's text and its agent,
and `{length}` for a sentence that tells how long the clip is; a brace that is meant is written twice.

The package has the questions `task`, `agent` and `consistency`, in two versions. Version 2 says that text in the frames
is no evidence, sets the task apart from the question, and tells the clip's length. Answers are kept by the text of
their question: those to version 1 stay in a cache, and count as another rubric's.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import string
from collections.abc import Mapping

from world_distill.errors import UserError
from world_distill.interfaces import Judge

FIELDS = ("task", "agent", "length")
_OWN = pathlib.Path(__file__).with_suffix("")
VERSIONS = {"1": _OWN / "1", "2": _OWN}  # the package's own; the last is the default
_BREAK = re.compile(r"\s*[\n\r\v\f\x85\u2028\u2029]\s*")


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Question templates by name. Raises ValueError for none, an empty one, or fields other than `FIELDS`.

    Attributes:
      questions: the templates.
      fps: frames a second of the clips that are asked about; 0: not known.
    """

    questions: Mapping[str, str]
    fps: float = 0.0

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

    def render(self, name: str, task: str, agent: str, frames: int = 0) -> str:
        """The full text of a question about a clip of so many frames (0: not known). KeyError names the questions.

        Braces in `task` and `agent` are plain text, and they stay on one line: none can leave its place.
        """
        if name not in self.questions:
            raise KeyError(f"no question {name!r}; the rubric has {', '.join(self.names)}")
        # One pass over the template: what is put in is not looked at again.
        task, agent = _BREAK.sub(" ", task), _BREAK.sub(" ", agent)
        return self.questions[name].format(task=task, agent=agent, length=_length(frames, self.fps)).strip()


def load_rubric(path: str | os.PathLike | None = None, *, fps: float = 0.0) -> Rubric:
    """The rubric in folder `path`, or one of the package's own: a number of `VERSIONS`, or the newest for None.

    `fps` is that of the clips (see `Rubric`).

    Raises:
      FileNotFoundError: no such folder, or no NAME.txt in it.
      ValueError: a file is not UTF-8 text, or not a template (see `Rubric`); the message names the file or question.
    """
    folder = _OWN if path is None else VERSIONS.get(str(path), pathlib.Path(path))
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
        return Rubric(questions, fps)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def rubric_for(judge: Judge | None, path: str = "", *, fps: float = 0.0) -> Rubric:
    """The questions for a judge: the rubric that `path` names (see `load_rubric`), or a learned reward's measures.

    A measure stands in the place of a question, and is about the task alone.

    Raises:
      UserError: a rubric for a learned reward, which reads none.
      FileNotFoundError, ValueError: see `load_rubric`.
    """
    measures = getattr(judge, "measures", None)
    if measures is None:
        return load_rubric(path or None, fps=fps)
    if path:
        raise UserError(f"the rubric {path} has no effect with a learned reward, which reads the task alone")
    return Rubric({name: f"{answered}: {{task}}" for name, answered in measures.items()})


def _length(frames: int, fps: float) -> str:
    """A sentence on a clip's length; "" if it is not known."""
    if not frames:
        return ""
    if not fps:
        return f"The video has {frames} frames."
    return f"The video has {frames} frames, {fps:g} a second, and lasts {frames / fps:.1f} seconds."
