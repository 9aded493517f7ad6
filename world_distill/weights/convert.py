"""`world-distill convert`: published weights in diffusers' layout to a checkpoint that any mesh restores.

Tensors are read one at a time, stacked, and written as soon as there are enough of them: memory holds the largest array
of ours and little more (`tests/benchmarks/convert_memory.py` measures it).
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from world_distill.errors import UserError
from world_distill.models.tensor_map import Entry, Published, check_names
from world_distill.storage import array_store
from world_distill.storage.safetensors_folder import TYPES, TensorFiles
from world_distill.weights import published

Cast = Callable[[np.ndarray], np.ndarray]


def convert(source: pathlib.Path, dest: pathlib.Path, *, dtype: str = "keep", name: str = "") -> dict[str, Any]:
    """Writes the checkpoint DEST from the diffusers folder SOURCE.

    Args:
      source: the folder.
      dest: must not exist; if anything fails, it still does not.
      dtype: of the transformer's weights, keep, float32 or bfloat16.
      name: of the source, kept with the checkpoint (default: the folder's).

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
        lines = check_names(entries, files[part].shapes)
        lines = lines or _check_types(entries, files[part].types, mixed=part == "transformer" and dtype != "keep")
        problems += [f"{part}: {line}" for line in lines]
    if problems:
        raise UserError(f"the weights in {source} cannot be converted:\n  " + "\n  ".join(problems))

    writer = array_store.Writer(dest, {"family": family, "model": model.sizes, "source": name or source.name})
    try:
        _write(writer, model, files, _caster(dtype))
        writer.finish()
    except BaseException:  # an interrupt, too
        writer.discard()
        raise
    return {"family": family, "sizes": model.sizes, "arrays": writer.arrays, "gigabytes": writer.bytes / 1e9}


def _write(writer: array_store.Writer, model: Published, files: Mapping[str, TensorFiles], cast: Cast) -> None:
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
