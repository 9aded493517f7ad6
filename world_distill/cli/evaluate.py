"""`world-distill evaluate`."""

import argparse
import pathlib
from collections.abc import Sequence

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

ROLES = ("base", "demonstrator", "executor")

HELP = """\
Score models on held-out tasks: task completed, intended agent, consistency, with 95 % intervals.

Samples one clip a task for each role (base: told the task; demonstrator: told the solution; executor: told the task,
with the weights trained in WORKDIR) and has the config's benchmark score it. Prints a table and breakdowns by kind of
task and by agent, and writes evaluation.json, evaluation.md and evaluation.html into WORKDIR.

The clips of up to 200 tasks are kept in WORKDIR/evaluation_clips, and evaluation.html shows them, failures first, with
a filter by model, question, verdict, kind and agent. --clips 0 keeps none, --clips all keeps those of every task.

The benchmark of a real model is a VLM, which config.benchmark names and which may be another one at every call. Its
answers are kept in WORKDIR/benchmark.sqlite: called again, evaluate asks nothing twice. --noises 4 samples four clips a
task; intervals are over tasks. --against NAME=DIR compares this evaluation with that of another run, case by case.
--config scores a model that was never trained, in an empty WORKDIR.

A judge in config.held_out, which never had a part in the reward, is asked about the same clips, and compared with the
judge that had: gap is by how many standard deviations the reward has risen more, against the first role. Where that is
large, look at the clips: the reward may be gamed.

  world-distill evaluate --workdir runs/mine
  world-distill evaluate --workdir runs/mine --split validation --roles executor --json scores.json
  world-distill evaluate --workdir runs/mine --config.held_out.factory=world_distill.sandbox:make_oracle
  world-distill evaluate --workdir runs/wan --config.benchmark.factory=world_distill.evaluation:WorldTasksBench \\
      --config.benchmark.options.servers=http://localhost:8000/v1 --config.benchmark.options.model=NAME
  world-distill evaluate --config ltx2 --config.base=weights/ltx2 --config.data=data --workdir runs/base
  world-distill evaluate --workdir runs/wan --against base=runs/base --noises 4
  world-distill evaluate --workdir runs/wan --split dreamgen --export-clips clips/dreamgen \\
      --config.benchmark.factory=world_distill.evaluation:DreamGenBench --config.benchmark.options.model=NAME
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_workdir(parser)
    parser.add_argument(
        "--config", metavar="FILE.py[:ARG]", help="of a WORKDIR that holds no run yet: its untrained model is scored"
    )
    parser.add_argument("--split", default="test", help="record set to score on (default: test)")
    parser.add_argument("--roles", default="", help=f"which of {', '.join(ROLES)} (default: all there are)")
    parser.add_argument(
        "--limit", type=arguments.LIMIT, default=0, help="look at the first N tasks only (default: all)"
    )
    parser.add_argument(
        "--noises", type=arguments.COUNT, default=1, metavar="N",
        help="clips of each task, each from another noise (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--against", action="append", default=[], metavar="[NAME=]DIR",
        help="folder or file of another evaluation, to compare with case by case; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--export-clips", type=arguments.path, metavar="DIR",
        help="also write the clips as MP4, with manifest.json and CSVs, as DreamGen Bench's scripts read them",
    )  # fmt: skip
    parser.add_argument(
        "--clips", type=_clips, default=argparse.SUPPRESS, metavar="N|all",
        help="tasks whose clips are kept for the page, evenly over the record set (default: 200 at most)",
    )  # fmt: skip
    arguments.add_json(parser)


def _clips(text: str) -> int | None:
    return None if text == "all" else arguments.LIMIT(text)


def run(args: argparse.Namespace) -> int:
    from world_distill.devices import hosts
    from world_distill.programs import evaluate

    kept = getattr(args, "clips", evaluate.KEPT_TASKS)
    roles = arguments.chosen("--roles", args.roles, ROLES) if args.roles else ()
    config = arguments.config_from(args) if args.config else None
    result = evaluate.evaluate(
        args.workdir, args.overrides, config=config, roles=roles, split=args.split, limit=args.limit,
        noises=args.noises, against=_named(args.against), export_clips=args.export_clips,
        clips=kept,
    )  # fmt: skip
    if not hosts.is_main():
        return 0
    console.say(evaluate.tables(result))
    page = evaluate.write(args.workdir, result)
    console.say()
    run = ("--workdir", args.workdir)
    names, count = ", ".join(row["name"] for row in result["rows"]), result["rows"][0]["n"]
    clips = args.workdir / evaluate.CLIPS if kept != 0 else None
    made = (args.workdir / "evaluation.json", page, *filter(None, [clips, args.export_clips]))
    console.finish(f"scored {names} on {count} tasks", *made, then=[("report", *run)])
    if args.json:
        atomic.write_json(args.json, result)
    return 0


def _named(given: Sequence[str]) -> dict[str, pathlib.Path]:
    """Paths by the names that --against gives them, or by their own."""
    named = {}
    for text in given:
        name, equals, path = text.partition("=")
        path = arguments.path(path if equals else text)
        named[name if equals else path.name] = path
    return named
