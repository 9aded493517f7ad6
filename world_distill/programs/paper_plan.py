"""What `reproduce` would run, and what is left of its cost: steps, forward passes and questions to judges."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from world_distill import build
from world_distill.evaluation.comparison import markdown_table
from world_distill.judges.controls import CONTROLS
from world_distill.programs import equal_compute
from world_distill.programs.paper_rows import Run, Study, count_records, make_runs
from world_distill.programs.reproduce import finished
from world_distill.settings.loading import section
from world_distill.settings.objective import Objective
from world_distill.settings.rollout import RolloutSettings

# What is counted, and what the table calls it.
COLUMNS = {
    "training": "forwards of training", "sampling": "forwards of clips", "clips": "clips scored",
    "rewards": "questions of rewards", "benchmark": "questions of the benchmark",
}  # fmt: skip


def plan(study: Study) -> list[dict[str, Any]]:
    """One entry for each run: its steps, those that are saved, whether it is finished, and the costs in `COLUMNS`.

    Costs are those that are left. A forward is of one clip, and a backward pass counts as two. Answers that a cache
    holds cost nothing, so there may be fewer questions. Nothing is run or written.

    Raises:
      UserError: see `make_runs`.
    """
    found, shown = [], set()
    for run in make_runs(study):
        done = finished(run, study) is not None
        saved = run.steps if done else min(_saved(run.folder), run.steps)
        entry = {"row": run.row, "seed": run.seed, "steps": run.steps, "saved": saved, "finished": done}
        entry |= dict.fromkeys(COLUMNS, 0) if done else _costs(run, study, saved)
        if run.shown is not None and not done and run.shown[0] not in shown and not saved:
            shown.add(run.shown[0])
            entry["sampling"] += _demonstration(run.shown[1])
        found.append(entry)
    return found


def _saved(folder: pathlib.Path) -> int:
    """The newest checkpoint's step; 0 where there is none in the folder."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def _costs(run: Run, study: Study, saved: int) -> dict[str, float]:
    config = run.config
    objective, settings = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    count = count_records(config, study.split)
    clips = study.noises * min(study.limit or count, count)
    training, rewards, looked_at = 0.0, 0, 0
    if run.trains:
        training = equal_compute.run_forwards(config, saved)
        rewarded = sum(objective.rl_active(step) for step in range(saved, config.steps))
        rewards = rewarded * settings.tasks * settings.group_in(True) * len(settings.questions)
        if not saved:
            rewards += config.judge.controls * len(CONTROLS) * len(settings.questions)
        looked_at = _evaluations(config, saved) * _validated(config)
    scale = config.demonstrator.guidance if run.role == "demonstrator" else settings.guidance
    return {
        "training": training,
        "sampling": config.sampler.steps * (clips * _passes(scale) + looked_at * _passes(settings.guidance)),
        "clips": clips,
        "rewards": rewards,
        "benchmark": (clips + looked_at) * _questions(config),
    }


def _passes(scale: float) -> int:
    """Forward passes of a velocity with guidance of this scale."""
    return 2 if scale > 1 else 1


def _demonstration(by: Run) -> int:
    """Forward passes of the Demonstrator's clips that fine-tuning learns from."""
    clips = count_records(by.config, by.config.train_set)
    return by.config.sampler.steps * clips * _passes(by.config.demonstrator.guidance)


def _evaluations(config: Any, saved: int) -> int:
    """How often training looks at the validation records."""
    every = config.evaluate_every
    return sum(step % every == 0 or step == config.steps for step in range(saved + 1, config.steps + 1)) if every else 0


def _validated(config: Any) -> int:
    count = count_records(config, "validation")
    return min(config.evaluate_tasks or count, count)


def _questions(config: Any) -> int:
    """Questions to judges about one clip; a benchmark that asks nobody has none."""
    if not config.benchmark.factory:
        return 0
    benchmark = build.make(config, "benchmark")
    return len(benchmark.questions) * len(getattr(benchmark, "judges", ()))


def table(planned: Sequence[Mapping[str, Any]]) -> str:
    """The plan as Markdown, with totals."""
    lines = [["row", "seed", "steps", "state", *COLUMNS.values()]]
    for entry in planned:
        state = "finished" if entry["finished"] else f"at step {entry['saved']}" if entry["saved"] else "to do"
        costs = [_number(entry[name]) for name in COLUMNS]
        lines.append([entry["row"], str(entry["seed"]), str(entry["steps"] or "–"), state, *costs])
    totals = [_number(sum(entry[name] for entry in planned)) for name in COLUMNS]
    steps = sum(entry["steps"] - entry["saved"] for entry in planned)
    return markdown_table([*lines, ["left in all", "", str(steps), "", *totals]])


def _number(value: float) -> str:
    return f"{value:,.0f}"
