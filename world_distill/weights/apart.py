"""Tensors that a model publishes and that are no part of its base (`PublishedLayout.apart`), for a merged model.

LTX-2's text projection is such a one: only `encode` reads it, and diffusers keeps it among the connectors. It is looked
for where it may be, and the digest that the base keeps (`text_weights`) tells whether it is the right one.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from world_distill.errors import UserError
from world_distill.interfaces import PublishedLayout
from world_distill.storage.safetensors_folder import TensorFileError, digest, find_tensor


@dataclasses.dataclass(frozen=True)
class Apart:
    """What was found of the tensors that lie apart.

    Attributes:
      tensors: part whose folder they belong to -> diffusers' name -> tensor.
      missing: lines about tensors that a merged model will lack: where they were looked for, and what to do.
    """

    tensors: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()


def find_apart(
    layout: PublishedLayout, config: ConfigDict, base: Mapping[str, Any], source: pathlib.Path | None = None
) -> Apart:
    """The tensors that the base of a run was published with and does not hold.

    Args:
      layout: of the model.
      config: of the run, which may name the files that texts were encoded with.
      base: metadata of the checkpoint that `config.base` names.
      source: a published model, its folder or its single file, or a file of the tensors alone.

    Raises:
      UserError: the source is a file, and the model has no tensors apart.
    """
    parts = layout.apart()
    if source is not None and source.is_file() and not parts:
        raise UserError(f"--source {source}: name the folder of the whole pipeline; this model needs nothing of a file")
    tensors: dict[str, dict[str, np.ndarray]] = {}
    missing: list[str] = []
    if layout.unread:
        missing.append(
            "the tensors that config.model leaves out of the published model, such as LTX-2's audio stream with"
            " model.audio = off: load a file of --format diffusers into the published pipeline instead"
        )
    for part, entries in parts.items():
        for entry in entries:
            folder, names = _names(layout, part, entry)
            tensor, seen = _first(_places(part, folder, config, base, source), names, entry, base.get("text_weights"))
            if tensor is not None:
                tensors.setdefault(folder, {})[entry.name] = tensor
                continue
            said = "".join(f"; {line}" for line in seen)
            missing.append(
                f"{folder}/ lacks {entry.name}, the model's {part}, which the base does not hold{said}. diffusers"
                " would draw it at random: export again to another --out with --source, which names the published"
                f" model (its folder or single file) or the file *.{part}.safetensors that `convert --merge` wrote"
            )
    return Apart(tensors, tuple(missing))


def _names(layout: PublishedLayout, part: str, entry: Any) -> tuple[str, tuple[str, str]]:
    """(folder of the published model, names in diffusers and in the single file) of a tensor that lies apart."""
    theirs, original = layout.all_lora_names[part][entry.path.rpartition(".")[0]]
    folder, _, layer = theirs.partition(".")
    return folder, (entry.name, original + entry.name.removeprefix(layer))


def _places(
    part: str, folder: str, config: ConfigDict, base: Mapping[str, Any], source: pathlib.Path | None
) -> list[pathlib.Path]:
    """Files and folders that may hold a part, the best first."""
    beside = base.get("beside", {}).get(part)
    found = [pathlib.Path(config.base).parent / beside] if beside else []
    if source is not None:
        found.append(source)
    if not beside or base.get("text_weights"):  # else nothing would tell that a merge changed it
        keys = (part, "text_encoder")
        found += [pathlib.Path(value) for key in keys if isinstance(value := config.model.get(key), str) and value]
        found += [pathlib.Path(base["source"])] if base.get("source") else []
    found = [path / folder if (path / folder).is_dir() else path for path in found]
    return [path for path in dict.fromkeys(found) if path.exists()]


def _first(
    places: Iterable[pathlib.Path], names: tuple[str, str], entry: Any, wanted: str | None
) -> tuple[np.ndarray | None, list[str]]:
    """(the tensor, from the first place that has the right one, or None; what the other places have)."""
    seen = []
    for place in places:
        try:
            found = find_tensor(place, names)
        except TensorFileError as error:
            seen.append(str(error))
            continue
        if found is None:
            seen.append(f"{place} has none")
        elif found.tensor.shape != entry.shape:
            seen.append(f"that of {place} is {list(found.tensor.shape)}, not {list(entry.shape)}")
        elif wanted and (other := digest(found.tensor)) != wanted:
            seen.append(f"that of {place} is another one (digest {other}, not {wanted})")
        else:
            return found.tensor, seen
    return None, seen
