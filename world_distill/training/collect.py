"""Collecting a batch of experience: the only place in a training step where host and device meet.

    1. roll          every task `group` times: the Executor's own rollouts (or the Demonstrator's, for off-policy)
    2. demonstrate   the Demonstrator's velocities at the visited states, and Eq. 9's reward from them; left out where
                     updates read few states, and compute the velocities there themselves
    3. judge         decoded clips on the host, answers from the cache on disk where it has them
    4. weigh         rewards to group-relative advantages, failed judgments masked

Supervised fine-tuning takes the records' clips in place of 1, and leaves 2 to 4 out.

A rollout depends on (seed, step, row) and the weights alone, so a resumed or repeated run makes the same clips, finds
their judgments in the cache, and goes on bit for bit as before.
"""

import dataclasses
import functools
import itertools
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.core import advantages
from world_distill.core.metrics import within_group_correlations
from world_distill.data.records.batches import ROLES, TaskBatch, TaskBatches
from world_distill.devices import hosts
from world_distill.devices.sharding import batch_sharding, kept_rows, rows_or_whole
from world_distill.errors import UserError
from world_distill.interfaces import Judge
from world_distill.judges.ask import has_rate, judge_clips, refuse_clip
from world_distill.judges.controls import Shown
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import Rubric
from world_distill.settings.objective import Phase
from world_distill.settings.rollout import DISTILL, RolloutSettings
from world_distill.structs import Condition, Judgment, PyTree, Texts, TrainBatch, TrainState
from world_distill.training.step_programs import Programs


class TooFewJudgments(UserError):
    """The judge failed on too many clips of a step to go on."""


class Pending(NamedTuple):
    """A step's rollouts, on their way through the device: a batch that lacks what the judge has to say."""

    step: int
    phase: Phase  # which losses have a weight
    tasks: TaskBatch
    batch: TrainBatch
    clips: jax.Array | None  # [b F H W 3] uint8, if they are to be judged
    reward: jax.Array | None  # [b] Eq. 9, if it is rewarded
    motion: jax.Array | None  # [b] see `step_programs`, if rewards are weighed
    started: float


class Judged(NamedTuple):
    """What the judge said about the clips of this process."""

    numbers: np.ndarray | None = None  # the clips' rows in the batch
    judgment: Judgment | None = None
    info: Mapping[str, float] = types.MappingProxyType({})


class Parts(NamedTuple):
    """The pieces of collecting a batch, as functions without arguments."""

    roll: Callable[[], Any]
    decode: Callable[[], Any]
    demonstrate: Callable[[], Any] | None
    judge: Callable[[], Judgment]


def check_reward(judge: Judge, rubric: Rubric, settings: RolloutSettings) -> None:
    """Raises UserError for a reward that the judge does not give, or a limit that does not fit its numbers."""
    if missing := [name for name in settings.questions if name not in rubric.names]:
        raise UserError(
            f"config.rollout.weights has {', '.join(missing)}, and the judge {judge.name} is asked for "
            f"{', '.join(rubric.names)}: give these a weight, or rename them (`measures`, or the files of the rubric)"
        )
    refuse_clip(judge, settings.clip)


