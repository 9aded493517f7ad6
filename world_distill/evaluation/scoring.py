"""Scoring a model on a record set: its clips, the benchmark's verdicts, rates with intervals.

One clip a task. The benchmark says yes or no to each question: was the task completed, did the intended agent do it, is
the clip physically and temporally consistent. `average` is the mean of the three rates, `all` the share of clips that
pass all three. Intervals are at 95 %: Wilson's for rates, a normal one for the average.

A clip depends on (seed, record, weights) alone: the same starting noise for every model that is compared. The
Demonstrator's clips, told the solution, are made with demonstrator.guidance, all others with rollout.guidance.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from world_distill import console
from world_distill.core import metrics
from world_distill.data.records.batches import Role, TaskBatch, fixed_batches
from world_distill.data.records.negative import load_negative
from world_distill.data.records.reader import RecordReader
from world_distill.devices import hosts
from world_distill.devices.sharding import batch_sharding
from world_distill.evaluation.clip_sampler import make_sampler
from world_distill.interfaces import Benchmark, ModelFamily
from world_distill.settings.guidance import Guidance
from world_distill.structs import PyTree, Texts

QUESTIONS = ("task", "agent", "consistency")
# How tables call measures and roles, as the report and README.md do; files for programs have the keys.
NAMES = {"all": "all three", "demonstrator": "Demonstrator", "executor": "Executor"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the benchmark said about one clip; NaN where it could not say."""

    id: str
    task: str
    agent: str
    kind: str
    scores: dict[str, float]


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
        keep: Callable[[str, np.ndarray], None] | None = None,
        watch: Callable[[np.ndarray, np.ndarray, Mapping[str, Sequence[str]]], None] | None = None,
    ) -> list[Verdict]:
        """Verdicts on one clip a record, the same on every process; each clip is looked at by one of them.

        Args:
          reader: encoded records.
          base: frozen weights.
          lora: the Executor; None is the base model.
          text: "task" or "solution": what the model is told.
          limit: look at the first `limit` records only; 0 takes all.
          keep: called with each record's id and its clip [F H W 3] uint8, on every process.
          watch: called with the clips [n F H W 3] of each batch that this process is to look at, their numbers in the
            batch, and `ids`, `task` and `agent` of all its records; on every process, if without clips.
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
        for number, batch in enumerate(fixed_batches(reader, self._batch, lengths=self._lengths, needed=needed)):
            first = number * self._batch
            if first >= total:
                break
            sampled = self._clips(batch, base, lora, text, np.arange(self._batch) + first, negative)
            count = min(self._batch, total - first)
            names = heads.take(range(first, first + count)) if heads is not None else None
            ids = names.id if names is not None else batch.ids[:count]
            task, agent, kind = (getattr(names or batch, name)[:count] for name in ("task", "agent", "kind"))
            own, clips = hosts.own_rows(sampled)
            own, clips = own[own < count], clips[own < count]
            if watch is not None:
                watch(clips, own, {"ids": ids, "task": task, "agent": agent})
            scores = hosts.join_rows(own, self._check(clips, own, batch), count)
            for i in range(count):
                answers: dict[str, float] = dict(zip(QUESTIONS, scores[i].tolist(), strict=True))
                verdicts.append(Verdict(ids[i], task[i], agent[i], kind[i], answers))
            if keep is not None:
                for name, clip in zip(ids, hosts.whole(sampled)[:count], strict=True):
                    keep(name, clip)
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
        """What the benchmark says [n, questions] about clips, whose numbers in the batch are `own`."""
        if not len(own):
            return np.zeros((0, len(QUESTIONS)))
        assert self._benchmark is not None  # `run` is of no use without one
        at = np.searchsorted(batch.numbers, own)
        scores = self._benchmark.check(clips, [batch.task[i] for i in at], [batch.image_png[i] for i in at])
        return np.stack([np.asarray(scores[question], np.float64) for question in QUESTIONS], axis=1)

    def _clips(
        self,
        batch: TaskBatch,
        base: PyTree,
        lora: PyTree | None,
        text: Role,
        rows: np.ndarray,
        negative: Texts | None,
    ) -> jax.Array:
        if text == "solution":
            batch.check_solutions()
        at = np.zeros(batch.count, int)  # of rows that are not held here, anything
        at[batch.numbers] = np.arange(len(batch))
        condition = jax.tree.map(lambda x: hosts.place_rows(np.asarray(x), at, self._rows), batch.condition(text))
        sample = make_sampler(self._family, self._mesh, self._grid, self._guidance.scale(text))
        return sample(base, lora, condition, negative, self._key, jnp.asarray(rows))


def summarise(name: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """One row of the table: rates, their average, `all`, the number of clips, and `ci95` of each.

    Clips on which the benchmark could not answer a question are left out, and counted in `invalid`.
    """
    scores = np.array([[v.scores[q] for q in QUESTIONS] for v in verdicts], np.float64).reshape(-1, len(QUESTIONS))
    valid = np.isfinite(scores).all(axis=1)
    scores = scores[valid]
    count = len(scores)
    row: dict[str, Any] = {"name": name, "n": count, "invalid": int((~valid).sum())}
    if not count:
        return row | dict.fromkeys((*QUESTIONS, "average", "all")) | {"ci95": {}}
    intervals = {}
    for column, question in enumerate(QUESTIONS):
        row[question] = float(scores[:, column].mean())
        intervals[question] = metrics.wilson_interval(int(scores[:, column].sum()), count)
    row["average"], *intervals["average"] = metrics.mean_interval(scores.mean(axis=1))
    passed = scores.all(axis=1)
    row["all"] = float(passed.mean())
    intervals["all"] = metrics.wilson_interval(int(passed.sum()), count)
    row["ci95"] = {k: [float(x) for x in v] for k, v in intervals.items()}
    return row


def said(row: Mapping[str, Any]) -> str:
    """A row's rates as one line: "task 97.9 %, ..."."""
    return ", ".join(f"{NAMES.get(m, m)} {_rate(row[m])}" for m in (*QUESTIONS, "average", "all"))


def _rate(value: float | None) -> str:
    return "–" if value is None else console.percent(value)


def breakdown(name: str, verdicts: Sequence[Verdict], by: str) -> list[dict[str, Any]]:
    """One row for each value of the verdicts' field `by` ("kind" or "agent"), with the value as `group`."""
    values = sorted({getattr(v, by) for v in verdicts})
    return [summarise(name, [v for v in verdicts if getattr(v, by) == value]) | {"group": value} for value in values]


def markdown(rows: Sequence[dict[str, Any]], first: Sequence[str] = ("name",)) -> str:
    """A Markdown table of rows from `summarise`, with 95 % intervals."""
    columns = (*QUESTIONS, "average", "all")
    lines = ["| " + " | ".join((*first, *(NAMES.get(c, c) for c in columns), "n")) + " |"]
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
