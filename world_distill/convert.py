"""`world-distill convert`: published weights in diffusers' layout to a checkpoint that any mesh restores.

Tensors are read one at a time, stacked, and written as soon as there are a few hundred megabytes: memory holds the
largest array of ours and little more.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from world_distill import arguments, converted, published
from world_distill.config import UserError
from world_distill.models.params import check_names
from world_distill.tensor_files import TensorFiles

HELP = """\
Convert a model in diffusers' layout (a folder of safetensors) to a checkpoint of this project.

DEST is complete or not there: what an interrupted conversion leaves is cleared away by the next. `--config.base=DEST`
then trains on it. The transformer is stored in --dtype (default: as published), the autoencoder as published.

  world-distill convert Wan2.2-TI2V-5B-Diffusers weights/wan22-5b --dtype bfloat16
"""

DTYPES = ("keep", "float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=pathlib.Path, help="folder with model_index.json, transformer/ and vae/")
    parser.add_argument("dest", type=pathlib.Path, help="folder of the checkpoint; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the transformer's weights (default: keep)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    summary = convert(args.source, args.dest, dtype=args.dtype)
    arguments.say(f"{args.dest}: {summary['arrays']} arrays, {summary['gigabytes']:.2f} GB, family {summary['family']}")
    if args.json:
        arguments.write_json(args.json, summary)
    return 0


def convert(source: pathlib.Path, dest: pathlib.Path, *, dtype: str = "keep") -> dict[str, Any]:
    """Writes the checkpoint DEST from the diffusers folder SOURCE.

    Returns:
      family, sizes (as in a config's section `model`), arrays, gigabytes.

    Raises:
      UserError: DEST exists, SOURCE is of no family that is known, or its tensors are not those of its config: all
        that are missing, not expected or of another shape are listed.
      TensorFileError: files that are missing, damaged, or no safetensors.
    """
    if dest.exists():
        raise UserError(f"{dest} exists already; remove it, or name another folder")
    family, model = published.describe(source)
    files, problems = {}, []
    for part, entries in model.entries.items():
        files[part] = TensorFiles(source / part)
        problems += [f"{part}: {line}" for line in check_names(entries, files[part].shapes)]
    if problems:
        raise UserError(f"the weights in {source} are not those of its config:\n  " + "\n  ".join(problems))

    cast = _caster(dtype)
    writer = converted.Writer(dest, {"family": family, "model": model.sizes, "source": source.name})
    with tqdm(total=sum(len(e) for e in model.entries.values()), unit="array", disable=None) as progress:
        for name, array in model.constants.items():
            writer.add(name, array)
        for part, entries in model.entries.items():
            # The autoencoder is small, and clips show what it loses.
            change = cast if part == "transformer" else lambda x: x
            for entry in entries:
                writer.add(f"{part}.{entry.path}", entry.gather(lambda name, p=part, c=change: c(files[p][name])))
                progress.update(1)
    writer.finish()
    return {"family": family, "sizes": model.sizes, "arrays": writer.arrays, "gigabytes": writer.bytes / 1e9}


def _caster(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    if dtype == "keep":
        return lambda x: x
    return lambda x: x.astype(jnp.dtype(dtype))
