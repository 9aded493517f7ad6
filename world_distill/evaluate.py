"""`world-distill evaluate`: the benchmark's rates for the roles of a run (protocol of WorldTasks-Bench)."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from world_distill import arguments, components, held_out, hosts, report, runs
from world_distill.config import UserError
from world_distill.data.records import RecordReader
from world_distill.scoring import Verdict, breakdown, markdown, summarise

ROLES = ("base", "demonstrator", "executor")

HELP = """\
Score models on held-out tasks: task completed, intended agent, consistency, with 95 % intervals.

Samples one clip a task for each role (base: told the task; demonstrator: told the solution; executor: told the task,
with the weights trained in WORKDIR) and has the config's benchmark check it. Prints a table and breakdowns by kind of
task and by agent, and writes evaluation.json, evaluation.md and evaluation.html into WORKDIR.

A judge in config.held_out, which never had a part in the reward, is asked about the same clips, and compared with the
judge that had: gap is by how many standard deviations the reward has risen more, against the first role. Where that is
large, look at the clips: the reward may be gamed.

  world-distill evaluate --workdir runs/mine
  world-distill evaluate --workdir runs/mine --split validation --roles executor --json scores.json
  world-distill evaluate --workdir runs/mine --config.held_out.factory=world_distill.sandbox.factories:oracle
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_workdir(parser)
    parser.add_argument("--split", default="test", help="record set to score on (default: test)")
    parser.add_argument("--roles", default=",".join(ROLES), help=f"which of {', '.join(ROLES)} (default: all)")
    parser.add_argument("--limit", type=int, default=0, help="look at the first N tasks only (default: all)")
    arguments.add_json(parser)
    parser.set_defaults(config=None)  # takes --config.KEY, for what may change after training


def run(args: argparse.Namespace) -> int:
    roles = tuple(args.roles.split(","))
    if unknown := set(roles) - set(ROLES):
        raise UserError(f"--roles: unknown {', '.join(sorted(unknown))}; there are {', '.join(ROLES)}")
    opened = runs.open_run(args.workdir, args.overrides)
    with held_out.of_run(opened.config, args.workdir) as audit:
        result = evaluate_roles(opened, roles=roles, split=args.split, limit=args.limit, audit=audit)
    tables = [markdown(result["rows"])]
    for by in ("kind", "agent"):
        tables.append(markdown(result[f"by_{by}"], first=("group", "name")))
    if audit is not None:
        tables.append(held_out.markdown(result["held_out"]))
    if not hosts.is_main():
        return 0
    arguments.write_json(args.workdir / "evaluation.json", result)
    arguments.write_text(args.workdir / "evaluation.md", "\n\n".join(tables) + "\n")
    page = report.build(args.workdir, args.workdir / "evaluation.html")
    arguments.say("\n\n".join(tables) + f"\n\n{page}")
    if args.json:
        arguments.write_json(args.json, result)
    return 0


def evaluate_roles(
    opened: runs.Run,
    *,
    roles: Sequence[str],
    split: str,
    limit: int = 0,
    keep: Callable[[str, str, np.ndarray], None] | None = None,
    audit: held_out.HeldOut | None = None,
) -> dict[str, Any]:
    """Rows and breakdowns for each role of an opened run (`runs.open_run`).

    `keep(role, record id, clip)` sees every clip, and so does `audit`, whose figures are in `held_out` by role, with
    gaps against the first one.
    """
    config = opened.config
    reader = RecordReader(opened.data, split)
    evaluator = opened.evaluator(components.make(config, "benchmark"))
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
