"""What a benchmark measures: its questions, in the order of tables, and over them `average` and `all`.

    average   mean over the questions of a clip
    all       the least of them: for verdicts of 0 and 1, whether the clip passes all; a graded score stays what it is

A benchmark with one question has that one measure. Results hold the questions of their benchmark, but for the usual
three, `QUESTIONS`, which earlier versions did not write down either.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

QUESTIONS = ("task", "agent", "consistency")
AVERAGE, ALL = "average", "all"
# What rows of a table have beside the rates of questions.
_TAKEN = frozenset((AVERAGE, ALL, "name", "group", "seed", "steps", "n", "clips", "invalid", "ci95"))
_SPACES = re.compile(r"[\s_\-\u2010-\u2015]+")
_COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@dataclasses.dataclass(frozen=True)
class Measures:
    """The measures of a benchmark. Raises ValueError for no questions, one named twice, or a name that tables use."""

    questions: tuple[str, ...] = QUESTIONS

    def __post_init__(self):
        if not self.questions or len(set(self.questions)) < len(self.questions):
            raise ValueError(f"a benchmark has one or more questions, each named once, not {self.questions}")
        if taken := [question for question in self.questions if question in _TAKEN or "/" in question]:
            raise ValueError(f"a benchmark's question cannot be called {taken[0]!r}: tables have that name, or a /")

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Measures":
        """Those of the results that an evaluation or an ablation has written."""
        questions = (result.get("benchmark") or {}).get("questions")
        return cls(tuple(questions)) if questions else cls()

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Measures":
        """Those of a row of `evaluation.scoring.summarise`."""
        return cls(tuple(name for name in row if name not in _TAKEN))

    @property
    def names(self) -> tuple[str, ...]:
        """All measures, in the order of tables."""
        return self.questions if len(self.questions) == 1 else (*self.questions, AVERAGE, ALL)

    @property
    def headline(self) -> str:
        """The question whose rate stands for the others."""
        return self.questions[0]

    @property
    def count(self) -> str:
        """How many questions there are, in a word."""
        return _COUNTS.get(len(self.questions), str(len(self.questions)))

    def label(self, measure: str) -> str:
        """What tables call a measure."""
        if measure == ALL:
            return "both" if len(self.questions) == 2 else f"all {self.count}"
        return measure.replace("_", " ")

    def values(self, scores: Float[np.ndarray, "n questions"], measure: str) -> Float[np.ndarray, " n"]:
        """A measure of each clip, from the scores of its questions; NaN where a score that it needs is.

        Raises KeyError for an unknown measure.
        """
        if measure in self.questions:
            return scores[:, self.questions.index(measure)]
        if measure not in self.names:
            raise KeyError(f"no measure {measure!r}; there are {', '.join(self.names)}")
        return scores.mean(axis=1) if measure == AVERAGE else scores.min(axis=1)


def grouping_key(text: str) -> str:
    """A kind's or an agent's name without what is only writing: capitals, hyphens and spaces.

    Tasks of WorldTasks name both a "First person view" and a "First-person view".
    """
    return _SPACES.sub(" ", text.casefold()).strip()
