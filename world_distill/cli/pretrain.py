"""`world-distill pretrain`."""

import argparse
import math

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Train the sandbox's base model on clips of random motions with captions of what is seen.

The base never sees a task phrase. Interrupt it and call it again: it continues where it stopped. The weights end up in
WORKDIR/base.safetensors, with the command and the seed in the file's metadata, the log in WORKDIR/pretrain.jsonl.
Training starts from random weights, or from a weight file, whose metadata the new file then holds as `start`.

  world-distill pretrain --config sandbox --workdir runs/base
  world-distill pretrain --config sandbox --workdir runs/more --config.pretrain.start=runs/base/base.safetensors
  world-distill train --config sandbox --config.base=runs/base/base.safetensors --workdir runs/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    arguments.add_workdir(parser)
    arguments.add_seed(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import pretrain

    config = arguments.config_from(args, needs=("pretrain", "clips"), verb="pretrain")
    changed = [f"--config.{key}={value}" for key, value in args.overrides.items()]
    command = " ".join(["world-distill pretrain --config", args.config, *changed, f"--seed {config.seed}"])
    summary = pretrain.pretrain(config, args.workdir, command=command)
    loss = "" if math.isnan(summary["loss"]) else f", loss {summary['loss']:.4f}"  # it was trained before
    console.finish(
        f"pretrained for {summary['steps']} steps{loss}", summary["weights"],
        then=[("train", "--config", args.config, f"--config.base={summary['weights']}", "--workdir", "runs/mine")],
    )  # fmt: skip
    if args.json:
        atomic.write_json(args.json, summary)
    return 0