def draw_tasks(settings: RolloutSettings, mesh: jax.sharding.Mesh, tasks: TaskBatches, active: bool) -> TaskBatch:
    """The tasks that this process needs of a step in which L_RL has a weight (`active`) or has none.

    Each draw has `settings.tasks` tasks. A process needs the tasks of the rollouts that its devices hold.
    """
    group = settings.group_in(active)
    count = settings.tasks * settings.group
    needed = hosts.rows_held(count, rows_or_whole(mesh, count)) // group
    return tasks.take(needed, draws=settings.group // group)


class Collector:
    """Makes `TrainBatch`es. Holds programs and settings, no weights."""

    def __init__(
        self,
        programs: Programs,
        *,
        judge: Judge | None,
        cache: JudgmentCache | None,
        rubric: Rubric | None,
        negative: Texts | None = None,
        controls: tuple[int, Callable[[Sequence[Shown]], Mapping[str, float]]] | None = None,
    ):
        """
        Args:
          programs: the run's.
          judge: whose answers are the reward; None without RL.
          cache: of its answers.
          rubric: its questions.
          negative: the text that guidance leads away from (`data.records.negative.load_negative`).
          controls: (count, ask) has up to `count` clips of the first step that is judged looked at by `ask`, which
            returns figures for that step's log (`evaluation.controls.at_start`).
        """
        self._negative, self._controls = negative, controls
        self.settings, self._judge, self.cache, self.rubric = programs.rollout_settings, judge, cache, rubric
        self._programs, self._objective = programs, programs.objective
        self._rows = batch_sharding(programs.mesh)
        self._questions = self.settings.questions if self._objective.rl != "none" else ()
        # Those of them that `clock` may put on a clock.
        self._roll, self._decode, self._demonstrate = programs.roll, programs.decode, programs.demonstrate

    def __call__(
        self, state: TrainState, base: PyTree, tasks: TaskBatch, key: jax.Array, step: int
    ) -> tuple[TrainBatch, dict[str, float]]:
        """One batch of on-policy experience for training step `step`, and host-side metrics: all of the below."""
        pending = self.begin(state.lora, base, tasks, key, step)
        return self.weigh(pending, self.judge(pending))

    def draw(self, tasks: TaskBatches, step: int) -> TaskBatch:
        """The tasks of training step `step` that this process needs."""
        return draw_tasks(self.settings, self._programs.mesh, tasks, self._objective.rl_active(step))

    def begin(self, lora: PyTree, base: PyTree, tasks: TaskBatch, key: jax.Array, step: int) -> Pending:
        """Gives the device the rollouts of training step `step`, and waits for nothing.

        Args:
          lora: the Executor that rolls.
          base: frozen weights.
          tasks: this step's, from `draw`.
          key: typed PRNG key of the run; rollouts use fold_in(key, step).
          step: finished steps.
        """
        started = time.perf_counter()
        phase = self._objective.phase(step)
        if self._objective.sft:
            return Pending(step, phase, tasks, self._of_records(tasks, phase), None, None, None, started)
        task, solution = self._conditions(tasks, phase)
        rollout = self._roll[phase.rl](lora, base, task, solution, *_key(key, step), self._negative)
        # Only clips that will be judged are decoded.
        clips = self._decode(base, rollout.latents) if phase.rl and self._questions else None
        shown = reward = None
        if self._programs.demonstrates(phase):
            shown, reward = self._demonstrate(base, rollout, solution, self._negative)
        batch = TrainBatch(
            task=task,
            solution=solution,
            latents=rollout.latents,
            states=None if self._programs.finish is None else self._programs.finish(rollout),
            demonstrator=shown if phase.anchor and self._objective.uses_visited else None,
            log_probs=rollout.log_probs if self._programs.keeps_log_probs and phase.rl else None,
            advantages=None,
            valid=None,
            negative=self._negative,
        )
        if not self._programs.rewards_distillation(phase):
            reward = None
        motion = self._programs.motion(rollout.latents) if phase.rl else None
        return Pending(step, phase, tasks, batch, clips, reward, motion, started)

    def judge(self, pending: Pending) -> Judged:
        """Has the clips judged that lie on this process. Talks to no other one, so it may run in another thread."""
        if not (pending.phase.rl and self._questions):
            return Judged()
        assert pending.clips is not None  # there are questions
        numbers, clips = hosts.own_rows(pending.clips, axes=2)
        rolled = time.perf_counter()
        judgment = self._ask(pending.tasks, clips, numbers)
        info = {"time/clips": rolled - pending.started, "time/judge": time.perf_counter() - rolled}
        health = getattr(self._judge, "health", dict)  # a judge may have figures of its own
        info |= {f"judge/{name}": value for name, value in health().items()}
        if self._controls is not None and pending.step == self._first_judged:
            count, ask = self._controls
            info |= ask(self._some_shown(pending.tasks, clips, numbers, count))
            health()  # those of the controls are not the step's
        return Judged(numbers, judgment, info)

    def weigh(self, pending: Pending, judged: Judged) -> tuple[TrainBatch, dict[str, float]]:
        """The batch, with advantages from all processes' judgments, and host-side metrics.

        Raises:
          TooFewJudgments: more of the clips have no judgment than `RolloutSettings.max_invalid` allows.
        """
        (weighed, used), info = self._weigh(pending, judged)
        place = functools.partial(hosts.place, sharding=self._rows)
        return dataclasses.replace(pending.batch, advantages=place(weighed), valid=place(used)), info

    def parts(self, state: TrainState, base: PyTree, tasks: TaskBatch, key: jax.Array, step: int) -> Parts:
        """The pieces of a call, each to be run alone (benchmarks)."""
        phase = self._objective.phase(step)
        task, solution = self._conditions(tasks, phase)
        given = state.lora, base, task, solution, *_key(key, step), self._negative
        roll = self._roll[phase.rl]
        rollout = roll(*given)
        numbers, frames = hosts.own_rows(self._decode(base, rollout.latents), axes=2)

        def demonstrate():
            return self._demonstrate(base, rollout, solution, self._negative)

        return Parts(
            roll=lambda: roll(*given),
            decode=lambda: self._decode(base, rollout.latents),
            demonstrate=demonstrate if self._programs.demonstrates(phase) else None,
            judge=lambda: self._ask(tasks, frames, numbers),
        )

    def clock(self, program: Callable[[str, Any, Callable], Any]) -> None:
        """Puts every program of a step on a clock: `devices.clock.Clock.program`."""
        self._roll = {active: program("rollout", f, lambda out: out.latents) for active, f in self._roll.items()}
        self._decode = program("decode", self._decode, lambda clips: clips)
        self._demonstrate = program("demonstrator", self._demonstrate, lambda out: out[0])

    def _conditions(self, tasks: TaskBatch, phase: Phase) -> tuple[Condition, Condition]:
        """What every rollout is told, task and solution: on each device those of its own rollouts."""
        put = self._placing(tasks, phase)
        scene = jax.tree.map(put, tasks.scene)
        task, solution = (Condition(jax.tree.map(put, tasks.texts[role]), scene) for role in ROLES)
        return task, solution

    def _of_records(self, tasks: TaskBatch, phase: Phase) -> TrainBatch:
        """The records' clips, told their tasks. A stream that they lack, which counts nowhere, is 0: its mean."""
        put = self._placing(tasks, phase)
        lacking = {
            name: np.zeros((len(tasks), *spec.shape), np.float32)
            for name, spec in self._programs.family.latents.items()
            if name not in tasks.clip and not spec.counts.any()
        }
        return TrainBatch(
            task=jax.tree.map(put, tasks.condition("task")), solution=None,
            latents=jax.tree.map(put, tasks.clip | lacking),
            states=None, demonstrator=None, log_probs=None, advantages=None, valid=None,
        )  # fmt: skip

    def _placing(self, tasks: TaskBatch, phase: Phase) -> Callable[[Any], jax.Array]:
        """A function that lays an array [tasks ...] out over the devices: on each the rows of its own rollouts."""
        group = self.settings.group_in(phase.rl)
        rows = _places(tasks, np.repeat(np.arange(tasks.count), group))
        lie = functools.partial(kept_rows, self._programs.mesh)
        return lambda x: hosts.place_rows(np.asarray(x), rows, lie((len(rows), *x.shape[1:])))

    def _ask(self, tasks: TaskBatch, clips: np.ndarray, numbers: np.ndarray) -> Judgment:
        """The judge's answers about clips; `numbers` are their rows in a batch of `group` clips of each task."""
        ids, texts, agents = self._told(tasks, numbers)
        assert self._judge is not None and self.rubric is not None  # there are questions
        return judge_clips(self._judge, self.cache, clips, texts, agents, self.rubric, self._questions, records=ids)

    def _told(self, tasks: TaskBatch, numbers: np.ndarray) -> tuple[list[str], list[str], list[str]]:
        """Ids, tasks and agents of the rollouts with these numbers."""
        of = _places(tasks, numbers // self.settings.group)
        ids, texts, agents = ([values[i] for i in of] for values in (tasks.ids, tasks.task, tasks.agent))
        return ids, texts, agents

    @functools.cached_property
    def _first_judged(self) -> int:
        """The first step in which RL has a weight: the same one for a run that was interrupted."""
        return next(step for step in itertools.count() if self._objective.rl_active(step))

    def _some_shown(self, tasks: TaskBatch, clips: np.ndarray, numbers: np.ndarray, count: int) -> list[Shown]:
        """`count` of the clips: the first of each task, then the second of each, and so on."""
        chosen = np.lexsort((numbers, numbers % self.settings.group))[:count]
        told = zip(chosen, *self._told(tasks, numbers[chosen]), strict=True)
        return [Shown(clips[i], task, agent, name) for i, name, task, agent in told]

    def _check(self, valid: np.ndarray, step: int) -> None:
        failed, limit = int((~valid).sum()), self.settings.max_invalid
        if failed > limit * len(valid):
            raise TooFewJudgments(
                f"{failed} of {len(valid)} clips of step {step + 1} have no judgment, and "
                f"config.rollout.max_invalid lets {limit:g} of them through: the warnings above say what the judge "
                "answered. Start again when it works: what was answered is in the cache"
            )

    def _weigh(self, pending: Pending, judged: Judged) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, float]]:
        """((advantages [b] float32, used [b] bool), metrics)."""
        tasks, reward, active = pending.tasks, pending.reward, pending.phase.rl
        group, count = self.settings.group_in(active), tasks.count
        rows = count * group
        info: dict[str, float] = dict(judged.info)
        scores: dict[str, np.ndarray] = {}
        valid = np.ones(rows, bool)
        if not active:
            return (np.zeros(rows, np.float32), valid), info
        if reward is not None:
            scores[DISTILL] = hosts.whole(reward).astype(np.float64)
        if judged.judgment is not None:
            mine = np.stack([judged.judgment.scores[name] for name in self._questions], axis=1)
            assert judged.numbers is not None  # it comes with them
            joined = hosts.join_rows(judged.numbers, mine, rows)
            scores |= {name: joined[:, i] for i, name in enumerate(self._questions)}
            valid &= np.isfinite(joined).all(axis=1)
            self._check(valid, pending.step)
            info |= {"judge/hits": judged.judgment.hits, "judge/misses": judged.judgment.misses}
            for name in self._questions:
                if has_rate(self._judge, name):
                    info[f"rate/{name}"] = _mean(scores[name][valid] > 0)
        groups = np.repeat(np.arange(count), group)
        settings = self.settings
        limits = dict.fromkeys(self._questions, settings.clip) if settings.clip else None
        weights = {name: weight for name, weight in settings.weights.items() if weight}
        total = advantages.combine_rewards(
            scores, weights, clip=limits, normalise=settings.normalise, groups=groups, valid=valid
        )
        weighed, used = advantages.group_advantages(
            total, groups, valid, std=settings.std, std_floor=settings.std_floor, min_valid=settings.min_valid,
            negative_scale=settings.negative_scale,
        )  # fmt: skip
        for name, values in scores.items():
            info[f"reward/{name}"] = _mean(values[valid])
        info["reward/total"] = _mean(total[valid])
        info["judge/invalid"] = float((~valid).mean())
        info["judge/used"] = float(used.mean())
        assert pending.motion is not None  # RL is active
        watched = scores | {"total": total, "motion": hosts.whole(pending.motion).astype(np.float64)}
        correlations = within_group_correlations(watched, groups, valid)
        info |= {f"within_group/{a}~{b}": value for (a, b), value in correlations.items()}
        info |= {f"reward/{k}": float(v) for k, v in advantages.group_statistics(total, groups, valid).items()}
        return (weighed, used), info


def _places(tasks: TaskBatch, numbers: np.ndarray) -> np.ndarray:
    """Where the tasks of these numbers stand in the batch of this process; of tasks that it lacks, anywhere."""
    return np.minimum(np.searchsorted(tasks.numbers, numbers), len(tasks.numbers) - 1)


def _key(key: jax.Array, step: int) -> tuple[jax.Array, jax.Array]:
    """A step's key, and the first row's number in it."""
    return jax.random.fold_in(key, step), jnp.zeros((), jnp.int32)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
