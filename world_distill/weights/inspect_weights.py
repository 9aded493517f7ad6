"""What a file of weights is: kind, base, rank, alpha, layers, and what each tool would do with it.

What ComfyUI and diffusers read was tried with their own loaders (ComfyUI of October 2025, diffusers 0.42).
"""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.storage import array_store
from world_distill.storage.safetensors_folder import TensorFiles, open_tensors
from world_distill.weights import lora_names, lora_plan, lora_reading, merging, single_files, sources
from world_distill.weights.lora_files import holds_lora, open_lora
from world_distill.weights.lora_layouts import METADATA_KEY, LoraModel

# That our export writes.
HEADER = ("base", "base_revision", "base_merged", "project", "step", "sampler", "prompt_form", "license")


def inspect(path: pathlib.Path, model: LoraModel, *, alpha: float | None = None) -> dict[str, Any]:
    """What is at `path`, as ordered text by name; `kind` is first.

    Args:
      path: a file or a folder.
      model: what a LoRA is held against.
      alpha: of a LoRA that does not say it.

    Raises:
      UserError: nothing is there, or nothing that can be read; of a kind that is known, the message says so.
    """
    if not path.exists():
        raise UserError(f"{path} is not there")
    if path.is_dir() and (path / "model_index.json").is_file() or (path / "transformer").is_dir():
        family, found = sources.published.describe(path)
        return {
            "kind": "a model in diffusers' layout",
            "family": family,
            "sizes": _words(found.sizes),
            **_convert(path),
        }
    if path.is_dir() and not holds_lora(path) and not list(path.glob("*.safetensors")):
        return _folder(path)
    if path.is_dir() and not holds_lora(path) and len(list(path.glob("*.safetensors"))) > 1:
        return _whole(path)
    sources.check_readable(path)
    if path.is_file():
        with open_tensors(path) as file:
            names = list(file.keys())
        if not any(lora_names.parse(name).part or lora_names.refused_kind(name) for name in names):
            return _whole(path)
    return _lora(path, model, alpha)


def names_layers_of(path: pathlib.Path, model: LoraModel) -> bool:
    """Whether at `path` is a LoRA that names a layer of the model; True of all that is no LoRA file."""
    if not path.is_file() or path.suffix != ".safetensors":
        return True
    with open_tensors(path) as file:
        keys = [lora_names.parse(name) for name in file.keys()]
    layers = {_any_block(key.layer) for key in keys if key.part}
    return not layers or any(layers & names for names in _spelled(model))


def _folder(path: pathlib.Path) -> dict[str, Any]:
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        return {"kind": "the folder of a run", "here": f"world-distill generate --executor {path}, or export"}
    try:
        shapes, metadata = array_store.describe(path)
    except array_store.ConvertedError:
        sources.check_readable(path)
        raise
    kept = {key: str(metadata[key]) for key in ("family", "source", "revision", "license") if metadata.get(key)}
    kept |= {"merged": merged} if (merged := merging.text(metadata)) else {}
    here = {"arrays": str(len(shapes)), "here": f"a base: --config.base={path}"}
    return {"kind": "a checkpoint of `world-distill convert`", **kept, **here}


def _whole(path: pathlib.Path) -> dict[str, Any]:
    """A model, or a part of one."""
    files = TensorFiles(path)
    types = collections.Counter(files.types.values())
    about = {"tensors": str(len(files.shapes)), "types": ", ".join(f"{n} {kind}" for kind, n in types.most_common())}
    found = single_files.find_part(files, "transformer")
    if found is None:
        return {"kind": single_files.what_is(files), **about, "here": "not converted"}
    family, view, naming = found
    kind = f"a transformer of {single_files.TITLES[family]}"
    names = f"{'original' if naming == 'original' else 'diffusers'} names" + (view.prefix and f" after {view.prefix}")
    if family == "ltx2":
        return {"kind": kind, "names": names, **about, **_ltx2(path, files)}
    try:
        network = single_files.wan.transformer_config(view.shapes, single_files.settings(path), naming)
    except ValueError as error:
        return {"kind": kind, **about, "here": f"not converted: {error}"}
    sizes = {"blocks": network.depth, "width": network.width, "heads": network.heads, "channels": network.channels}
    return {"kind": kind, "names": names, "sizes": _words(sizes), **about, **_convert(path, files)}


def _ltx2(path: pathlib.Path, files: TensorFiles) -> dict[str, str]:
    """Sizes and the call that converts, of LTX-2; or why it is not converted."""
    try:
        found = single_files.open_file(path)
    except UserError as error:
        return {"here": f"not converted: {error}"}
    return {"sizes": _words(found.model.sizes), **_convert(path, files)}


def _convert(path: pathlib.Path, files: TensorFiles | None = None) -> dict[str, str]:
    alone = files is not None and not single_files.find_part(files, "vae")
    small = files is not None and sources.types_8(files)
    more = " --vae wan2.2_vae.safetensors" * alone + " --dtype bfloat16" * bool(small)
    return {"here": f"world-distill convert {path} DEST{more}"}


