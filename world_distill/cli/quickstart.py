"""`world-distill quickstart`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Run the whole method in a small world: draw scenes, have an oracle write tasks and solutions for them, train an Executor
by self-distillation and RL from the oracle's judgments, and compare it with the base model and the Demonstrator on
held-out tasks.

Takes a few minutes on two CPU cores, with no network and no accelerator. Ends with a table (results.json) and a page to
look at (report.html) in WORKDIR. Interrupt it and call it again: it continues where it stopped. --seed changes scenes,
tasks and training; the held-out scenes are in no training or tuning set.

  world-distill quickstart
  world-distill quickstart --seed 1 --workdir runs/second
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    arguments.add_workdir(parser, default="runs/quickstart")
    arguments.add_seed(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import quickstart

    config = arguments.config_from(args, needs=("scenes",), verb="quickstart")
    results = quickstart.quickstart(config, args.workdir)
    console.finish(
        f"compared base, Demonstrator and Executor on {results['rows'][0]['n']} held-out tasks",
        args.workdir / "results.json", args.workdir / "report.html",
        then=[("generate", "--executor", args.workdir, "--records", args.workdir / "data", "--out", "clips")],
    )  # fmt: skip
    if args.json:
        atomic.write_json(args.json, results)
    return 0
