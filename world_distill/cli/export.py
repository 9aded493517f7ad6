"""`world-distill export`."""

import argparse
import pathlib
from typing import Any

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

FORMATS = ("comfy", "diffusers", "merged", "merged-comfy")
DTYPES = ("float32", "bfloat16")

HELP = """\
Export the trained Executor of a run: as a LoRA file, or merged into the base.

  --format comfy          one LoRA file for ComfyUI and diffusers (the default)
  --format diffusers      a LoRA file with diffusers' names and PEFT's settings
  --format merged         the whole model, a folder in diffusers' layout
  --format merged-comfy   the transformer as one file for ComfyUI

The weights are the slow average that `evaluate` scores, of the newest checkpoint. The file's header names the base and
its revision, the sampler, the form of prompts and the licence. With --source, a merged model gets the other parts of
the published pipeline (text encoder, tokenizer, scheduler) copied beside it, and is a whole one. In a merged model of
bfloat16, arrays that everyone keeps in float32 stay so. LTX-2's text projection is no part of the base: it is taken
from --source (here also the single file, or the *.text_projection.safetensors of `convert --merge`), or from where the
base came from; where it is not found, a line says so.

  world-distill export --workdir runs/wan --out executor.safetensors
  world-distill export --workdir runs/wan --dtype bfloat16 --out models/loras/executor.safetensors
  world-distill export --workdir runs/wan --format merged --source Wan2.2-TI2V-5B-Diffusers --out Wan2.2-Executor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_workdir(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="file, or folder (merged), to write")
    parser.add_argument("--format", choices=FORMATS, default="comfy", help="layout (default: comfy)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (default: float32)")
    parser.add_argument("--source", type=pathlib.Path, help="published model in diffusers' layout, for its other parts")
    parser.add_argument("--license", default="", help="for the header (default: that of the base)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import export

    if args.source and args.format != "merged":
        raise UserError("--source is for --format merged")
    common = {"dtype": args.dtype, "license": args.license}
    if args.format.startswith("merged"):
        comfy = args.format == "merged-comfy"
        summary = export.export_merged(args.workdir, args.out, source=args.source, comfy=comfy, **common)
    else:
        layout: Any = args.format
        summary = export.export_lora(args.workdir, args.out, layout=layout, **common)
    for line in summary.get("unread", ()):
        console.say(f"diffusers does not read this file: {line}; give it one of --format diffusers")
    for line in summary.get("missing", ()):
        console.say(f"not complete: {line}")
    if args.json:
        atomic.write_json(args.json, summary)
    made = f"{summary['tensors']} tensors, {console.disk(summary['bytes'])}, of step {summary['step']}"
    console.finish(made, args.out, then=[("inspect-weights", args.out)])
    return 0
