"""`world-distill export`: a trained Executor for the tools that people already use.

    diffusers   LoRA file in PEFT's layout (`pipe.load_lora_weights`)
    comfy       LoRA file with the original names (ComfyUI's "Load LoRA")
    merged      the Executor added to the base: a folder with transformer/ and vae/ in diffusers' layout

alpha is baked into the factors of LoRA files: every reader computes what training computed.
"""

import argparse
import json
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tqdm import tqdm

from world_distill import arguments, components, runs
from world_distill.config import UserError
from world_distill.interfaces import PublishedFamily
from world_distill.lora_files import DTYPES, write_lora
from world_distill.models.params import Entry
from world_distill.structs import PyTree

FORMATS = ("diffusers", "comfy", "merged")
SHARD_BYTES = 4 * 10**9  # of a merged model's files
NAME = "diffusion_pytorch_model"

HELP = """\
Export the trained Executor of a run: as a LoRA file for diffusers or ComfyUI, or merged into the base.

The weights are the slow average that `evaluate` scores, of the newest checkpoint. With --source, a merged model gets
the other parts of the published pipeline (text encoder, tokenizer, scheduler) copied beside it, and is a whole one.

  world-distill export --workdir runs/wan --out executor.safetensors
  world-distill export --workdir runs/wan --format comfy --dtype bfloat16 --out models/loras/executor.safetensors
  world-distill export --workdir runs/wan --format merged --source Wan2.2-TI2V-5B-Diffusers --out Wan2.2-Executor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_workdir(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="file (LoRA) or folder (merged) to write")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="layout (default: diffusers)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (default: float32)")
    parser.add_argument("--source", type=pathlib.Path, help="published model in diffusers' layout, for its other parts")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.source and args.format != "merged":
        raise UserError("--source is for --format merged")
    if args.format == "merged":
        summary = export_merged(args.workdir, args.out, dtype=args.dtype, source=args.source)
    else:
        summary = export_lora(args.workdir, args.out, layout=args.format, dtype=args.dtype)
    arguments.say(f"{args.out}: {summary['tensors']} tensors, {summary['bytes'] / 1e6:.1f} MB, step {summary['step']}")
    if args.json:
        arguments.write_json(args.json, summary)
    return 0


def export_lora(workdir: pathlib.Path, out: pathlib.Path, *, layout: str, dtype: str = "float32") -> dict[str, Any]:
    """Writes the run's Executor as a LoRA file; returns step, tensors and bytes.

    Raises:
      UserError: no run or checkpoint there, or an Executor that no LoRA file can hold.
    """
    config = runs.read_config(workdir)
    mesh = components.start_devices(config)
    family = published_family(config)
    lora, step = runs.load_executor(config, mesh, workdir)
    if lora is None:
        raise UserError(f"{workdir} has no checkpoint yet: there is no Executor to export")
    if "full" in lora:
        raise UserError(f"{workdir} trained all weights (executor.rank = 0), which is no LoRA; use --format merged")
    metadata = {"project": "world-distill", "step": str(step), "seed": str(config.seed)}
    host = jax.device_get(lora)
    write_lora(out, host, family.linears, scale=family.lora_scale, layout=layout, dtype=dtype, metadata=metadata)
    return {"step": step, "tensors": _count(host), "bytes": out.stat().st_size, "layout": layout}


def export_merged(
    workdir: pathlib.Path, out: pathlib.Path, *, dtype: str = "float32", source: pathlib.Path | None = None
) -> dict[str, Any]:
    """Writes base plus Executor as a folder in diffusers' layout; returns step, tensors and bytes.

    The folder appears when it is whole.

    Raises:
      UserError: OUT exists, no run or checkpoint there, or SOURCE is no published pipeline.
    """
    if out.exists():
        raise UserError(f"{out} exists already; remove it, or name another folder")
    if source is not None and not (source / "model_index.json").is_file():
        raise UserError(f"--source {source}: no model_index.json there; name the folder of the whole pipeline")
    opened = runs.open_run(workdir)
    family = published_family(opened.config)
    if opened.executor is None:
        raise UserError(f"{workdir} has no checkpoint yet: there is no Executor to export")
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    summary = {"step": opened.step, "tensors": 0, "bytes": 0, "layout": "merged"}
    try:
        for part, config in family.published_configs(opened.base).items():
            folder = temporary / part
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            lora = opened.executor if part == "transformer" else None
            entries = family.entries()[part]
            tensors = _tensors(entries, opened.base[part], lora, family.lora_scale, jnp.dtype(dtype), part)
            for key, value in _write_shards(folder, tensors, entries, jnp.dtype(dtype).itemsize).items():
                summary[key] += value
        for path in sorted(source.iterdir()) if source else ():
            if path.name not in ("transformer", "vae"):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, temporary / path.name)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def published_family(config) -> PublishedFamily:
    """The family, if it is one that others have weights of. Raises UserError."""
    family = components.make_family(config)
    if family.linears is None:
        raise UserError(f"model family {family.name} has no published layout to export to")
    return family


def _count(lora: PyTree) -> int:
    """Tensors of the file: one a block where ours are stacked."""
    return sum(leaf.shape[0] if leaf.ndim == 3 else 1 for leaf in jax.tree.leaves(lora))


def _tensors(
    entries: list[Entry], base: PyTree, lora: PyTree | None, scale: float, dtype: np.dtype, part: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of one part under its published name, the Executor added."""
    for entry in tqdm(entries, desc=part, unit="array", disable=None):
        *parents, last = entry.path.split(".")
        array = jax.device_get(_at(base, [*parents, last])).astype(np.float32)
        array = array + _change(lora, parents, last, scale)
        for name, tensor in entry.scatter(array).items():
            yield name, tensor.astype(dtype)


def _change(lora: PyTree | None, parents: list[str], last: str, scale: float) -> np.ndarray | float:
    """What an Executor adds to one array."""
    if lora is None:
        return 0.0
    if "full" in lora:
        return jax.device_get(_at(lora["full"], [*parents, last]))
    layer = _at(lora, parents)
    if last != "kernel" or layer is None or not isinstance(layer.get("a"), jax.Array):
        return 0.0
    a, b = jax.device_get((layer["a"], layer["b"]))
    return scale * (a @ b)


def _at(tree: PyTree, path: list[str]) -> Any:
    for name in path:
        if tree is None:
            return None
        tree = tree.get(name)
    return tree


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
