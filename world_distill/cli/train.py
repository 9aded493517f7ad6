"""`world-distill train`."""

import argparse
import pathlib
from typing import Any

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Train an Executor on task records: on- or off-policy distillation, RL from a judge, or both together (WMSD); or
fine-tune it on the clips of records (objective.kind = sft, the variants `sft`).

The folder WORKDIR holds everything of the run. Called again on it, training continues from the newest checkpoint.
Records come from config.data (or WORKDIR/data), as `world-distill encode` writes them.

  world-distill train --config sandbox --workdir runs/mine
  world-distill train --config sandbox:variant=on_policy --config.steps=100 --workdir runs/distilled
  world-distill train --config sandbox --workdir runs/mine --profile 3:5
  world-distill train --config wan22_5b --config.data=data --workdir runs/wan --dry-run
  world-distill train --config wan22_5b:sft --config.data=data --workdir runs/sft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    arguments.add_workdir(parser)
    arguments.add_seed(parser)
    parser.add_argument(
        "--profile", metavar="STEPS", default="",
        help="trace these steps for XProf, into WORKDIR/profile: 3, 3:5 (3, 4 and 5) or 3,7",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true",
        help="open all that the run reads, compile it, say what memory and time it takes, and write nothing",
    )  # fmt: skip
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.core.measures import Measures
    from world_distill.evaluation.scoring import said
    from world_distill.programs import dry_run, train

    steps, config = arguments.parse_steps(args.profile), arguments.config_from(args)
    if args.dry_run:
        result = dry_run.dry_run(config, args.workdir)
        call = ("train", "--config", args.config, *(f"--config.{k}={v}" for k, v in args.overrides.items()))
        seed = () if args.seed is None else ("--seed", args.seed)
        console.finish(
            f"all that {args.workdir} reads is there" + ("" if result["fits"] else ", but a step does not fit"),
            then=[(*call, *seed, "--workdir", args.workdir)] if result["fits"] else [],
        )
        if args.json:
            atomic.write_json(args.json, result)
        return 0 if result["fits"] else 1
    summary = train.train(config, args.workdir, profile=steps)
    row = summary["validation"]
    if row is not None:
        console.say(f"validation: {said(row, Measures.of_row(row))}")
    console.finish(f"trained an Executor to step {summary['steps']}", args.workdir, then=_next(config, args.workdir))
    if args.json:
        atomic.write_json(args.json, summary)
    return 0


def _next(config: Any, workdir: pathlib.Path) -> list[tuple]:
    """What one may do with a trained Executor: calls that work as they stand."""
    from world_distill import build
    from world_distill.training import run_folder

    of_run, data = ("--workdir", workdir), run_folder.data_folder(config, workdir)
    records = ("--records", data, "--name", config.train_set, "--limit", 8)
    calls: list[tuple] = [("generate", "--executor", workdir, *records, "--out", workdir / "clips_of_training")]
    if config.benchmark.factory and (
        split := next((s for s in ("test", "validation") if (data / f"{s}.json").exists()), "")
    ):
        calls.insert(0, ("evaluate", *of_run, *(("--split", split) if split != "test" else ())))
    if build.make_family(config).published is not None:
        calls.append(("export", *of_run, "--out", "executor.safetensors"))
    return [*calls, ("report", *of_run)]
