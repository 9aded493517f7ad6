"""`world-distill inspect-weights`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Say what a file or folder of weights is, and what each tool would do with it.

A LoRA is held against the model of --config: its rank, alpha and layers are shown, and how many of its tensors this
project, ComfyUI and diffusers read. Of other files it says the kind, and the command that reads it.

  world-distill inspect-weights executor.safetensors
  world-distill inspect-weights wan2.2_ti2v_5B_fp16.safetensors --json what.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=pathlib.Path, help="file or folder")
    parser.add_argument("--alpha", type=arguments.POSITIVE, help="of a LoRA that does not say it (default: its rank)")
    arguments.add_config(parser, default="wan22_5b")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill import build
    from world_distill.errors import UserError
    from world_distill.weights import inspect_weights
    from world_distill.weights.lora_layouts import LoraModel

    family = build.make_family(arguments.config_from(args))
    if family.published is None:
        raise UserError(f"--config {args.config}: nobody publishes weights of model family {family.name}")
    found = inspect_weights.inspect(args.path, LoraModel.of(family), alpha=args.alpha)
    width = max(map(len, found))
    for key, value in found.items():
        if key != "kind":
            console.say(f"  {key:<{width}}  {value}")
    if args.json:
        atomic.write_json(args.json, found)
    console.finish(f"{args.path}: {found['kind']}")
    return 0
