"""`world-distill train`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Train an Executor on task records: on- or off-policy distillation, RL from a judge, or both together (WMSD).

The folder WORKDIR holds everything of the run. Called again on it, training continues from the newest checkpoint.
Records come from config.data (or WORKDIR/data), as `world-distill encode` writes them.

  world-distill train --config sandbox --workdir runs/mine
  world-distill train --config sandbox:variant=on_policy --config.steps=100 --workdir runs/distilled
  world-distill train --config sandbox --workdir runs/mine --profile 3:5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    arguments.add_workdir(parser)
    arguments.add_seed(parser)
    parser.add_argument(
        "--profile", metavar="STEPS", default="",
        help="trace these steps for XProf, into WORKDIR/profile: 3, 3:5 (3, 4 and 5) or 3,7",
    )  # fmt: skip
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.evaluation.scoring import QUESTIONS
    from world_distill.programs import train

    steps = arguments.parse_steps(args.profile)
    summary = train.train(arguments.config_from(args), args.workdir, profile=steps)
    row = summary["validation"]
    if row is not None:
        console.say("validation: " + ", ".join(f"{q} {row[q]:.3f}" for q in (*QUESTIONS, "average", "all")))
    console.say(
        f"{args.workdir} is trained to step {summary['steps']}; next: world-distill evaluate --workdir {args.workdir}"
    )
    if args.json:
        atomic.write_json(args.json, summary)
    return 0
