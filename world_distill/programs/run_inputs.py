"""What a training run reads, opened before the run claims its folder: the quick things first, then the weights.

A call with a wrong path or another model's records ends here, in seconds, and leaves the folder free for the right one.
"""

import contextlib
import dataclasses
import pathlib

import jax
from ml_collections import ConfigDict

from world_distill import build, console
from world_distill.data.records.batches import TaskBatches, task_batches
from world_distill.data.records.fit import check_clips, check_fit
from world_distill.data.records.negative import load_negative
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.devices import hosts
from world_distill.errors import UserError
from world_distill.evaluation.held_out import HeldOut, make_held_out
from world_distill.evaluation.scoring import Evaluator
from world_distill.interfaces import Judge
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import Rubric
from world_distill.settings.loading import to_json
from world_distill.structs import PyTree, Texts
from world_distill.training import run_folder
from world_distill.training.collect import check_reward
from world_distill.training.step_programs import Programs, make_programs
from world_distill.weights import base_model
from world_distill.weights.lora_layouts import check_targets


@dataclasses.dataclass
class RunInputs:
    """The parts of a run before its first step.

    Attributes:
      mesh: devices.
      programs: compiled when they are called.
      reader: the records to learn from.
      tasks: draws of them.
      base: the frozen weights, on the mesh.
      negative: states of the text that guidance leads away from, if any guidance is on.
      judge: who rewards; None without RL.
      rubric: the judge's questions; a run that began with others goes on with those.
      held_out: a second judge that is asked at evaluation only; None: none.
      cache: the judges' answers; None where nobody is asked, or where nothing may be written.
      evaluator: what samples and scores validation tasks; None: never.
      validation: records for that.
      opened: caches, to be closed when the run ends.
    """

    mesh: jax.sharding.Mesh
    programs: Programs
    reader: RecordReader
    tasks: TaskBatches
    base: PyTree
    negative: Texts | None
    judge: Judge | None
    rubric: Rubric
    held_out: HeldOut | None
    cache: JudgmentCache | None
    evaluator: Evaluator | None
    validation: RecordReader | None
    opened: contextlib.ExitStack


def open_inputs(config: ConfigDict, workdir: pathlib.Path, *, writes: bool = True) -> RunInputs:
    """Opens all that a run reads. Writes nothing into its folder but, with `writes`, the cache of judgments.

    Raises:
      UserError: the folder is another run's, or settings do not fit together.
      RecordError: records that are missing, damaged, or of another model.
    """
    run_folder.check_folder(config, workdir)
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    if config.executor.rank:
        check_targets(family)
    for note in family.training_notes(config.executor.rank or None):
        console.warn(f"warning: {note}")
    reader, validation = _records(config, workdir)
    for records in filter(None, (reader, validation)):
        check_fit(records, family, base_model.origin(config.base))
    programs = make_programs(config, mesh)
    run_folder.check_start(config, workdir, family, programs.state)
    fine_tunes = programs.objective.sft
    if fine_tunes:
        check_clips(reader, family)
    settings = programs.rollout_settings
    hosts.agree("config", to_json(config))
    hosts.agree("set of records", reader.fingerprint)
    lengths = build.text_lengths(family, config)
    tasks = task_batches(
        reader, tasks_per_step=settings.tasks, seed=config.seed, lengths=lengths, solutions=not fine_tunes
    )
    negative = load_negative(reader, programs.guidance, lengths, mesh)
    judge = build.make(config, "judge") if settings.questions and programs.objective.rl != "none" else None
    rubric = build.make_rubric(config, judge=judge)
    if judge is not None:
        check_reward(judge, rubric, settings)
    if config.judge.controls and judge is None:
        raise UserError(
            f"config.judge.controls = {config.judge.controls} has no effect where no judge is asked (objective.rl = "
            f"{config.objective.rl}): set it to 0"
        )
    asked = judge is not None or config.held_out.factory
    with contextlib.ExitStack() as opened:
        cache = opened.enter_context(run_folder.open_cache(config, workdir)) if asked and writes else None
        held_out = make_held_out(config, settings.questions, judge, cache)
        run_folder.test_judge(judge)
        run_folder.test_judge(held_out and held_out.judge)
        evaluator = None
        if validation is not None:
            benchmark = opened.enter_context(run_folder.open_benchmark(config, workdir, writes=writes))
            evaluator = run_folder.make_evaluator(config, family, mesh, benchmark)
            evaluator.negative(validation, "task")  # one that is missing is missed now
        base = base_model.load_base(family, config, mesh)
        return RunInputs(
            mesh, programs, reader, tasks, base, negative, judge=judge, rubric=rubric, held_out=held_out, cache=cache,
            evaluator=evaluator, validation=validation, opened=opened.pop_all(),
        )  # fmt: skip


def _records(config: ConfigDict, workdir: pathlib.Path) -> tuple[RecordReader, RecordReader | None]:
    """The records to learn from, and those to look at meanwhile."""
    folder = run_folder.data_folder(config, workdir)
    try:
        reader = RecordReader(folder, config.train_set, clips=config.objective.kind == "sft")
    except RecordError as error:
        raise RecordError(
            f"{error}. Records come from `world-distill encode`; --config.data says in which folder they are, and"
            " --config.train_set which of its sets is learnt from"
        ) from error
    if not config.evaluate_every:
        return reader, None
    try:
        return reader, RecordReader(folder, "validation")
    except RecordError as error:
        raise RecordError(
            f"config.evaluate_every = {config.evaluate_every} looks at validation records, and {error}. Split some off"
            " (`world-distill encode --validation 0.02`), or take --config.evaluate_every=0"
        ) from error
