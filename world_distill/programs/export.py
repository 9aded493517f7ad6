"""Exporting the Executor of a run's folder: as a LoRA file, or merged into the base (`weights.export`)."""

import pathlib
from typing import Any

import jax

from world_distill import build
from world_distill.errors import UserError
from world_distill.training import run_folder
from world_distill.weights import base_model
from world_distill.weights.lora_files import write_lora
from world_distill.weights.lora_layouts import Layout
from world_distill.weights.merged_model import check_target, count_tensors, published_layout, write_merged


def export_lora(workdir: pathlib.Path, out: pathlib.Path, *, layout: Layout, dtype: str = "float32") -> dict[str, Any]:
    """Writes the run's Executor as a LoRA file; returns step, tensors and bytes.

    Raises:
      UserError: no run or checkpoint there, or an Executor that no LoRA file can hold.
    """
    config = run_folder.read_config(workdir)
    mesh = build.start_devices(config)
    family = build.make_family(config)
    names = published_layout(family).lora_names
    lora, step = run_folder.load_executor(config, mesh, workdir)
    if lora is None:
        raise UserError(f"{workdir} has no checkpoint yet: there is no Executor to export")
    if "full" in lora:
        raise UserError(f"{workdir} trained all weights (executor.rank = 0), which is no LoRA; use --format merged")
    metadata = {"project": "world-distill", "step": str(step), "seed": str(config.seed)}
    host = jax.device_get(lora)
    write_lora(out, host, names, scale=family.lora_scale, layout=layout, dtype=dtype, metadata=metadata)
    return {"step": step, "tensors": count_tensors(host), "bytes": out.stat().st_size, "layout": layout}


def export_merged(
    workdir: pathlib.Path, out: pathlib.Path, *, dtype: str = "float32", source: pathlib.Path | None = None
) -> dict[str, Any]:
    """Writes the run's base plus Executor as a folder in diffusers' layout; returns step, tensors and bytes.

    Raises:
      UserError: OUT exists, no run or checkpoint there, or SOURCE is no published pipeline.
    """
    check_target(out, source)
    config = run_folder.read_config(workdir)
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    published_layout(family)
    executor, step = run_folder.load_executor(config, mesh, workdir)
    if executor is None:
        raise UserError(f"{workdir} has no checkpoint yet: there is no Executor to export")
    read = base_model.open_base(family, config, mesh)
    written = write_merged(out, family, read, executor, dtype=dtype, source=source)
    return {"step": step, **written, "layout": "merged"}
