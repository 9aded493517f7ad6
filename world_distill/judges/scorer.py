"""Learned rewards as judges: a scorer gives numbers about a clip and its task, such as VideoAlign, HPSv3 or PickScore.

A *measure* is one of its numbers, and stands where a judge has a question: in `rollout.weights`, in the log and in the
cache. It is given on as it is. Advantages are taken relative to their group, so that an offset does not matter, and
`rollout.normalise` divides by the spread; `rollout.clip`, which is in log-odds, is refused. Where a measure has a
threshold, what is above it counts as a yes, and its rate is logged, too.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.interfaces import JudgeAnswer, JudgeRequest
from world_distill.judges.answering import AnswersEach, Done
from world_distill.judges.selftest import probe_clip
from world_distill.settings import addresses

PROBE_TASK = "[person]: Walk to the red wall."
PROBE_FRAMES = 16

# Clips [F H W 3] uint8 and their tasks -> each measure's numbers, in their order.
Scorer = Callable[[Sequence[np.ndarray], Sequence[str]], Any]


@dataclasses.dataclass(frozen=True)
class Measures:
    """Which numbers of a scorer are used, and what counts as a yes.

    Attributes:
      sources: name of a measure -> what the scorer calls the number.
      thresholds: measure -> number above which it is a yes.

    Raises:
      UserError: none, a name that a question cannot have, or a threshold of something else.
    """

    sources: Mapping[str, str]
    thresholds: Mapping[str, float]

    def __post_init__(self):
        names = [*self.sources, *self.sources.values()]
        if not names or not all(name and not set(name) & set("{}/:") for name in names):
            raise UserError(f"measures names the scorer's numbers, without any of {{ }} / :, not {dict(self.sources)}")
        if unknown := [name for name in self.thresholds if name not in self.sources]:
            raise UserError(f"thresholds has {', '.join(unknown)}, and measures {', '.join(self.sources)}")
        if bad := [name for name, value in self.thresholds.items() if as_number(value) is None]:
            raise UserError(f"the threshold of {bad[0]} is a finite number, not {self.thresholds[bad[0]]!r}")

    @classmethod
    def of(cls, measures: Sequence[str] | Mapping[str, str], thresholds: Mapping[str, float] | None) -> "Measures":
        """From options: `measures` lists the scorer's names, or maps other names to them."""
        named = measures if isinstance(measures, Mapping) else {name: name for name in _listed(measures)}
        return cls(dict(named), dict(thresholds or {}))

    @property
    def asked(self) -> dict[str, str]:
        """Measure -> what is answered, in words that change when the answer does: the cache has them in its keys."""
        above = {name: f" above {float(value)!r}" for name, value in self.thresholds.items()}
        return {name: source + above.get(name, "") for name, source in self.sources.items()}

    def answer(self, measure: str, numbers: Mapping[str, Any]) -> JudgeAnswer:
        """The answer about a clip, from all the numbers that the scorer gave it."""
        source = self.sources[measure]
        if source not in numbers:
            return JudgeAnswer(None, f"the scorer gave no {source}, but {', '.join(map(str, numbers)) or 'nothing'}")
        value = as_number(numbers[source])
        if value is None:
            return JudgeAnswer(None, f"the scorer's {source} is no finite number: {str(numbers[source])[:40]!r}")
        return JudgeAnswer(value - self.thresholds.get(measure, 0.0))

    def check(self, numbers: Mapping[str, Any], where: str) -> str:
        """A line that says what a scorer gave a probe. Raises UserError if a measure is missing."""
        if missing := [source for source in self.sources.values() if source not in numbers]:
            raise UserError(
                f"{where} gives {', '.join(map(str, numbers)) or 'no numbers'}, and no {', '.join(missing)}: set the "
                "option measures to the names of its numbers"
            )
        return ", ".join(f"{source} {_shown(numbers[source])}" for source in self.sources.values())


class LearnedReward(AnswersEach):
    """`interfaces.Judge`, of a scorer in this process. Base of the judges that say how they get their numbers.

    Attributes:
      name: changes with whatever changes answers.
      measures: measure -> what is answered; they take the place of questions.
      thresholds: measure -> number above which it counts as a yes.
    """

    def __init__(self, name: str, measures: Measures, *, batch: int):
        if batch < 1:
            raise UserError(f"a scorer's batch is at least 1, not {batch}")
        self.name, self.measures, self.thresholds = name, measures.asked, measures.thresholds
        self._measures, self._batch = measures, batch

    def numbers(self, clips: Sequence[np.ndarray], tasks: Sequence[str]) -> list[Mapping[str, Any]]:
        """The scorer's numbers by name for each of some clips [F H W 3] uint8 and their tasks.

        Raises:
          UserError: the scorer cannot be used.
        """
        raise NotImplementedError

    def ask_each(self, requests: Sequence[JudgeRequest], done: Done) -> None:
        """Calls `done(number of the request, answer)` for each, batch by batch. Raises as `numbers`."""
        items = items_of(requests)
        for start in range(0, len(items), self._batch):
            part = items[start : start + self._batch]
            firsts = [requests[numbers[0]] for numbers in part]
            found = self.numbers([r.clip for r in firsts], [r.task for r in firsts])
            for requested, numbers in zip(part, found, strict=True):
                for i in requested:
                    done(i, self._measures.answer(requests[i].name, numbers))

    def check(self) -> list[str]:
        """Has the scorer look at red pictures; one line that says what it gave.

        Raises:
          UserError: it fails, or lacks a measure.
        """
        [numbers] = self.numbers([probe_clip(PROBE_FRAMES)], [PROBE_TASK])
        return [f"{self.name}: {self._measures.check(numbers, f'scorer {self.name}')} about red pictures"]


