"""`world-distill evaluate`: the benchmark's rates for the roles of a run (protocol of WorldTasks-Bench)."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from world_distill import build
from world_distill.data.records.fit import check_fit
from world_distill.data.records.reader import RecordReader
from world_distill.evaluation import held_out
from world_distill.evaluation.scoring import Verdict, breakdown, markdown, summarise
from world_distill.reports import report
from world_distill.storage import atomic
from world_distill.training import run_folder
from world_distill.weights import base_model

ROLES = ("base", "demonstrator", "executor")


def evaluate(
    workdir: pathlib.Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    roles: Sequence[str] = ROLES,
    split: str = "test",
    limit: int = 0,
) -> dict[str, Any]:
    """Scores the roles of a run's folder; returns rows, breakdowns, held-out figures and verdicts.

    Args:
      workdir: the run's folder.
      overrides: changes to settings that may change after training (`run_folder.FREE_KEYS`).
      roles: which of `ROLES`.
      split: record set to score on.
      limit: look at the first tasks only; 0 looks at all.

    Raises:
      UserError: the folder holds no run, or an override is of another value.
      RecordError: the records are missing or damaged.
    """
    opened = run_folder.open_run(workdir, overrides)
    with run_folder.open_held_out(opened.config, workdir) as audit:
        return evaluate_roles(opened, roles=roles, split=split, limit=limit, audit=audit)


def tables(result: Mapping[str, Any]) -> str:
    """The figures of `evaluate` as Markdown: all tasks, by kind, by agent, and the held-out judge's."""
    found = [markdown(result["rows"])]
    for by in ("kind", "agent"):
        found.append(markdown(result[f"by_{by}"], first=("group", "name")))
    if result["held_out"]:
        found.append(held_out.markdown(result["held_out"]))
    return "\n\n".join(found)


def write(workdir: pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path:
    """Writes evaluation.json, evaluation.md and evaluation.html into the run's folder; returns the page's path."""
    atomic.write_json(workdir / "evaluation.json", result)
    atomic.write_text(workdir / "evaluation.md", tables(result) + "\n")
    return report.build(workdir, workdir / "evaluation.html")


def evaluate_roles(
    opened: run_folder.Run,
    *,
    roles: Sequence[str],
    split: str,
    limit: int = 0,
    keep: Callable[[str, str, np.ndarray], None] | None = None,
    audit: held_out.HeldOut | None = None,
) -> dict[str, Any]:
    """Rows and breakdowns for each role of an opened run (`run_folder.open_run`).

    `keep(role, record id, clip)` sees every clip, and so does `audit`, whose figures are in `held_out` by role, with
    gaps against the first one.
    """
    config = opened.config
    reader = RecordReader(opened.data, split)
    check_fit(reader, opened.family, base_model.origin(config.base))
    evaluator = opened.evaluator(build.make(config, "benchmark"))
    verdicts: dict[str, list[Verdict]] = {}
    audited: dict[str, dict[str, float]] = {}
    for role in roles:
        seen = None if keep is None else (lambda record, clip, role=role: keep(role, record, clip))
        verdicts[role] = evaluator.run(
            reader,
            opened.base,
            opened.executor if role == "executor" else None,
            text="solution" if role == "demonstrator" else "task",
            limit=limit,
            keep=seen,
            watch=audit and audit.watch,
        )
        if audit is not None:
            audited[role] = audit.take(next(iter(audited.values()), None))
    return {
        "split": split,
        "seed": config.seed,
        "step": opened.step,
        "rows": [summarise(role, verdicts[role]) for role in roles],
        "by_kind": [row for role in roles for row in breakdown(role, verdicts[role], "kind")],
        "by_agent": [row for role in roles for row in breakdown(role, verdicts[role], "agent")],
        "held_out": audited,
        "verdicts": {role: [dataclasses.asdict(v) for v in verdicts[role]] for role in roles},
    }
