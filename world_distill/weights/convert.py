"""`world-distill convert`: published weights, in any layout of `sources`, to a checkpoint that any mesh restores.

Tensors are read one at a time, stacked, and written as soon as there are enough of them: memory holds the largest array
of ours and little more (`tests/benchmarks/convert_memory.py` measures it).
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from world_distill.errors import UserError
from world_distill.models.tensor_map import Entry, check_names
from world_distill.storage import array_store
from world_distill.storage.safetensors_folder import FLOATS_8, TYPES, digest
from world_distill.storage.weight_files import save_weights
from world_distill.weights import sources
from world_distill.weights.merging import Merge, Merged


def convert(
    source: pathlib.Path,
    dest: pathlib.Path,
    *,
    dtype: str = "keep",
    name: str = "",
    vae: pathlib.Path | None = None,
    revision: str = "",
    license: str = "",
    merges: Sequence[Merge] = (),
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
      merges: LoRA to add; what it changes beside the base, such as LTX-2's text projection, is written to
        `DEST.PART.safetensors`.

    Returns:
      family, layout, sizes (as in a config's section `model`), arrays, gigabytes, revision, `ignored` (part that is not
      converted -> its tensors), `merged` and `beside` (part -> file).

    Raises:
      UserError: DEST or a file beside it exists, SOURCE is of no layout or family that is known, a LoRA cannot be
        merged, the tensors are not those of the config (all that are missing, not expected or of another shape are
        listed), or a tensor holds values that are not finite.
      TensorFileError: files that are missing, damaged, or no safetensors.
    """
    if dest.exists():
        raise UserError(f"{dest} exists already; remove it, or name another folder")
    found = sources.open_source(source, vae)
    problems = misfits(found, dtype)
    if problems:
        raise UserError(f"the weights in {source} cannot be converted:\n  " + "\n  ".join(problems))

    merged = Merged(merges, found.model.layout, found.files)
    beside = {part: dest.with_name(f"{dest.name}.{part}.safetensors") for part in found.model.apart
              if merged.changes(part)}  # fmt: skip
    if there := [path for path in beside.values() if path.exists()]:
        raise UserError(f"{there[0]} exists already; remove it, or name another folder")
    metadata = {
        "family": found.family, "model": found.model.sizes, "source": name or source.name, "layout": found.layout,
        "revision": revision, "license": license, **_text_weights(found, merged),
    }  # fmt: skip
    if merges:
        metadata |= {"merged": merged.metadata(), "beside": {part: path.name for part, path in beside.items()}}
    writer = array_store.Writer(dest, metadata)
    try:
        _write(writer, found, merged, dtype)
        for part, path in beside.items():
            _write_beside(path, found, part, merged)
        writer.finish()
    except BaseException:  # an interrupt, too
        writer.discard()
        for path in beside.values():
            path.unlink(missing_ok=True)
        raise
    return {
        "family": found.family, "layout": found.layout, "sizes": found.model.sizes, "arrays": writer.arrays,
        "gigabytes": writer.bytes / 1e9, "revision": revision, "ignored": dict(found.ignored),
        "merged": merged.metadata(), "beside": {part: str(path) for part, path in beside.items()},
    }  # fmt: skip


def misfits(found: sources.Source, dtype: str = "keep") -> list[str]:
    """What keeps a source from being converted to `dtype`, a line each; empty: nothing.

    Tensors are missing, not expected, of another shape, or of a type that cannot be stored so.
    """
    problems = []
    for part, entries in {**found.model.entries, **found.model.apart}.items():
        if part not in found.files:  # of those apart; nothing is asked of them
            continue
        files = found.files[part]
        ignored = found.model.ignored.get(part, "")
        lines = check_names(entries, {k: shape for k, shape in files.shapes.items() if not re.fullmatch(ignored, k)})
        lines = lines or _check_types(entries, files.types, mixed=part == "transformer" and dtype != "keep")
        problems += [f"{part}: {line}" for line in lines]
    return problems


def _text_weights(found: sources.Source, merged: Merged) -> dict[str, str]:
    """The digest of the tensor that only `encode` reads, for the checkpoint's metadata; {} where there is none."""
    for part, entries in found.model.apart.items():
        if part in found.files:
            read = _reader(found, part, entries, merged, None)
            return {"text_weights": digest(read(entries[0].names[0]))}
    return {}


def _write(writer: array_store.Writer, found: sources.Source, merged: Merged, dtype: str) -> None:
    with tqdm(total=sum(len(e) for e in found.model.entries.values()), unit="array", disable=None) as progress:
        for name, array in found.model.constants.items():
            writer.add(name, array)
        for part, entries in found.model.entries.items():
            # The autoencoder is small, and clips show what it loses.
            kind = dtype if part == "transformer" and dtype != "keep" else None
            read = _reader(found, part, entries, merged, kind)
            for entry in entries:
                writer.add(f"{part}.{entry.path}", entry.gather(read))
                progress.update(1)


def _write_beside(path: pathlib.Path, found: sources.Source, part: str, merged: Merged) -> None:
    """A part that is none of the base, under diffusers' names."""
    entries = found.model.apart[part]
    read = _reader(found, part, entries, merged, None)
    names = [name for entry in found.model.layout.apart()[part] for name in entry.names]
    tensors = dict(zip(names, (read(name) for entry in entries for name in entry.names), strict=True))
    save_weights(path, unflatten_dict(tensors, sep="."), {"format": "pt", "merged": json.dumps(merged.metadata())})


def _reader(
    found: sources.Source, part: str, entries: Iterable[Entry], merged: Merged, dtype: str | None
) -> Callable[[str], np.ndarray]:
    """A function that gives a part's tensors by name, merged, and of `dtype` unless that is None."""
    files, places = found.files[part], merged.named(part, entries)

    def read(name: str) -> np.ndarray:
        tensor = files[name]
        # One such value makes every frame black, and nothing later would say where it comes from.
        if not np.isfinite(tensor).all():
            raise UserError(f"{part}: {name} holds values that are not finite; the file is damaged")
        return merged.add(places[name], tensor, dtype and jnp.dtype(dtype))

    return read


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
