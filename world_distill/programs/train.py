"""`world-distill train`: one loop for distillation, RL, both (WMSD) and fine-tuning, for every model family.

    for every step:
        collect     the Executor's rollouts, judged and weighed        (collect.py)
        train_step  a pure function of (state, base, batch)            (training/step.py)

A run is a folder: `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `judgments.sqlite`. Called again on
its folder, it continues from the newest checkpoint, bit for bit as if it had not stopped.
"""

import contextlib
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from world_distill import console
from world_distill.devices import hosts
from world_distill.devices.clock import UPDATE, Clock
from world_distill.devices.interruption import Interruption
from world_distill.devices.profiler import Profiler
from world_distill.errors import UserError
from world_distill.evaluation.controls import at_start
from world_distill.evaluation.held_out import audit
from world_distill.evaluation.scoring import summarise
from world_distill.judges.ask import begun_rubric, note_other_rubrics
from world_distill.programs.run_inputs import open_inputs
from world_distill.storage.checkpoints import Checkpointer, make_metadata
from world_distill.storage.metric_log import MetricLog
from world_distill.training import run_folder
from world_distill.training.balance import Balance
from world_distill.training.collect import Collector, TooFewJudgments
from world_distill.training.prefetch import Experience


def train(
    config, workdir: pathlib.Path, *, stem: pathlib.Path | None = None, profile: frozenset[int] = frozenset()
) -> dict[str, Any]:
    """Runs (or continues) training.

    Args:
      config: all settings.
      workdir: the run's folder.
      stem: folder of a run to branch off, at its newest checkpoint, where `workdir` has none yet. That its steps are
        those that this config would have made is the caller's word.
      profile: steps to trace (`devices.profiler`).

    Returns:
      steps, seconds, and `validation`: the last row of rates on the validation records (None if never evaluated).

    Raises:
      UserError: another run's folder, one in which another process trains, or settings that do not fit together.
      RecordError: records that are missing or damaged.
      FloatingPointError: a loss that is not finite; the step and its tasks are named.
      TooFewJudgments: the judge failed too often; what was trained is saved.
      Preempted: SIGTERM; what was trained is saved.
    """
    with contextlib.ExitStack() as held:
        return _train(config, workdir, stem, profile, held)


