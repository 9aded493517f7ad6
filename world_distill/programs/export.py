"""Exporting the Executor of a run's folder: as a LoRA file, or merged into the base (`weights.merged_model`)."""

import json
import pathlib
from typing import Any

import jax

import world_distill
from world_distill import build
from world_distill.errors import UserError
from world_distill.training import run_folder
from world_distill.weights import base_model, merging
from world_distill.weights.apart import Apart, find_apart
from world_distill.weights.lora_files import write_lora
from world_distill.weights.lora_layouts import Layout, LoraModel, unread_by_diffusers
from world_distill.weights.merged_model import (
    check_target,
    count_tensors,
    published_layout,
    write_merged,
    write_merged_file,
)

PROMPT_FORM = "[agent]: imperative."


def export_lora(
    workdir: pathlib.Path, out: pathlib.Path, *, layout: Layout = "comfy", dtype: str = "float32", license: str = ""
) -> dict[str, Any]:
    """Writes the run's Executor as a LoRA file.

    Returns:
      step, tensors, bytes, layout, and `unread`: what diffusers does not read of a file in ComfyUI's layout.

    Raises:
      UserError: no run or checkpoint there, or an Executor that no LoRA file can hold.
    """
    config = run_folder.read_config(workdir)
    mesh = build.start_devices(config)
    family = build.make_family(config)
    published_layout(family)
    lora, step = run_folder.load_executor(config, mesh, workdir)
    if lora is None:
        raise UserError(f"{workdir} has no checkpoint yet: there is no Executor to export")
    if "full" in lora:
        raise UserError(f"{workdir} trained all weights (executor.rank = 0), which is no LoRA; use --format merged")
    host, model = jax.device_get(lora), LoraModel.of(family)
    metadata = describe(config, step, license)
    write_lora(out, host, model, scale=family.lora_scale, layout=layout, dtype=dtype, metadata=metadata)
    return {
        "step": step, "tensors": count_tensors(host), "bytes": out.stat().st_size, "layout": layout,
        "unread": unread_by_diffusers(host, model) if layout == "comfy" else [],
    }  # fmt: skip


def export_merged(
    workdir: pathlib.Path,
    out: pathlib.Path,
    *,
    dtype: str = "float32",
    source: pathlib.Path | None = None,
    comfy: bool = False,
    license: str = "",
) -> dict[str, Any]:
    """Writes the run's base plus Executor; returns step, tensors, bytes, layout and `missing`.

    It is a folder in diffusers' layout, or with `comfy` one file of the transformer for ComfyUI. `missing` has lines
    about tensors that the folder lacks (`find_apart`).

    Raises:
      UserError: OUT exists, no run or checkpoint there, or SOURCE is no published pipeline.
    """
    check_target(out, source)
    config = run_folder.read_config(workdir)
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    layout = published_layout(family)
    found = Apart() if comfy else find_apart(layout, config, base_model.origin(config.base), source)
    executor, step = run_folder.load_executor(config, mesh, workdir)
    if executor is None:
        raise UserError(f"{workdir} has no checkpoint yet: there is no Executor to export")
    read = base_model.open_base(family, config, mesh)
    metadata = describe(config, step, license)
    if comfy:
        written = write_merged_file(out, family, read, executor, dtype=dtype, metadata=metadata)
    else:
        options: Any = {"dtype": dtype, "source": source, "metadata": metadata}
        written = write_merged(out, family, read, executor, apart=found.tensors, **options)
    kind = "merged-comfy" if comfy else "merged"
    return {"step": step, **written, "layout": kind, "missing": list(found.missing)}


def describe(config, step: int, license: str = "") -> dict[str, str]:
    """What the header of an exported file says: all that one needs to use it as it was trained.

    `base` and `base_revision` name the published model, `base_merged` the LoRA that `convert` added to it, `sampler`
    (JSON) the settings of the training's clips, `prompt_form` how a task is written, `license` the terms: those that
    are given, or those of the base.
    """
    base = base_model.origin(config.base)
    merged = merging.text(base)
    sampler = {
        "solver": "euler", "steps": config.sampler.steps, "shift": config.sampler.shift,
        "guidance": config.rollout.guidance, "fps": config.model.get("fps"), "frames": config.model.get("frames"),
        "size": config.model.get("size"),
    }  # fmt: skip
    if config.sampler.explicit:
        sampler |= {"steps": len(config.sampler.explicit), "times": list(config.sampler.explicit), "shift": None}
    return {
        "project": f"world-distill {world_distill.__version__}",
        "step": str(step),
        "seed": str(config.seed),
        "base": base.get("source") or str(config.base),
        "base_revision": base.get("revision") or "not known",
        **({"base_merged": merged} if merged else {}),
        "sampler": json.dumps(sampler, sort_keys=True),
        "prompt_form": PROMPT_FORM,
        "license": license or base.get("license") or "not stated",
    }
