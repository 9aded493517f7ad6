"""A trained Executor for the tools that people already use: `weights.lora_files`, and here the merged model.

    comfy          LoRA file with the original names, which ComfyUI ("Load LoRA") and diffusers read
    diffusers      LoRA file in PEFT's layout (`pipe.load_lora_weights`)
    merged         the Executor added to the base: a folder with transformer/ and vae/ in diffusers' layout
    merged-comfy   the same transformer as one file for ComfyUI ("Load Diffusion Model")

alpha is baked into the factors of LoRA files: every reader computes what training computed.
"""

import itertools
import json
import math
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily, PublishedLayout
from world_distill.models.lora import DIFFERENCES
from world_distill.models.tensor_map import Entry
from world_distill.storage.weight_files import stream_weights
from world_distill.structs import PyTree

SHARD_BYTES = 10**9  # of a merged model's files
COMFY_PREFIX = "model.diffusion_model."  # of the transformer's names in a checkpoint for ComfyUI
NAME = "diffusion_pytorch_model"
Kind = tuple[np.dtype, tuple[int, ...]]  # of a tensor in a file


def write_merged(
    out: pathlib.Path,
    family: ModelFamily,
    read: Callable[[str], jax.Array],
    executor: PyTree,
    *,
    dtype: str = "float32",
    source: pathlib.Path | None = None,
    apart: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes base plus Executor as a folder in diffusers' layout; returns tensors and bytes.

    `read` gives an array of the base by its dotted path (`base_model.open_base`). The folder appears when it is whole.
    With `source`, a folder, the other parts of that pipeline are copied beside. `apart` has tensors that the base
    lacks, by part and by name (`apart.Apart.tensors`); they are written among those of their part. `metadata` goes into
    the files' headers. Arrays that everyone keeps in float32 (`PublishedLayout.float32`) stay so whatever `dtype` is.

    Raises:
      UserError: OUT exists, SOURCE is no published pipeline, or nobody publishes models of this family.
    """
    layout = published_layout(family)
    check_target(out, source)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    summary = {"tensors": 0, "bytes": 0}
    try:
        configs = layout.configs(read)
        for part, config in configs.items():
            folder = temporary / part
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            lora = executor if part == family.adapted else None
            wanted = _typed(layout, part, layout.entries()[part], dtype)
            tensors = _tensors(wanted, read, lora, family.lora_scale, part)
            kinds = _kinds(wanted)
            if more := (apart or {}).get(part, {}):
                typed = {name: tensor.astype(jnp.dtype(dtype), copy=False) for name, tensor in more.items()}
                kinds |= {name: (tensor.dtype, tensor.shape) for name, tensor in typed.items()}
                tensors = itertools.chain(tensors, typed.items())
            for key, value in _write_shards(folder, tensors, kinds, metadata or {}).items():
                summary[key] += value
        for path in sorted(source.iterdir()) if source and source.is_dir() else ():
            if path.name not in configs:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, temporary / path.name)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def write_merged_file(
    out: pathlib.Path,
    family: ModelFamily,
    read: Callable[[str], jax.Array],
    executor: PyTree,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes base plus Executor as one file with ComfyUI's names; returns tensors and bytes.

    It holds the adapted part alone, as ComfyUI's "Load Diffusion Model" takes it: the autoencoder is unchanged.
    Arguments and errors are those of `write_merged`.
    """
    layout, part = published_layout(family), family.adapted
    assert part is not None
    check_target(out, None)
    wanted = _typed(layout, part, layout.entries("original")[part], dtype)
    kinds = {COMFY_PREFIX + name: kind for name, kind in _kinds(wanted).items()}
    tensors = _tensors(wanted, read, executor, family.lora_scale, part)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        named = ((COMFY_PREFIX + name, tensor) for name, tensor in tensors)
        written = stream_weights(temporary, kinds, named, {"format": "pt", **(metadata or {})})
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return {"tensors": len(kinds), "bytes": written}


def check_target(out: pathlib.Path, source: pathlib.Path | None) -> None:
    """Raises UserError where `write_merged` could not write, before anything slow is done."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it, or name another folder")
    if source is not None and not source.is_file() and not (source / "model_index.json").is_file():
        raise UserError(f"--source {source}: no model_index.json there; name the folder of the whole pipeline")


def published_layout(family: ModelFamily) -> PublishedLayout:
    """The layout in which others have weights of the family. Raises UserError where nobody has."""
    if family.published is None:
        raise UserError(f"model family {family.name} has no published layout to export to")
    return family.published


def count_tensors(lora: PyTree) -> int:
    """Tensors of a LoRA file: one a block where ours are stacked."""
    return sum(leaf.shape[0] if leaf.ndim == 3 else 1 for leaf in jax.tree.leaves(lora))


def _typed(layout: PublishedLayout, part: str, entries: Iterable[Entry], dtype: str) -> list[tuple[Entry, np.dtype]]:
    """Entries with the type of their tensors, wider types first (`stream_weights`)."""
    keep = layout.float32.get(part, "")
    found = [(e, jnp.dtype("float32" if re.fullmatch(keep, e.path) else dtype)) for e in entries]
    return sorted(found, key=lambda item: -item[1].itemsize)


def _kinds(wanted: Iterable[tuple[Entry, np.dtype]]) -> dict[str, Kind]:
    """Type and shape of every tensor by its published name."""
    return {name: (kind, entry.shape) for entry, kind in wanted for name in entry.names}


def _tensors(
    wanted: list[tuple[Entry, np.dtype]],
    read: Callable[[str], jax.Array],
    lora: PyTree | None,
    scale: float,
    part: str,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of one part under its published name, the Executor added."""
    executor = flatten_dict(lora or {}, sep=".")
    for entry, dtype in tqdm(wanted, desc=part, unit="array", disable=None):
        array = jax.device_get(read(f"{part}.{entry.path}")).astype(np.float32) + _change(executor, entry.path, scale)
        for name, tensor in entry.scatter(array).items():
            yield name, tensor.astype(dtype)


def _change(executor: Mapping[str, Any], path: str, scale: float) -> np.ndarray | float:
    """What an Executor, by dotted paths, adds to the array at `path`."""
    if (full := executor.get(f"full.{path}")) is not None:
        return jax.device_get(full)
    difference = executor.get(f"{DIFFERENCES}.{path}")
    change = 0.0 if difference is None else jax.device_get(difference)
    layer, _, last = path.rpartition(".")
    if last != "kernel" or f"{layer}.a" not in executor:
        return change
    a, b = jax.device_get((executor[f"{layer}.a"], executor[f"{layer}.b"]))
    return change + scale * (a @ b)


def _write_shards(
    folder: pathlib.Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    kinds: Mapping[str, Kind],
    metadata: Mapping[str, str],
) -> dict[str, int]:
    """Tensors in one file, or in several with an index."""
    shards: list[dict[str, Kind]] = [{}]
    filled = 0
    for name, (kind, shape) in kinds.items():
        size = math.prod(shape) * kind.itemsize
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name], filled = (kind, shape), filled + size
    files = [f"{NAME}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [f"{NAME}.safetensors"]
    header = {"format": "pt", **metadata}
    written = sum(
        stream_weights(folder / file, shard, itertools.islice(tensors, len(shard)), header)
        for file, shard in zip(files, shards, strict=True)
    )
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": written}}
        index["weight_map"] = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {"tensors": len(kinds), "bytes": written}