def _lora(path: pathlib.Path, model: LoraModel, alpha: float | None) -> dict[str, Any]:
    file, tensors, metadata = open_lora(path)
    keys = {key: lora_names.parse(key) for key in tensors}
    found: dict[str, Any] = {"kind": "LoRA", "file": str(file)}
    refused = collections.Counter(kind[0] for key in tensors if (kind := lora_names.refused_kind(key)))
    if refused:
        found["kind"] = ", ".join(refused)
    if sizes := lora_plan.sizes_of({key: tuple(x.shape) for key, x in tensors.items()}):
        known = model.known_sizes.get(sizes, "no published model that is known here")
        found["made for"] = f"at least {sizes[0]} blocks of width {sizes[1]}: {known}"
    ranks = collections.Counter(len(tensors[k]) for k, key in keys.items() if key.part == "a")
    found["rank"] = ", ".join(f"{rank} ({n} layers)" for rank, n in sorted(ranks.items())) or "none"
    alphas = collections.Counter(float(np.asarray(tensors[k]).item()) for k, key in keys.items() if key.part == "alpha")
    said = ", ".join(f"{a:g} ({n} layers)" for a, n in sorted(alphas.items()))
    said = said or ("in PEFT's settings" if METADATA_KEY in metadata else "")
    assumed = "not said, so taken to be the rank; --alpha gives another" if alpha is None else f"not said; {alpha:g}"
    found["alpha"] = said or assumed
    found["layers"] = ", ".join(_layers(key.layer for key in keys.values() if key.part in ("a", "b")))
    prefixes = {key[: len(key) - len(lora_names.strip(key))] for key in tensors}
    written = {p: user for p, user in lora_names.PREFIXES.items() if any(x.endswith(p) for x in prefixes)}
    found["prefix"] = ", ".join(
        f"{p or 'none'}" + (f" ({written[p]})" if p in written else "") for p in sorted(prefixes)
    )
    found |= {key: metadata[key] for key in HEADER if key in metadata}
    found["here"] = _here(tensors, metadata, model, alpha)
    originals, theirs = _spelled(model)
    comfy = [key for key in tensors if not _comfy_reads(key, keys[key], originals)]
    found["ComfyUI"] = _count(comfy, len(tensors))
    diffusers = [key for key in tensors if not _diffusers_reads(key, keys[key], originals, theirs, model)]
    found["diffusers"] = _count(diffusers, len(tensors))
    original = {key: keys[key] for key in tensors if key.startswith("diffusion_model.")}
    if lines := model.rules.stops(original) if original else []:
        found["diffusers"] = f"stops with an error: {'; '.join(lines)}"
    return found


def _here(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], model: LoraModel, alpha: float | None) -> str:
    """What this project does with the file."""
    without = sorted(lora_plan.other_parts(tensors, model))
    try:
        found = lora_reading.read(tensors, metadata, model, scale=1.0, without=without, alpha=alpha)
    except ValueError as error:
        return f"refused: {error}"
    flags = "" if alpha is None else f" --alpha {alpha:g}"
    if without == [lora_names.CONNECTORS]:
        return f"convert SOURCE DEST --merge FILE{flags}"
    held = ", ".join(f"{n} differences of {part}" for part, n in sorted(found.held.items()))
    flags += "".join(f" --without {part}" for part in without)
    return f"generate --executor FILE{flags}" + (f"; holds {held}" if held else "")


def _spelled(model: LoraModel) -> tuple[set[str], set[str]]:
    """Names of layers and weights in the original code (with underscores, too), and in diffusers."""
    sets: list[set[str]] = []
    for layout in ("comfy", "diffusers"):
        names = {entry.names[0] for entry in model.entries[layout]}  # of block 0; see `_any_block`
        sets.append(names | {name.removesuffix(".weight").removesuffix(".bias") for name in names})
    originals, theirs = sets
    return originals | {name.replace(".", "_") for name in originals}, theirs


def _comfy_reads(key: str, found: lora_names.Key, originals: set[str]) -> bool:
    layer = found.layer if found.part else re.sub(r"\.(lokr|hada|oft|boft|dora)_\w+$", "", found.layer)
    prefix = key[: key.find(layer)]
    known = _any_block(layer) in originals
    return known and prefix in ("diffusion_model.", "lora_unet_", "lora_unet__") and found.part != "diff_m"


def _diffusers_reads(key: str, found: lora_names.Key, originals: set[str], theirs: set[str], model: LoraModel) -> bool:
    prefix = key[: key.find(found.layer)]
    if prefix == "transformer.":
        return _any_block(found.layer) in theirs and found.part in ("a", "b")
    plain = prefix in model.rules.prefixes and model.rules.reads(key, found.part)
    return plain and _any_block(found.layer) in originals


def _any_block(layer: str) -> str:
    """The name of the same layer in block 0: a file may be for a model of more blocks than ours."""
    return re.sub(r"(?<=blocks[._])\d+", "0", layer, count=1)


def _count(lost: Sequence[str], count: int) -> str:
    if not lost:
        return f"reads all {count} tensors"
    return f"reads {count - len(lost)} of {count} tensors, not {lora_plan.some(lost, shown=2)}"


def _layers(names) -> list[str]:
    """Kinds of layers, blocks put together."""
    return sorted({re.sub(r"(?<=blocks[._])\d+", "N", name) for name in names})


def _words(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sizes.items() if not isinstance(value, Mapping))
