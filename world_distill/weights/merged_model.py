"""A trained Executor for the tools that people already use: `weights.lora_files`, and here the merged model.

    diffusers   LoRA file in PEFT's layout (`pipe.load_lora_weights`)
    comfy       LoRA file with the original names (ComfyUI's "Load LoRA")
    merged      the Executor added to the base: a folder with transformer/ and vae/ in diffusers' layout

alpha is baked into the factors of LoRA files: every reader computes what training computed.
"""

import json
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily, PublishedLayout
from world_distill.models.tensor_map import Entry
from world_distill.structs import PyTree

FORMATS = ("diffusers", "comfy", "merged")
SHARD_BYTES = 10**9  # of a merged model's files; one is held in memory, twice while it is written
NAME = "diffusion_pytorch_model"


def write_merged(
    out: pathlib.Path,
    family: ModelFamily,
    read: Callable[[str], jax.Array],
    executor: PyTree,
    *,
    dtype: str = "float32",
    source: pathlib.Path | None = None,
) -> dict[str, int]:
    """Writes base plus Executor as a folder in diffusers' layout; returns tensors and bytes.

    `read` gives an array of the base by its dotted path (`base_model.open_base`). The folder appears when it is whole.
    With `source`, the other parts of that pipeline are copied beside.

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
            entries = layout.entries()[part]
            tensors = _tensors(entries, read, lora, family.lora_scale, jnp.dtype(dtype), part)
            for key, value in _write_shards(folder, tensors, entries, jnp.dtype(dtype).itemsize).items():
                summary[key] += value
        for path in sorted(source.iterdir()) if source else ():
            if path.name not in configs:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, temporary / path.name)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def check_target(out: pathlib.Path, source: pathlib.Path | None) -> None:
    """Raises UserError where `write_merged` could not write, before anything slow is done."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it, or name another folder")
    if source is not None and not (source / "model_index.json").is_file():
        raise UserError(f"--source {source}: no model_index.json there; name the folder of the whole pipeline")


def published_layout(family: ModelFamily) -> PublishedLayout:
    """The layout in which others have weights of the family. Raises UserError where nobody has."""
    if family.published is None:
        raise UserError(f"model family {family.name} has no published layout to export to")
    return family.published


def count_tensors(lora: PyTree) -> int:
    """Tensors of a LoRA file: one a block where ours are stacked."""
    return sum(leaf.shape[0] if leaf.ndim == 3 else 1 for leaf in jax.tree.leaves(lora))


def _tensors(
    entries: list[Entry],
    read: Callable[[str], jax.Array],
    lora: PyTree | None,
    scale: float,
    dtype: np.dtype,
    part: str,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of one part under its published name, the Executor added."""
    executor = flatten_dict(lora or {}, sep=".")
    for entry in tqdm(entries, desc=part, unit="array", disable=None):
        array = jax.device_get(read(f"{part}.{entry.path}")).astype(np.float32) + _change(executor, entry.path, scale)
        for name, tensor in entry.scatter(array).items():
            yield name, tensor.astype(dtype)


def _change(executor: Mapping[str, Any], path: str, scale: float) -> np.ndarray | float:
    """What an Executor, by dotted paths, adds to the array at `path`."""
    if (full := executor.get(f"full.{path}")) is not None:
        return jax.device_get(full)
    layer, _, last = path.rpartition(".")
    if last != "kernel" or f"{layer}.a" not in executor:
        return 0.0
    a, b = jax.device_get((executor[f"{layer}.a"], executor[f"{layer}.b"]))
    return scale * (a @ b)


def _write_shards(
    folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], entries: list[Entry], itemsize: int
) -> dict[str, int]:
    """Tensors in one file, or in several with an index; memory holds one file at a time."""
    sizes = {name: int(np.prod(entry.shape)) * itemsize for entry in entries for name in entry.names}
    shard_of, number, filled = {}, 0, 0
    for name, size in sizes.items():
        if filled and filled + size > SHARD_BYTES:
            number, filled = number + 1, 0
        shard_of[name], filled = number, filled + size
    count = number + 1
    files = [f"{NAME}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = [f"{NAME}.safetensors"]
    else:
        index = {"metadata": {"total_size": sum(sizes.values())}}
        index["weight_map"] = {name: files[shard] for name, shard in shard_of.items()}
        (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    waiting: dict[str, np.ndarray] = {}
    shard = 0
    for name, tensor in tensors:
        if shard_of[name] != shard:
            safetensors.numpy.save_file(waiting, folder / files[shard], metadata={"format": "pt"})
            waiting, shard = {}, shard_of[name]
        waiting[name] = tensor
    safetensors.numpy.save_file(waiting, folder / files[shard], metadata={"format": "pt"})
    return {"tensors": len(sizes), "bytes": sum(sizes.values())}
