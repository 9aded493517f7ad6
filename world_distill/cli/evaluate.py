"""`world-distill evaluate`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

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
  world-distill evaluate --workdir runs/mine --config.held_out.factory=world_distill.sandbox:make_oracle
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_workdir(parser)
    parser.add_argument("--split", default="test", help="record set to score on (default: test)")
    parser.add_argument("--roles", default=",".join(ROLES), help=f"which of {', '.join(ROLES)} (default: all)")
    parser.add_argument(
        "--limit", type=arguments.LIMIT, default=0, help="look at the first N tasks only (default: all)"
    )
    arguments.add_json(parser)
    parser.set_defaults(config=None)  # takes --config.KEY, for what may change after training


def run(args: argparse.Namespace) -> int:
    from world_distill.devices import hosts
    from world_distill.programs import evaluate

    roles = arguments.chosen("--roles", args.roles, ROLES)
    result = evaluate.evaluate(args.workdir, args.overrides, roles=roles, split=args.split, limit=args.limit)
    if not hosts.is_main():
        return 0
    console.say(evaluate.tables(result))
    page = evaluate.write(args.workdir, result)
    console.say()
    run = ("--workdir", args.workdir)
    console.finish(
        f"scored {', '.join(roles)} on {result['rows'][0]['n']} tasks", args.workdir / "evaluation.json", page,
        then=[("report", *run)],
    )  # fmt: skip
    if args.json:
        atomic.write_json(args.json, result)
    return 0
