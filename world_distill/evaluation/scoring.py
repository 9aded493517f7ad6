"""Scoring a model on a record set: its clips, the benchmark's verdicts, rates with intervals.

One clip a task, or one from each of several noises. The benchmark scores each question (`core.measures`); the sandbox's
and WorldTasks' are: was the task completed, did the intended agent do it, is the clip physically and temporally
consistent. Intervals are at 95 % and over cases: where a task has several clips, its mean counts once.

A clip depends on (seed, record, noise, weights) alone: the same starting noise for every model that is compared. The
Demonstrator's clips, told the solution, are made with demonstrator.guidance, all others with rollout.guidance.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from world_distill import console
from world_distill.core import metrics
from world_distill.core.measures import Measures, grouping_key
from world_distill.data.records.batches import Role, TaskBatch, fixed_batches
from world_distill.data.records.negative import load_negative
from world_distill.data.records.reader import RecordReader
from world_distill.devices import hosts
from world_distill.devices.sharding import batch_sharding
from world_distill.errors import UserError
from world_distill.evaluation.clip_sampler import make_sampler
from world_distill.interfaces import Benchmark, Cases, ModelFamily
from world_distill.settings.guidance import Guidance
from world_distill.structs import PyTree, Texts

# How tables call roles, as the report and README.md do; files for programs have the keys.
NAMES = {"demonstrator": "Demonstrator", "executor": "Executor"}
_USUAL = Measures()
_NOISES = 2**31  # numbers of further noises begin here: no record has such a number


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the benchmark said about one clip; NaN where it could not say.

    Attributes:
      scores: from 0 to 1, by question.
      details: other numbers of the benchmark, by name.
      noise: which of a task's clips this is, from 0.
    """

    id: str
    task: str
    agent: str
    kind: str
    scores: dict[str, float]
    details: dict[str, float] = dataclasses.field(default_factory=dict)
    noise: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Verdict":
        """What `to_json` of this or an earlier version gave, as JSON brings it back: null is no score."""
        found: dict[str, Any] = dict(fields)
        for name in ("scores", "details"):
            numbers = fields.get(name, {}).items()
            found[name] = {key: np.nan if value is None else float(value) for key, value in numbers}
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """Its fields; without those that have nothing to say, as files of earlier versions are."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value or name not in ("details", "noise")}


class Evaluator:
    """Samples clips for the tasks of a record set and has the benchmark check them; without one, it only samples."""

    def __init__(
        self,
        family: ModelFamily,
        mesh: jax.sharding.Mesh,
        benchmark: Benchmark | None,
        *,
        grid: np.ndarray,
        batch: int,
        lengths: Mapping[str, int],
        seed: int,
        guidance: Guidance = Guidance(),  # noqa: B008  (frozen)
    ):
        self._family, self._mesh, self._grid = family, mesh, tuple(np.asarray(grid).tolist())
        self._guidance, self._negatives = guidance, {}
        self._benchmark, self._batch, self._lengths = benchmark, batch, lengths
        self.measures = Measures(tuple(benchmark.questions)) if benchmark is not None else _USUAL
        self._details = tuple(getattr(benchmark, "details", ()))
        self._rows = batch_sharding(mesh)
        self._key = jax.random.key(seed)

    def run(
        self,
        reader: RecordReader,
        base: PyTree,
        lora: PyTree | None,
        *,
        text: Role,
        limit: int = 0,
        noises: int = 1,
        keep: Callable[[str, np.ndarray], None] | None = None,
        watch: Callable[[np.ndarray, np.ndarray, Mapping[str, Sequence[str]]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Verdict]:
        """Verdicts on `noises` clips a record, the same on every process; each clip is looked at by one of them.

        All records come in their order for the first noise, then again for the next.

        Args:
          reader: encoded records.
          base: frozen weights.
          lora: the Executor; None is the base model.
          text: "task" or "solution": what the model is told.
          limit: look at the first `limit` records only; 0 takes all.
          noises: clips of each record.
          keep: called with each record's id and its first clip [F H W 3] uint8, on every process.
          watch: called with the clips [n F H W 3] of each batch that this process is to look at, their numbers in the
            batch, and `ids`, `task` and `agent` of all its records; on every process, if without clips.
          progress: called with the number of clips that are done, and of all.

        Raises:
          UserError: the benchmark returns a score that is not from 0 to 1.
        """
        verdicts: list[Verdict] = []
        total = min(limit or len(reader), len(reader))
        negative = self.negative(reader, text)
        # Each process reads the records of its own clips; what all need to know of the others is in the heads.
        apart = jax.process_count() > 1 and reader.has_heads
        needed = hosts.rows_held(self._batch, self._rows) if apart else None
        heads = reader.heads() if apart else None
        if heads is not None and text == "solution":
            heads.take(range(total)).check_solutions()  # on all processes alike
        wanted = -(-total // self._batch)  # batches; those behind are not read

        def score(noise: int, first: int, batch: TaskBatch, sampled: jax.Array) -> None:
            count = min(self._batch, total - first)
            names = heads.take(range(first, first + count)) if heads is not None else None
            ids = names.id if names is not None else batch.ids[:count]
            task, agent, kind = (getattr(names or batch, name)[:count] for name in ("task", "agent", "kind"))
            own, clips = hosts.own_rows(sampled)
            own, clips = own[own < count], clips[own < count]
            if watch is not None:
                watch(clips, own, {"ids": ids, "task": task, "agent": agent})
            found = hosts.join_rows(own, self._check(clips, own, batch), count).tolist()
            for i, values in enumerate(found):
                named = dict(zip((*self.measures.questions, *self._details), values, strict=True))
                scores = {question: named.pop(question) for question in self.measures.questions}
                verdicts.append(Verdict(ids[i], task[i], agent[i], kind[i], scores, named, noise))
            if keep is not None and not noise:
                for name, clip in zip(ids, hosts.whole(sampled)[:count], strict=True):
                    keep(name, clip)
            if progress is not None:
                progress(len(verdicts), noises * total)

        # While a judge is asked about a batch, the devices make the next one. In a job of several processes, collective
        # operations would meet in another order than they were issued in.
        ahead = 1 if jax.process_count() == 1 else 0
        waiting: list[tuple[int, int, TaskBatch, jax.Array]] = []
        for noise in range(noises):
            batches = fixed_batches(reader, self._batch, lengths=self._lengths, needed=needed)
            for number, batch in enumerate(itertools.islice(batches, wanted)):
                first = number * self._batch
                rows = np.arange(self._batch) + first
                waiting.append((noise, first, batch, self._clips(batch, base, lora, text, rows, negative, noise)))
                while len(waiting) > ahead:
                    score(*waiting.pop(0))
        for batch in waiting:
            score(*batch)
        return verdicts

    def clips(
        self,
        batch: TaskBatch,
        base: PyTree,
        lora: PyTree | None,
        *,
        text: Role,
        rows: Int[np.ndarray, " b"],
        negative: Texts | None = None,
    ) -> np.ndarray:
        """Clips [b F H W 3] uint8 for a batch of tasks, each from the noise of (seed, its number in `rows`).

        `negative` is what `negative` gives for the batch's records.

        Raises RecordError for `text="solution"` and a record without one.
        """
        return hosts.whole(self._clips(batch, base, lora, text, rows, negative))

    def negative(self, reader: RecordReader, text: str) -> Texts | None:
        """The negative text of records, if clips of what is told `text` are made with guidance.

        Raises RecordError where the records have none, or another one than the config.
        """
        if self._guidance.scale(text) == 1:
            return None
        if reader.index_path not in self._negatives:
            found = load_negative(reader, self._guidance, self._lengths, self._mesh)
            self._negatives[reader.index_path] = found
        return self._negatives[reader.index_path]

    def _check(self, clips: np.ndarray, own: np.ndarray, batch: TaskBatch) -> np.ndarray:
        """What the benchmark says [n, questions and details] about clips, whose numbers in the batch are `own`."""
        columns = (*self.measures.questions, *self._details)
        if not len(own):
            return np.zeros((0, len(columns)))
        assert self._benchmark is not None  # `run` is of no use without one
        at = np.searchsorted(batch.numbers, own)
        cases = Cases(*([column[i] for i in at] for column in (batch.ids, batch.task, batch.agent, batch.image_png)))
        found = self._benchmark.check(clips, cases)
        values = np.stack([np.asarray(found[name], np.float64) for name in columns], axis=1)
        for name, column in zip(self.measures.questions, values.T, strict=False):
            if len(wrong := np.flatnonzero((column < 0) | (column > 1))):
                raise UserError(
                    f"benchmark {self._benchmark.name}: the score of {name} is {column[wrong[0]]:g} for "
                    f"{cases.ids[wrong[0]]}; scores are from 0 to 1, and NaN where there is none"
                )
        return values

    def _clips(
        self,
        batch: TaskBatch,
        base: PyTree,
        lora: PyTree | None,
        text: Role,
        rows: np.ndarray,
        negative: Texts | None,
        noise: int = 0,
    ) -> jax.Array:
        if text == "solution":
            batch.check_solutions()
        at = np.zeros(batch.count, int)  # of rows that are not held here, anything
        at[batch.numbers] = np.arange(len(batch))
        condition = jax.tree.map(lambda x: hosts.place_rows(np.asarray(x), at, self._rows), batch.condition(text))
        sample = make_sampler(self._family, self._mesh, self._grid, self._guidance.scale(text))
        key = jax.random.fold_in(self._key, _NOISES + noise) if noise else self._key
        return sample(base, lora, condition, negative, key, jnp.asarray(rows))


def case_numbers(verdicts: Sequence[Verdict]) -> Int[np.ndarray, " n"]:
    """The number of each verdict's case, from 0: those on a task's clips from several noises have the same.

    A verdict of noise 0 begins a case: the same task in another run's verdicts, behind these, is another one.
    """
    last: dict[str, int] = {}
    numbers, count = [], 0
    for verdict in verdicts:
        if not verdict.noise or verdict.id not in last:
            last[verdict.id], count = count, count + 1
        numbers.append(last[verdict.id])
    return np.array(numbers, int)


def scores_of(verdicts: Sequence[Verdict], measures: Measures = _USUAL) -> np.ndarray:
    """The scores [n, questions] of verdicts; NaN where there is none."""
    scores = [[v.scores[question] for question in measures.questions] for v in verdicts]
    return np.array(scores, np.float64).reshape(-1, len(measures.questions))


def summarise(name: str, verdicts: Sequence[Verdict], measures: Measures = _USUAL) -> dict[str, Any]:
    """One row of the table: the measures over cases, their number `n`, and `ci95` of each.

    Clips on which the benchmark could not answer a question are left out, and counted in `invalid`. A case counts as
    its mean over the others, and not where there are none. `clips` is their number where it is not that of cases.
    """
    scores, numbers = scores_of(verdicts, measures), case_numbers(verdicts)
    valid = np.isfinite(scores).all(axis=1)
    scores = scores[valid]
    cases, numbers, sizes = np.unique(numbers[valid], return_inverse=True, return_counts=True)
    count = len(cases)
    row: dict[str, Any] = {"name": name, "n": count, "invalid": int((~valid).sum())}
    if len(scores) != count:
        row["clips"] = len(scores)
    if not count:
        return row | dict.fromkeys(measures.names) | {"ci95": {}}
    intervals = {}
    for measure in measures.names:
        values = np.bincount(numbers, weights=measures.values(scores, measure)) / sizes
        row[measure], *intervals[measure] = metrics.score_interval(values)
    row["ci95"] = {k: [float(x) for x in v] for k, v in intervals.items()}
    return row


def said(row: Mapping[str, Any], measures: Measures = _USUAL) -> str:
    """A row's rates as one line: "task 97.9 %, ..."."""
    return ", ".join(f"{measures.label(m)} {_rate(row[m])}" for m in measures.names)


