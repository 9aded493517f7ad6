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
Convert a published model (safetensors) to a checkpoint of this project.

SOURCE is a folder in diffusers' layout, the folder of the original repository, a single file of LTX-2 or for ComfyUI,
or the name of a model on the Hugging Face hub (NAME, or NAME@REVISION), of which transformer and autoencoder are then
downloaded. Wan's original layout and ComfyUI keep the autoencoder in a file of its own, which --vae names. For a
transformer of LTX-2 alone, --vae names the published file: the text connectors come from it as well. 8-bit floats,
with or without scales, are read and stored in --dtype. GGUF files and pickles are not read.

--merge adds a LoRA, times its SCALE, in float32; the checkpoint says what was merged. Every tensor of the file has to
be used. LTX-2's text projection, which belongs to `encode`, is written beside DEST where a LoRA changes it.

DEST is complete or not there: what an interrupted conversion leaves is cleared away by the next. It keeps the commit
and the licence of the source, which exported files name. `--config.base=DEST` then trains on it. The transformer is
stored in --dtype (default: as published), the autoencoder as published.

--verify runs DEST and diffusers side by side on random inputs, in float32 on the CPU, and fails if they differ. It
needs the extra `torch`, and memory for either model in float32. Where DEST is there already, it is verified and not
converted again.

  world-distill convert Wan2.2-TI2V-5B-Diffusers weights/wan22-5b --dtype bfloat16
  world-distill convert Wan-AI/Wan2.2-TI2V-5B-Diffusers weights/wan22-5b --verify
  world-distill convert ltx-2-19b-distilled.safetensors weights/ltx2 --dtype bfloat16
  world-distill convert ltx-2-19b-dev.safetensors weights/ltx2 --merge ltx-2-19b-distilled-lora-384.safetensors
  world-distill convert wan2.2_ti2v_5B_fp16.safetensors weights/wan22-5b --vae wan2.2_vae.safetensors --dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder, file, or OWNER/NAME[@REVISION] on the Hugging Face hub")
    parser.add_argument("dest", type=_folder, help="folder of the checkpoint; must not exist, but with --verify")
    parser.add_argument("--vae", type=pathlib.Path, help="file of the autoencoder, where SOURCE keeps it apart")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the transformer's weights (default: keep)")
    parser.add_argument(
        "--merge", metavar="FILE[:SCALE]", type=_merge, action="append", default=[],
        help="LoRA to add to the weights (default scale: 1); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=arguments.ALPHA, action="append", default=[],
        help="of --merge files that do not say it (default: their rank); one, or one for each, 0 for a file that does",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="compare the checkpoint with diffusers' model")
    arguments.add_json(parser)


def _folder(text: str) -> pathlib.Path:
    if "://" in text:  # a path would make one slash of the two, and then a folder of it
        raise argparse.ArgumentTypeError(f"{text} is an address; name a folder here, and copy it there afterwards")
    return pathlib.Path(text)


def _merge(text: str) -> tuple[pathlib.Path, float]:
    from world_distill.weights import merging

    try:
        path, scale = merging.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path.expanduser(), scale


def run(args: argparse.Namespace) -> int:
    from world_distill.weights import convert, merging, sources, verify

    if args.alpha and not args.merge:
        raise UserError("--alpha is of a LoRA that --merge names")
    alphas = arguments.one_each("--alpha", args.alpha, "--merge", len(args.merge), 0)
    merges = [
        merging.Merge(path, scale, alpha or None) for (path, scale), alpha in zip(args.merge, alphas, strict=True)
    ]
    # What fails at once comes before a download that takes long.
    if args.verify:
        verify.check_installed()
    there = args.dest.exists()
    if there and not args.verify:
        raise UserError(f"{args.dest} exists already; remove it, or name another folder")
    located = sources.locate(args.source)
    source = located.path
    summary: dict[str, Any] = {}
    if there:
        verify.check_same_model(source, args.dest, args.dtype, args.vae, merges)
    else:
        summary |= convert.convert(
            source, args.dest, dtype=args.dtype, name=args.source.partition("@")[0], vae=args.vae,
            revision=located.revision, license=located.license, merges=merges,
        )  # fmt: skip
    if args.verify:
        summary["verify"] = verify.compare(source, args.dest, args.vae, merges)
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
    for part, count in summary.get("ignored", {}).items():
        console.say(f"not converted: {part}, {count} tensors")
    for merge in merges if not there else ():
        console.say(f"merged: {merge}")
    for part, path in summary.get("beside", {}).items():
        console.say(f"merged into the {part} too: encode with --config.model.{part}={path}")
    made = "compared the weights"
    if not there:
        made = f"{summary['arrays']} arrays, {summary['gigabytes']:.2f} GB, family {summary['family']}"
    console.finish(made, f"{args.dest}; use it with --config.base={args.dest}")
    return 0