def _train(
    config, workdir: pathlib.Path, stem: pathlib.Path | None, profile: frozenset[int], held: contextlib.ExitStack
) -> dict[str, Any]:
    started = time.perf_counter()
    inputs = open_inputs(config, workdir)
    if hosts.is_main():  # which process this is, is known only now
        held.enter_context(run_folder.hold(workdir))
    mesh, programs, base, tasks, cache = inputs.mesh, inputs.programs, inputs.base, inputs.tasks, inputs.cache
    family, objective, collection = programs.family, programs.objective, programs.rollout_settings

    # State: the newest checkpoint, or a fresh Executor --------------------------------------------------------------
    metadata = make_metadata(run_folder.fixed_settings(config))
    checkpointer = Checkpointer(
        run_folder.checkpoint_folder(config, workdir), keep=config.keep, save_every=config.save_every
    )
    restored = checkpointer.restore_latest(programs.state, expect=metadata, translate=run_folder.todays_settings)
    if restored is None and stem is not None:
        with Checkpointer(stem / "checkpoints") as source:
            restored = source.restore_latest(programs.state)
        if restored is None:
            raise UserError(f"{stem} holds no checkpoint to branch off")
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copy(stem / "metrics.jsonl", workdir)
    if restored is None:
        state = programs.init(base, config.seed)
        if config.executor.start:
            state = run_folder.start_from_file(config.executor.start, config, family, state)
    else:
        state, iterator_state, _ = restored
        tasks.set_state(iterator_state)
    first = int(state.step)
    if first >= config.steps:
        console.say(f"{workdir} is trained to step {first}: for more, raise --config.steps")
    elif restored is not None:
        console.say(f"continuing {workdir} after step {first}")
    profiler = Profiler(workdir / "profile", profile, first=first + 1, last=config.steps)
    rubric = inputs.rubric
    if cache is not None and inputs.judge is not None:
        if restored is not None and not config.judge.rubric and not config.judge.cache:
            rubric = begun_rubric(cache, rubric)  # the reward's wording is part of what is trained
        note_other_rubrics(cache, rubric, held_out=inputs.held_out and inputs.held_out.rubric)
    controls = None
    if config.judge.controls and inputs.judge is not None and hosts.is_main():
        ask = at_start(inputs.judge, cache, rubric, collection.questions, workdir)
        controls = config.judge.controls, ask
    collector = Collector(
        programs, judge=inputs.judge, cache=cache, rubric=rubric, negative=inputs.negative, controls=controls
    )
    evaluator, validation, held_out = inputs.evaluator, inputs.validation, inputs.held_out
    run_folder.claim_folder(config, workdir)

    # The loop -------------------------------------------------------------------------------------------------------
    log = MetricLog(workdir, first) if hosts.is_main() else None
    row = None
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    progress = console.Progress(
        "step", config.steps, done=first, every=config.log_every, shown=hosts.is_main() and first < config.steps
    )
    waiting: list[tuple] = []

    def settle() -> None:
        """Fetches and logs the oldest step's metrics; the device is busy with a later step meanwhile."""
        step, info, metrics, ids = waiting.pop(0)
        values = {**info, **jax.device_get(metrics)}
        values = {name: float(value) for name, value in values.items()}
        values["train/forwards"] = programs.forwards(objective.phase(step - 1))
        balance.watch(step, values)
        bad = [n for n in ("train/gradient_norm", "train/lora_norm") if not np.isfinite(values[n])]
        if bad:
            raise FloatingPointError(
                f"{' and '.join(bad)} not finite in step {step}; its tasks: {', '.join(ids)}. "
                f"The last checkpoint in {checkpointer.directory} is good."
            )
        values |= clock.figures(step)
        if log is None:
            return
        log.write(step, values)
        progress.at(step, figures=_short(values))

    balance = Balance()
    rows = collection.tasks * collection.group
    clock = Clock(
        devices=mesh.devices.size, tokens=rows * family.tokens, started=started,
        first_call=lambda name: progress.note(f"compiling {name}"),
    )  # fmt: skip
    collector.clock(clock.program)
    updates = {
        phase: clock.program(UPDATE, f, lambda out: out[1]["train/lora_norm"]) for phase, f in programs.update.items()
    }
    experience = Experience(collector, tasks, base, key, steps=config.steps)
    interruption = Interruption()
    try:
        interruption.watch()
        for step in range(first, config.steps):
            profiler.before(step + 1, clock)
            with clock.turn(step + 1):
                try:
                    batch, info, ids = experience.take(state, step)
                except TooFewJudgments:
                    while waiting:
                        settle()
                    checkpointer.save(step, state, experience.data_state(step), metadata, force=True)
                    raise
                state, metrics = updates[objective.phase(step)](state, base, batch)
                waiting.append((step + 1, info, metrics, ids))
                last = step + 1 == config.steps
                stops = interruption.asked(step + 1) and not last
                saves = last or stops or (step + 1) % config.save_every == 0
                evaluates = evaluator is not None and (last or (step + 1) % config.evaluate_every == 0)
                # Nothing that is not finite gets into a checkpoint.
                while len(waiting) > (0 if saves or evaluates or profiler.borders(step + 1) else 1):
                    settle()
            profiler.after(step + 1, clock)
            if evaluates and evaluator is not None and validation is not None:
                with clock.away("evaluate"):
                    verdicts = evaluator.run(
                        validation, base, state.lora_ema, text="task", limit=config.evaluate_tasks,
                        watch=held_out and held_out.watch,
                    )  # fmt: skip
                    row = summarise("executor", verdicts, evaluator.measures)
                    rates = {f"validation/{m}": np.nan if row[m] is None else row[m] for m in evaluator.measures.names}
                    rates |= audit(held_out, workdir)
                if log is not None:
                    log.write(step + 1, rates)
            if saves:
                if cache is not None:
                    cache.sync()
                with clock.away("save"):
                    checkpointer.save(step + 1, state, experience.data_state(step + 1), metadata, force=last or stops)
            if stops:
                interruption.stop(step + 1)
    finally:
        interruption.close()
        profiler.close()
        experience.close()
        clock.close()
        progress.close()
        if log is not None:
            log.close()
        checkpointer.close()
        inputs.opened.close()
    return {"steps": max(first, config.steps), "seconds": time.perf_counter() - started, "validation": row}


def _short(values: dict[str, float]) -> dict[str, str]:
    """The few figures of a progress line."""
    names = {
        "sft": "train/sft",
        "anchor": "train/anchor",
        "reward": "reward/total",
        "task": "rate/task",
        "agent": "rate/agent",
        "consistency": "rate/consistency",
        "ratio": "train/ratio",
        "s": "time/step",
        "judge_s": "time/judge_wait",
        "TFLOP/s": "speed/tflops",
        "mfu": "speed/mfu",
        "goodput": "speed/goodput",
    }
    rates = ("task", "agent", "consistency", "mfu", "goodput")
    return {
        short: console.percent(values[name]) if short in rates else f"{values[name]:.3g}"
        for short, name in names.items()
        if name in values
    }
