"""The batches of a run's steps, in their order: on-policy, or one step ahead of the updates.

    rollout.staleness 0    roll k, judge k, update k, roll k + 1, ...
    rollout.staleness 1    the device:  roll k + 1, update k, roll k + 2, update k + 1, ...
                           a thread:    judge k + 1 from when its clips are there, to when update k + 1 wants them

With 1, the judge has the time of an update and of a rollout, and the clips of a step are made by the Executor of a step
ago (`TrainState.lora_rolled`), which the ratio of the RL loss accounts for. A run that stops between two steps rolls
the later one again when it continues: the same clips, from the same weights and key, whose judgments are cached.
"""

import concurrent.futures
import time
from typing import NamedTuple

import jax

from world_distill.data.records.batches import TaskBatches
from world_distill.structs import PyTree, TrainBatch, TrainState
from world_distill.training.collect import Collector, Pending


class Step(NamedTuple):
    """What a training step reads, host-side metrics of its making, and the names of its tasks."""

    batch: TrainBatch
    info: dict[str, float]
    ids: list[str]


class Experience:
    """Draws tasks and collects batches."""

    def __init__(self, collector: Collector, tasks: TaskBatches, base: PyTree, key: jax.Array, *, steps: int):
        """`steps` is how many there are in the run: nothing is rolled beyond."""
        self._collector, self._tasks, self._base, self._key, self._steps = collector, tasks, base, key, steps
        self._states: dict[int, bytes] = {}  # of the data, before the tasks of a step are drawn
        self._begun: dict[int, tuple[list[str], Pending, concurrent.futures.Future]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "judge")

    def close(self) -> None:
        """Waits for the answers that are under way, which go into the cache."""
        self._thread.shutdown(cancel_futures=True)

    def take(self, state: TrainState, step: int) -> Step:
        """The batch of `step`, to be called for each step in turn with the state that it is to change.

        Raises:
          TooFewJudgments: see `Collector.weigh`.
        """
        self._states = {k: v for k, v in self._states.items() if k >= step}
        if not self._collector.settings.staleness:
            ids, pending = self._roll(state.lora, step)
            judged = self._collector.judge(pending)
            batch, info = self._collector.weigh(pending, judged)
            waited = {"time/judge_wait": info["time/judge"]} if "time/judge" in info else {}
            return Step(batch, info | waited, ids)
        for number, lora in ((step, state.lora_rolled), (step + 1, state.lora)):
            if number not in self._begun and number < self._steps:
                ids, pending = self._roll(lora, number)
                self._begun[number] = ids, pending, self._thread.submit(self._collector.judge, pending)
        ids, pending, job = self._begun.pop(step)
        started = time.perf_counter()
        judged = job.result()
        waited = time.perf_counter() - max(started, pending.started + judged.info.get("time/clips", 0.0))
        batch, info = self._collector.weigh(pending, judged)
        return Step(batch, info | {"time/judge_wait": max(waited, 0.0)}, ids)

    def data_state(self, step: int) -> bytes:
        """The state of the data from which the tasks of `step`, the next one or this, are drawn again."""
        return self._states.get(step) or self._tasks.get_state()

    def _roll(self, lora: PyTree, step: int) -> tuple[list[str], Pending]:
        self._states[step] = self._tasks.get_state()
        tasks = self._collector.draw(self._tasks, step)
        return tasks.ids, self._collector.begin(lora, self._base, tasks, self._key, step)
