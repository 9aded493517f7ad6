"""`world-distill convert`: published weights, in any layout of `sources`, to a checkpoint that any mesh restores.

Tensors are read one at a time, stacked, and written as soon as there are enough of them: memory holds the largest array
of ours and little more (`tests/benchmarks/convert_memory.py` measures it).
"""

import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from world_distill.errors import UserError
from world_distill.models.tensor_map import Entry, check_names
from world_distill.storage import array_store
from world_distill.storage.safetensors_folder import FLOATS_8, TYPES, digest
from world_distill.weights import sources

Cast = Callable[[np.ndarray], np.ndarray]


def convert(
    source: pathlib.Path,
    dest: pathlib.Path,
    *,
    dtype: str = "keep",
    name: str = "",
    vae: pathlib.Path | None = None,
    revision: str = "",
    license: str = "",
) -> dict[str, Any]:
    """Writes the checkpoint DEST from the model SOURCE.

    Args:
      source: a folder or a file; see `sources`.
      dest: must not exist; if anything fails, it still does not.
      dtype: of the transformer's weights, keep, float32 or bfloat16.
      name: of the source, kept with the checkpoint (default: the folder's).
      vae: the autoencoder, where the source keeps it apart.
      revision: of the source on the hub, kept with the checkpoint.
      license: of the source, kept too.

    Returns:
      family, layout, sizes (as in a config's section `model`), arrays, gigabytes.

    Raises:
      UserError: DEST exists, SOURCE is of no layout or family that is known, its tensors are not those of its config
        (all that are missing, not expected or of another shape are listed), or a tensor holds values that are not
        finite.
      TensorFileError: files that are missing, damaged, or no safetensors.
    """
    if dest.exists():
        raise UserError(f"{dest} exists already; remove it, or name another folder")
    found = sources.open_source(source, vae)
    problems = []
    for part, entries in found.model.entries.items():
        files = found.files[part]
        ignored = found.model.ignored.get(part, "")
        lines = check_names(entries, {k: shape for k, shape in files.shapes.items() if not re.fullmatch(ignored, k)})
        lines = lines or _check_types(entries, files.types, mixed=part == "transformer" and dtype != "keep")
        problems += [f"{part}: {line}" for line in lines]
    if problems:
        raise UserError(f"the weights in {source} cannot be converted:\n  " + "\n  ".join(problems))

    metadata = {
        "family": found.family, "model": found.model.sizes, "source": name or source.name, "layout": found.layout,
        "revision": revision, "license": license, **_text_weights(found),
    }  # fmt: skip
    writer = array_store.Writer(dest, metadata)
    try:
        _write(writer, found, _caster(dtype))
        writer.finish()
    except BaseException:  # an interrupt, too
        writer.discard()
        raise
    return {
        "family": found.family, "layout": found.layout, "sizes": found.model.sizes, "arrays": writer.arrays,
        "gigabytes": writer.bytes / 1e9, "revision": revision,
    }  # fmt: skip


def _text_weights(found: sources.Source) -> dict[str, str]:
    """The digest of the tensor that only `encode` reads, for the checkpoint's metadata; {} where there is none."""
    part, pattern = found.model.text_weights or ("", "")
    files = found.files[part] if part else None
    names = [name for name in files.shapes if re.fullmatch(pattern, name)] if files else []
    return {"text_weights": digest(files[names[0]])} if files and names else {}


def _write(writer: array_store.Writer, found: sources.Source, cast: Cast) -> None:
    with tqdm(total=sum(len(e) for e in found.model.entries.values()), unit="array", disable=None) as progress:
        for name, array in found.model.constants.items():
            writer.add(name, array)
        for part, entries in found.model.entries.items():
            # The autoencoder is small, and clips show what it loses.
            change = cast if part == "transformer" else lambda x: x
            for entry in entries:
                read = functools.partial(_read, found.files[part], part, change)
                writer.add(f"{part}.{entry.path}", entry.gather(read))
                progress.update(1)


def _read(files: Any, part: str, change: Cast, name: str) -> np.ndarray:
    tensor = files[name]
    # One such value makes every frame black, and nothing later would say where it comes from.
    if not np.isfinite(tensor).all():
        raise UserError(f"{part}: {name} holds values that are not finite; the file is damaged")
    return change(tensor)


def _check_types(entries: Iterable[Entry], types: Mapping[str, str], *, mixed: bool) -> list[str]:
    """Tensors of a type that is not read, a line each; and unless `mixed`, arrays of ours made of several types."""
    known = (*TYPES, *FLOATS_8)
    lines = [
        f"type: {name} is {kind}; {', '.join(known)} can be read" for name, kind in types.items() if kind not in known
    ]
    if not mixed and (small := [name for name, kind in types.items() if kind in FLOATS_8]):
        lines.append(f"type: {len(small)} tensors are 8-bit floats, {small[0]} for one; give --dtype bfloat16")
    for entry in entries:
        kinds = {types[name] for name in entry.names}
        if len(kinds) > 1 and kinds <= set(TYPES) and not mixed:
            lines.append(f"type: {entry.name} is {' and '.join(sorted(kinds))}, by block; give --dtype")
    return lines


def _caster(dtype: str) -> Cast:
    if dtype == "keep":
        return lambda x: x
    return lambda x: x.astype(jnp.dtype(dtype))
