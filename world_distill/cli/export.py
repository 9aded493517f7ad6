"""`world-distill export`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

FORMATS = ("diffusers", "comfy", "merged")
DTYPES = ("float32", "bfloat16")

HELP = """\
Export the trained Executor of a run: as a LoRA file for diffusers or ComfyUI, or merged into the base.

The weights are the slow average that `evaluate` scores, of the newest checkpoint. With --source, a merged model gets
the other parts of the published pipeline (text encoder, tokenizer, scheduler) copied beside it, and is a whole one.

  world-distill export --workdir runs/wan --out executor.safetensors
  world-distill export --workdir runs/wan --format comfy --dtype bfloat16 --out models/loras/executor.safetensors
  world-distill export --workdir runs/wan --format merged --source Wan2.2-TI2V-5B-Diffusers --out Wan2.2-Executor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_workdir(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="file (LoRA) or folder (merged) to write")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="layout (default: diffusers)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (default: float32)")
    parser.add_argument("--source", type=pathlib.Path, help="published model in diffusers' layout, for its other parts")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import export

    if args.source and args.format != "merged":
        raise UserError("--source is for --format merged")
    if args.format == "merged":
        summary = export.export_merged(args.workdir, args.out, dtype=args.dtype, source=args.source)
    else:
        summary = export.export_lora(args.workdir, args.out, layout=args.format, dtype=args.dtype)
    console.say(f"{args.out}: {summary['tensors']} tensors, {summary['bytes'] / 1e6:.1f} MB, step {summary['step']}")
    if args.json:
        atomic.write_json(args.json, summary)
    return 0
