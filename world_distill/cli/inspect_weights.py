"""`world-distill inspect-weights`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

_DEFAULT, _OTHER = "wan22_5b", "ltx2"  # configs of published models
HELP = """\
Say what a file or folder of weights is, and what each tool would do with it.

A LoRA is held against the model of --config: its rank, alpha and layers are shown, and how many of its tensors this
project, ComfyUI and diffusers read. Without --config, a LoRA that names layers of LTX-2 is held against LTX-2. Of other
files it says the kind, and the command that reads it.

  world-distill inspect-weights executor.safetensors
  world-distill inspect-weights wan2.2_ti2v_5B_fp16.safetensors --json what.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=pathlib.Path, help="file or folder")
    parser.add_argument("--alpha", type=arguments.POSITIVE, help="of a LoRA that does not say it (default: its rank)")
    arguments.add_config(parser, default=_DEFAULT)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill import build
    from world_distill.errors import UserError
    from world_distill.settings.loading import load_config
    from world_distill.weights import inspect_weights
    from world_distill.weights.lora_layouts import LoraModel

    family = build.make_family(arguments.config_from(args))
    if family.published is None:
        raise UserError(f"--config {args.config}: nobody publishes weights of model family {family.name}")
    model, name = LoraModel.of(family), args.config
    if name == _DEFAULT and not inspect_weights.names_layers_of(args.path, model):
        other = LoraModel.of(build.make_family(load_config(_OTHER)))
        if inspect_weights.names_layers_of(args.path, other):
            model, name = other, _OTHER
    found = inspect_weights.inspect(args.path, model, alpha=args.alpha)
    if "here" in found and "layers" in found:
        found["held against"] = f"--config {name}"
    width = max(map(len, found))
    for key, value in found.items():
        if key != "kind":
            console.say(f"  {key:<{width}}  {value}")
    if args.json:
        atomic.write_json(args.json, found)
    console.finish(f"{args.path}: {found['kind']}")
    return 0
