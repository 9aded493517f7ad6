"""The method from Python: load a model, tell it what to do, roll out, judge, train. `world_distill` exports all names.

    model = wd.load("wan22_5b", base="weights/wan22-5b")
    told = model.tell("kitchen.png", task="[hand]: Pick up the cup.")
    shown = model.tell("kitchen.png", solution="A hand reaches …")
    clips = wd.rollout(model, told, steps=12, seed=0).clips

Nothing here prints, parses or writes files, but for `save_lora`. Arrays go in, arrays come out.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from world_distill import build
from world_distill.core import flow
from world_distill.data.images.decode import read_image
from world_distill.data.records.batches import Arrays, TaskBatch, pad, stack_scenes
from world_distill.data.records.encoder_calls import fit_image, scene_arrays, text_states
from world_distill.data.records.negative import pad_negative
from world_distill.errors import UserError
from world_distill.evaluation.clip_sampler import make_sampler
from world_distill.interfaces import Judge, ModelFamily
from world_distill.judges.ask import judge_clips
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import rubric_for
from world_distill.settings.defaults import to_section
from world_distill.settings.guidance import Guidance
from world_distill.settings.loading import load_config
from world_distill.settings.objective import Objective
from world_distill.settings.optimizer import OptimizerSettings
from world_distill.settings.rollout import RolloutSettings
from world_distill.structs import Condition, Judgment, PyTree, Texts, TrainState
from world_distill.training.collect import Collector, check_reward
from world_distill.training.step_programs import make_programs
from world_distill.weights.base_model import load_base
from world_distill.weights.lora_files import load_lora, write_lora
from world_distill.weights.lora_layouts import LoraModel

_AGENT = re.compile(r"\s*\[([^\[\]]+)\]")


@dataclasses.dataclass(frozen=True, eq=False)
class Told:
    """What a model is told about one clip: a scene and a task, or a scene and a solution. Made by `Model.tell`."""

    role: Literal["task", "solution"]
    text: str
    agent: str  # who is to act, from the task's `[agent]:`; "" where the text names none
    scene: Arrays  # of one image, by name
    states: Arrays  # text-encoder states [l d] by name, true length


class Clips(NamedTuple):
    """Clips of `rollout`."""

    clips: np.ndarray  # [b F H W 3] uint8
    fps: float


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model family with its frozen base, on this machine's devices. Made by `load`."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    family: ModelFamily
    base: PyTree

    def tell(
        self,
        image: str | os.PathLike | np.ndarray,
        *,
        task: str | None = None,
        solution: str | None = None,
        agent: str | None = None,
    ) -> Told:
        """What the model is told: the scene in `image` ([H W 3] uint8, or a file) and a task or a solution.

        Encodes both. A task is `[agent]: imperative.`; `agent` names who is to act where the text does not.

        Raises:
          ValueError: not exactly one text is given, or it is longer than `config.text_length` tokens.
          ImageError: the file is no image that can be read.
        """
        if (task is None) == (solution is None):
            raise ValueError("tell takes either a task or a solution")
        role: Literal["task", "solution"] = "task" if solution is None else "solution"
        text = task if solution is None else solution
        assert text is not None  # as just checked
        encoders = self.family.encoders
        pixels = image if isinstance(image, np.ndarray) else read_image(pathlib.Path(image))
        if encoders.image_size is not None:
            pixels = fit_image(pixels, encoders.image_size)
        (states,) = text_states([text], encoders.text)
        for key, length in self.text_lengths.items():
            if len(states[key]) > length:
                raise ValueError(f"the {role} has {len(states[key])} tokens, and config.text_length is {length}")
        named = _AGENT.match(text)
        name = agent if agent is not None else named[1].strip() if named else ""
        scene = scene_arrays(pixels, lambda images: encoders.scene(self.base, images))
        return Told(role, text, name, scene, states)

    def negative(self, text: str) -> Texts:
        """The states of a text that guidance leads away from."""
        (states,) = text_states([text], self.family.encoders.text)
        return pad_negative(states, self.text_lengths)

    @property
    def text_lengths(self) -> dict[str, int]:
        """Tokens that texts are padded to, by the name of their states."""
        return build.text_lengths(self.family, self.config)


def load(config: str | ConfigDict, *, base: str = "", overrides: Mapping[str, Any] | None = None) -> Model:
    """A model family with its base weights, placed on the mesh of the config.

    Args:
      config: a config, or its name as after `--config`.
      base: weights, named as in `config.base`. Empty: those that the config names.
      overrides: dotted keys of the config to values.

    Raises:
      UserError: no such config, key or weights, or weights of another model.
    """
    if isinstance(config, str):
        config = load_config(config, dict(overrides or {}))
    elif overrides:
        raise ValueError("overrides go with the name of a config; change a ConfigDict itself")
    if base:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.base = base
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    return Model(config, mesh, family, load_base(family, config, mesh))


def rollout(
    model: Model,
    told: Told | Sequence[Told],
    *,
    executor: PyTree | str | os.PathLike | None = None,
    steps: int | None = None,
    shift: float | None = None,
    guidance: float = 1.0,
    negative: str = "",
    seed: int = 0,
) -> Clips:
    """Clips of what the model is told, one each, by the ODE sampler. Clip i starts from the noise of (seed, i).

    Args:
      model: of `load`.
      told: of `Model.tell`; all tasks or all solutions.
      executor: trained weights (`state.lora_ema`) or a LoRA file; None is the base.
      steps: of the sampler; None takes the config's sampler.
      shift: of the sampler's times; None takes the config's.
      guidance: scale of classifier-free guidance; 1: none.
      negative: text that guidance leads away from.
      seed: of the noise.
    """
    rows = [told] if isinstance(told, Told) else list(told)
    if isinstance(executor, (str, os.PathLike)):
        executor = load_lora(executor, model.family, model.mesh)
    given = model.config.sampler
    explicit = given.explicit if steps is None and shift is None else ()
    times = flow.sampling_times(steps or given.steps, given.shift if shift is None else shift, explicit or None)
    sample = make_sampler(model.family, model.mesh, tuple(times.tolist()), guidance)
    away = model.negative(negative) if guidance > 1 else None
    condition = _condition(rows, model.text_lengths)
    clips = sample(model.base, executor, condition, away, jax.random.key(seed), np.arange(len(rows), dtype=np.int32))
    return Clips(np.asarray(clips), model.family.fps)


def judge(
    judge: Judge,
    clips: np.ndarray,
    told: Told | Sequence[Told],
    *,
    rubric: str = "",
    fps: float = 0.0,
    cache: JudgmentCache | None = None,
) -> Judgment:
    """The judge's answers about clips [b F H W 3] uint8, with `scores` [b] by question: log p(yes) - log p(no).

    Args:
      judge: such as `ServerJudge`.
      clips: of `rollout`.
      told: the tasks of the clips; one for all, or one each.
      rubric: folder of question files; empty: those that ship with the package.
      fps: frames a second of the clips, from which the questions tell how long they are; 0: they tell frames alone.
      cache: where answers are looked up and stored; None asks about everything.

    Raises:
      ValueError: a solution in place of a task, or another number of tasks than of clips.
    """
    rows = [told] * len(clips) if isinstance(told, Told) else list(told)
    if any(row.role != "task" for row in rows):
        raise ValueError("a judge is asked about the task: give what model.tell(image, task=...) made")
    questions = rubric_for(judge, rubric, fps=fps)
    tasks, agents = [row.text for row in rows], [row.agent for row in rows]
    return judge_clips(judge, cache, clips, tasks, agents, questions, questions.names)


class Trainer:
    """The training step of the method, with `init` and `step`: states go in, states come out.

    A step rolls `rollout.group` clips of every task, has them judged, and makes `objective.updates` optimiser updates.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective | None = None,
        rollout: RolloutSettings | None = None,
        judge: Judge | None = None,
        *,
        optimizer: OptimizerSettings | None = None,
        rubric: str = "",
        cache: JudgmentCache | None = None,
    ):
        """Compiles nothing yet.

        Args:
          model: of `load`.
          objective: settings of the losses; None takes those of the model's config, as the other two.
          rollout: settings of the rollouts. `tasks` and `spread` have no effect: a step takes the given tasks.
          judge: whose answers are the reward; None where no loss needs them.
          optimizer: settings of the optimiser.
          rubric: folder of question files; empty: those that ship with the package.
          cache: where the judge's answers are looked up and stored; None asks about everything.

        Raises:
          ValueError: settings that do not go together, RL without a judge, or fine-tuning, which reads records.
          UserError: rewards that this judge does not give.
        """
        config = model.config.copy_and_resolve_references()
        with config.unlocked():
            for name, given in (("objective", objective), ("rollout", rollout), ("optimizer", optimizer)):
                if given is not None:
                    config[name] = to_section(given)
            config.rollout.spread = False
        self.model = model
        self.programs = make_programs(config, model.mesh)
        if self.programs.objective.sft:
            raise ValueError("objective.kind = sft learns from clips of records: use `world-distill train`")
        settings, rl = self.programs.rollout_settings, self.programs.objective.rl
        if rl != "none" and settings.questions and judge is None:
            raise ValueError(f"objective.rl = {rl} with rewards {', '.join(settings.questions)} needs a judge")
        scales, rewards = Guidance.of(config), judge if rl != "none" else None
        asked = rubric_for(rewards, rubric, fps=model.family.fps)
        if rewards is not None:
            check_reward(rewards, asked, settings)
        self._collector = Collector(
            self.programs, judge=rewards, cache=cache, rubric=asked,
            negative=model.negative(scales.negative) if scales.used else None,
        )  # fmt: skip

    def init(self, seed: int = 0) -> TrainState:
        """The first state: an Executor that equals the base, and fresh averages and moments."""
        return self.programs.init(self.model.base, seed)

    def step(self, state: TrainState, pairs: Sequence[tuple[Told, Told]]) -> tuple[TrainState, dict[str, float]]:
        """One training step on (task, solution) pairs: (next state, metrics). The given state's buffers are given away.

        Rollouts depend on (state.key, state.step, row) alone.

        Raises:
          ValueError: pairs that are not (task, solution), or rows that do not divide by `objective.minibatches`.
          TooFewJudgments: the judge failed too often.
        """
        if any((task.role, solution.role) != ("task", "solution") for task, solution in pairs):
            raise ValueError(
                "a step takes (task, solution) pairs, of model.tell(task=...) and model.tell(solution=...)"
            )
        group, parts = self.programs.rollout_settings.group, self.programs.objective.minibatches
        rows = len(pairs) * group
        if not rows or rows % parts:
            raise ValueError(
                f"{len(pairs)} pairs with {group} rollouts each are {rows} rows, which do not divide by"
                f" objective.minibatches = {parts}"
            )
        number = int(state.step)
        key = jax.random.fold_in(state.key, 3)
        batch, info = self._collector(state, self.model.base, self._tasks(pairs), key, number)
        update = self.programs.update[self.programs.objective.phase(number)]
        state, metrics = update(state, self.model.base, batch)
        return state, {name: float(value) for name, value in {**info, **jax.device_get(metrics)}.items()}

    def _tasks(self, pairs: Sequence[tuple[Told, Told]]) -> TaskBatch:
        tasks, solutions = zip(*pairs, strict=True)
        count, lengths = len(pairs), self.model.text_lengths
        ids = [f"{i}" for i in range(count)]
        return TaskBatch(
            ids=ids,
            image_ids=ids,
            task=[told.text for told in tasks],
            solution=[told.text for told in solutions],
            agent=[told.agent for told in tasks],
            kind=[""] * count,
            image_png=[b""] * count,
            scene=stack_scenes([told.scene for told in tasks]),
            texts={
                role: pad([row.states for row in told], lengths)
                for role, told in (("task", tasks), ("solution", solutions))
            },
            numbers=np.arange(count),
            count=count,
            weight=np.ones(count, np.float32),
        )


def save_lora(
    model: Model, executor: PyTree, path: str | os.PathLike, *, layout: Literal["diffusers", "comfy"] = "comfy"
) -> None:
    """Writes an Executor (`state.lora_ema`) as a LoRA file: "comfy" for ComfyUI and diffusers, or "diffusers".

    Raises:
      UserError: a family without published weights.
      ValueError: full weights, which are no LoRA.
    """
    if model.family.published is None:
        raise UserError(f"model family {model.family.name} has no published layout to export to")
    host = jax.device_get(executor)
    write_lora(path, host, LoraModel.of(model.family), scale=model.family.lora_scale, layout=layout)


def _condition(rows: Sequence[Told], lengths: Mapping[str, int]) -> Condition:
    if len({row.role for row in rows}) != 1:
        raise ValueError("clips of one call are all told tasks, or all told solutions, and at least one")
    scenes: Any = stack_scenes([row.scene for row in rows])  # the programs place it
    return Condition(pad([row.states for row in rows], lengths), scenes)
