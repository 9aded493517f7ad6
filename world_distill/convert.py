"""`world-distill convert`: published weights in diffusers' layout to a checkpoint that any mesh restores.

Tensors are read one at a time, stacked, and written as soon as there are enough of them: memory holds the largest array
of ours and little more (`tests/benchmarks/convert_memory.py` measures it).
"""

import argparse
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from world_distill import arguments, converted, published, verify
from world_distill.config import UserError
from world_distill.models.params import Entry, Published, check_names
from world_distill.tensor_files import TYPES, TensorFiles

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

DTYPES = ("keep", "float32", "bfloat16")
Cast = Callable[[np.ndarray], np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder with transformer/ and vae/, or OWNER/NAME on the Hugging Face hub")
    parser.add_argument("dest", type=pathlib.Path, help="folder of the checkpoint; must not exist, but with --verify")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the transformer's weights (default: keep)")
    parser.add_argument("--verify", action="store_true", help="compare the checkpoint with diffusers' model")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    # What fails at once comes before a download that takes long.
    if args.verify:
        verify.check_installed()
    there = args.dest.exists()
    if there and not args.verify:
        raise _exists(args.dest)
    source = published.locate(args.source)
    summary: dict[str, Any] = {}
    if there:
        verify.check_same_model(source, args.dest, args.dtype)
    else:
        summary |= convert(source, args.dest, dtype=args.dtype, name=args.source)
        size = f"{summary['arrays']} arrays, {summary['gigabytes']:.2f} GB"
        arguments.say(f"{args.dest}: {size}, family {summary['family']}")
    if args.verify:
        summary["verify"] = verify.compare(source, args.dest)
    if args.json:
        arguments.write_json(args.json, summary)
    if args.verify:
        for line in verify.lines(summary["verify"]):
            arguments.say(line)
        if failed := verify.failures(summary["verify"]):
            raise UserError(
                f"{args.dest} does not compute what diffusers computes from {source}: {', '.join(failed)} off by more"
                f" than {verify.TOLERANCE} of the largest value. Do not use it"
            )
    return 0


def _exists(dest: pathlib.Path) -> UserError:
    return UserError(f"{dest} exists already; remove it, or name another folder")


def convert(source: pathlib.Path, dest: pathlib.Path, *, dtype: str = "keep", name: str = "") -> dict[str, Any]:
    """Writes the checkpoint DEST from the diffusers folder SOURCE.

    Args:
      source: the folder.
      dest: must not exist; if anything fails, it still does not.
      dtype: of the transformer's weights, one of `DTYPES`.
      name: of the source, kept with the checkpoint (default: the folder's).

    Returns:
      family, sizes (as in a config's section `model`), arrays, gigabytes.

    Raises:
      UserError: DEST exists, SOURCE is of no family that is known, or its tensors are not those of its config: all
        that are missing, not expected or of another shape are listed.
      TensorFileError: files that are missing, damaged, or no safetensors.
    """
    if dest.exists():
        raise _exists(dest)
    family, model = published.describe(source)
    files, problems = {}, []
    for part, entries in model.entries.items():
        files[part] = TensorFiles(source / part)
        lines = check_names(entries, files[part].shapes)
        lines = lines or _check_types(entries, files[part].types, mixed=part == "transformer" and dtype != "keep")
        problems += [f"{part}: {line}" for line in lines]
    if problems:
        raise UserError(f"the weights in {source} cannot be converted:\n  " + "\n  ".join(problems))

    writer = converted.Writer(dest, {"family": family, "model": model.sizes, "source": name or source.name})
    try:
        _write(writer, model, files, _caster(dtype))
        writer.finish()
    except BaseException:  # an interrupt, too
        writer.discard()
        raise
    return {"family": family, "sizes": model.sizes, "arrays": writer.arrays, "gigabytes": writer.bytes / 1e9}


def _write(writer: converted.Writer, model: Published, files: Mapping[str, TensorFiles], cast: Cast) -> None:
    with tqdm(total=sum(len(e) for e in model.entries.values()), unit="array", disable=None) as progress:
        for name, array in model.constants.items():
            writer.add(name, array)
        for part, entries in model.entries.items():
            # The autoencoder is small, and clips show what it loses.
            change = cast if part == "transformer" else lambda x: x
            for entry in entries:
                writer.add(f"{part}.{entry.path}", entry.gather(lambda name, p=part, c=change: c(files[p][name])))
                progress.update(1)


def _check_types(entries: Iterable[Entry], types: Mapping[str, str], *, mixed: bool) -> list[str]:
    """Tensors of a type that is not read, a line each; and unless `mixed`, arrays of ours made of several types."""
    lines = [
        f"type: {name} is {kind}; {', '.join(TYPES)} can be read" for name, kind in types.items() if kind not in TYPES
    ]
    for entry in entries:
        kinds = {types[name] for name in entry.names}
        if len(kinds) > 1 and kinds <= set(TYPES) and not mixed:
            lines.append(f"type: {entry.name} is {' and '.join(sorted(kinds))}, by block; give --dtype")
    return lines


def _caster(dtype: str) -> Cast:
    if dtype == "keep":
        return lambda x: x
    return lambda x: x.astype(jnp.dtype(dtype))