class ScorerJudge(LearnedReward):
    """`interfaces.Judge`: any function or class of Python that scores clips."""

    def __init__(
        self,
        scorer: str | Scorer = "",
        *,
        measures: Sequence[str] | Mapping[str, str] = ("score",),
        thresholds: Mapping[str, float] | None = None,
        version: str = "",
        options: Mapping[str, Any] | None = None,
        batch: int = 8,
    ):
        """A class is made at once, with the options; a function gets them with each call.

        Args:
          scorer: address `package:function` of what takes (clips, tasks), lists of arrays [F H W 3] uint8 and of texts,
            and returns as many numbers, or a mapping of names to them; or the address of a class whose objects do.
          measures: names of the numbers that are used, or a mapping from other names to them, such as {"task": "TA"}.
          thresholds: measure -> number above which it counts as a yes; others have no rate.
          version: text that changes with the scorer's weights or code. Stored answers of another version are not used.
          options: keyword arguments of the scorer.
          batch: clips that it is given at once.

        Raises:
          UserError: no such scorer, options that it does not take, or measures and thresholds that do not fit.
        """
        chosen, given = Measures.of(measures, thresholds), dict(options or {})
        self._label = scorer if isinstance(scorer, str) else getattr(scorer, "__qualname__", type(scorer).__qualname__)
        found = _find(scorer) if isinstance(scorer, str) else scorer
        try:
            if inspect.isclass(found):
                made: Any = found(**given)
            else:
                made = functools.partial(found, **given) if given else found
        except TypeError as error:
            raise UserError(f"the options {given} do not fit the scorer {self._label}: {error}") from error
        self._scorer, own = made, str(getattr(made, "name", ""))
        parts = ["scorer-1", self._label, own, version, json.dumps(given, sort_keys=True, default=str)]
        super().__init__(" ".join(filter(None, parts)), chosen, batch=batch)

    def numbers(self, clips: Sequence[np.ndarray], tasks: Sequence[str]) -> list[Mapping[str, Any]]:
        where = f"the scorer {self._label}"
        try:
            found = self._scorer(list(clips), list(tasks))
        except UserError:
            raise
        except Exception as error:  # whatever somebody else's code raises
            raise UserError(f"{where} failed on {len(clips)} clips: {error!r}") from error
        if not isinstance(found, Mapping):
            if len(self.measures) > 1:
                raise UserError(f"{where} returns one list of numbers, for measures {', '.join(self.measures)}")
            found = dict.fromkeys(self._measures.sources.values(), found)
        columns = {str(name): _column(values, where, str(name), len(clips)) for name, values in found.items()}
        return [{name: values[i] for name, values in columns.items()} for i in range(len(clips))]


def items_of(requests: Sequence[JudgeRequest]) -> list[list[int]]:
    """The requests that one look of a scorer answers, by their numbers: those about one clip and task."""
    items: dict[tuple[int, str], list[int]] = {}
    for i, request in enumerate(requests):
        items.setdefault((id(request.clip), request.task), []).append(i)
    return list(items.values())


def as_number(value: Any) -> float | None:
    """A finite float, of a number, an array or a tensor of one; None for anything else, texts among it."""
    if value is None or isinstance(value, (bool, np.bool_, str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _column(values: Any, where: str, name: str, count: int) -> list[Any]:
    """A measure's numbers as a list. Raises UserError unless there is one for each clip."""
    try:
        column = list(values)
    except TypeError:  # a number, or an array without axes
        column = [values]
    if len(column) != count:
        raise UserError(f"{where} gives {len(column)} numbers {name!r} for {count} clips: one for each is needed")
    return column


def _listed(names: Sequence[str] | str) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _shown(value: Any) -> str:
    number = as_number(value)
    return "nothing" if number is None else f"{number:.3g}"


def _find(address: str) -> Any:
    module, _, name = addresses.current(address).partition(":")
    if not module or not name:
        raise UserError(f"a scorer is named by its address, package:function, not {address!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the scorer {address!r} cannot be imported: {error}") from error
