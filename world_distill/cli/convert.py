"""`world-distill convert`."""

import argparse
import pathlib
from typing import Any

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

DTYPES = ("keep", "float32", "bfloat16")

HELP = """\
Convert a model in diffusers' layout (a folder of safetensors) to a checkpoint of this project.

SOURCE is such a folder, or the name of a model on the Hugging Face hub, of which transformer and autoencoder are then
downloaded. DEST is complete or not there: what an interrupted conversion leaves is cleared away by the next.
`--config.base=DEST` then trains on it. The transformer is stored in --dtype (default: as published), the autoencoder as
published.

--verify runs DEST and diffusers side by side on random inputs, in float32 on the CPU, and fails if they differ. It
needs the extra `torch`, and memory for either model in float32. Where DEST is there already, it is verified and not
converted again.

  world-distill convert Wan2.2-TI2V-5B-Diffusers weights/wan22-5b --dtype bfloat16
  world-distill convert Wan-AI/Wan2.2-TI2V-5B-Diffusers weights/wan22-5b --verify
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder with transformer/ and vae/, or OWNER/NAME on the Hugging Face hub")
    parser.add_argument("dest", type=pathlib.Path, help="folder of the checkpoint; must not exist, but with --verify")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the transformer's weights (default: keep)")
    parser.add_argument("--verify", action="store_true", help="compare the checkpoint with diffusers' model")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.weights import convert, published, verify

    # What fails at once comes before a download that takes long.
    if args.verify:
        verify.check_installed()
    there = args.dest.exists()
    if there and not args.verify:
        raise UserError(f"{args.dest} exists already; remove it, or name another folder")
    source = published.locate(args.source)
    summary: dict[str, Any] = {}
    if there:
        verify.check_same_model(source, args.dest, args.dtype)
    else:
        summary |= convert.convert(source, args.dest, dtype=args.dtype, name=args.source)
        size = f"{summary['arrays']} arrays, {summary['gigabytes']:.2f} GB"
        console.say(f"{args.dest}: {size}, family {summary['family']}; use it with --config.base={args.dest}")
    if args.verify:
        summary["verify"] = verify.compare(source, args.dest)
    if args.json:
        atomic.write_json(args.json, summary)
    if args.verify:
        for line in verify.lines(summary["verify"]):
            console.say(line)
        if failed := verify.failures(summary["verify"]):
            raise UserError(
                f"{args.dest} does not compute what diffusers computes from {source}: {', '.join(failed)} off by more"
                f" than {verify.TOLERANCE} of the largest value. Do not use it"
            )
    return 0