def _rate(value: float | None) -> str:
    return "–" if value is None else console.percent(value)


def breakdown(name: str, verdicts: Sequence[Verdict], by: str, measures: Measures = _USUAL) -> list[dict[str, Any]]:
    """One row for each value of the verdicts' field `by` ("kind" or "agent"), with the value as `group`.

    Values with the same `grouping_key` are one, by its commonest spelling.
    """
    spelt: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    groups: dict[str, list[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        value = getattr(verdict, by)
        key = grouping_key(value)
        spelt[key][value] += 1
        groups[key].append(verdict)
    names = {key: min(counts, key=lambda value: (-counts[value], value)) for key, counts in spelt.items()}
    return [
        summarise(name, groups[key], measures) | {"group": names[key]} for key in sorted(groups, key=names.__getitem__)
    ]


def markdown(rows: Sequence[dict[str, Any]], first: Sequence[str] = ("name",), measures: Measures = _USUAL) -> str:
    """A Markdown table of rows from `summarise`, with 95 % intervals."""
    columns = measures.names
    lines = ["| " + " | ".join((*first, *map(measures.label, columns), "n")) + " |"]
    lines.append("|" + "---|" * (len(first) + len(columns) + 1))
    for row in rows:
        cells = [NAMES.get(str(row[f]), str(row[f])) for f in first]
        for column in columns:
            if row[column] is None:
                cells.append("–")
                continue
            low, high = row["ci95"][column]
            cells.append(console.percent_interval(row[column], low, high))
        lines.append("| " + " | ".join([*cells, str(row["n"])]) + " |")
    return "\n".join(lines)
