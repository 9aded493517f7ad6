"""LoRA files that diffusers and ComfyUI read, and those that they or their trainers wrote."""

import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from world_distill.devices.sharding import tree_shardings
from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily
from world_distill.models.lora import DIFFERENCES
from world_distill.storage.safetensors_folder import (
    LazyTensor,
    TensorFileError,
    TensorFiles,
    open_tensors,
    read_tensor,
)
from world_distill.storage.weight_files import save_weights
from world_distill.structs import PyTree
from world_distill.weights import lora_reading
from world_distill.weights.lora_layouts import METADATA_KEY, Layout, LoraModel, adapter_metadata, lora_tensors

FILE_NAME = "pytorch_lora_weights.safetensors"  # that diffusers looks for in a folder
PEFT_NAME = "adapter_model.safetensors"  # that PEFT looks for, with its settings beside
PEFT_SETTINGS = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.safetensors)")
DTYPES = ("float32", "bfloat16")


def write_lora(
    path: str | os.PathLike,
    lora: PyTree,
    model: LoraModel,
    *,
    scale: float,
    layout: Layout,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an Executor's factors as a LoRA of alpha = rank, or leaves what was there.

    Args:
      path: of the file.
      lora: factors on the host, as `models.lora.init_lora` makes them.
      model: the names of the layers.
      scale: of our product; it goes into the file's matrices.
      layout: "diffusers", or "comfy" for the original names.
      dtype: of the tensors, "float32" or "bfloat16".
      metadata: more for the file's header, text to text.

    Raises:
      ValueError: a full Executor, a layer without a name there, another layout or dtype.
      WeightFileError: the file cannot be written.
    """
    if layout not in ("diffusers", "comfy") or dtype not in DTYPES:
        raise ValueError(f"a LoRA file is in the layout diffusers or comfy, of {' or '.join(DTYPES)}")
    tensors = lora_tensors(lora, model, scale=scale, layout=layout)
    header = {"format": "pt", **(metadata or {})}
    if layout == "diffusers":
        header[METADATA_KEY] = adapter_metadata(tensors)
    cast = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    save_weights(path, unflatten_dict(cast, sep="."), header)


def read_lora(
    path: str | os.PathLike,
    model: LoraModel,
    *,
    scale: float,
    without: Collection[str] = (),
    alpha: float | None = None,
) -> lora_reading.Reading:
    """An Executor from a LoRA file or a folder with one; see `lora_reading.read`.

    Args:
      path: of the file, or of a folder that diffusers or PEFT saved.
      model: what LoRA files name of the model.
      scale: of the product in which the factors will be used: `scale a b` is the change that the file makes.
      without: parts of `lora_names.LEFT_OUT` that are not read.
      alpha: of a file that does not say it; None takes the rank.

    Raises:
      TensorFileError: not a whole safetensors file, or not a LoRA of this model; the file and its tensors are named.
    """
    file, tensors, metadata = open_lora(path)
    try:
        return lora_reading.read(tensors, metadata, model, scale=scale, without=without, alpha=alpha)
    except ValueError as error:
        raise TensorFileError(f"{file}: {error}") from error


def open_lora(path: str | os.PathLike) -> tuple[pathlib.Path, dict[str, np.ndarray], dict[str, str]]:
    """(file, its tensors, its header) of a LoRA file or a folder with one.

    The settings of PEFT that lie beside a file (`adapter_config.json`) are in the header, as those that diffusers
    writes there.

    Raises:
      TensorFileError: no whole safetensors file there.
    """
    file, metadata = _find(path)
    with open_tensors(file) as opened:
        return file, {name: np.asarray(read_tensor(opened, file, name)) for name in opened.keys()}, metadata


def open_lazily(path: str | os.PathLike) -> tuple[pathlib.Path, dict[str, LazyTensor], dict[str, str]]:
    """As `open_lora`, with tensors that are read when they become arrays."""
    file, metadata = _find(path)
    files = TensorFiles(file)
    return file, {name: LazyTensor(files, name) for name in files.shapes}, metadata


def _find(path: str | os.PathLike) -> tuple[pathlib.Path, dict[str, str]]:
    """(LoRA file, header)."""
    file = lora_file(pathlib.Path(path))
    with open_tensors(file) as opened:
        metadata = opened.metadata() or {}
    settings = file.parent / PEFT_SETTINGS
    if METADATA_KEY not in metadata and file.name == PEFT_NAME and settings.is_file():
        metadata = metadata | {METADATA_KEY: settings.read_text()}
    return file, metadata


def lora_file(path: pathlib.Path) -> pathlib.Path:
    """The LoRA file at `path`, or the one in that folder.

    Raises:
      TensorFileError: nothing is there, or the folder has no LoRA file, or several.
    """
    if path.is_dir():
        if named := [path / name for name in (FILE_NAME, PEFT_NAME) if (path / name).is_file()]:
            return named[0]
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        found = f"{len(files)} safetensors files; name one of them" if files else "no safetensors file"
        raise TensorFileError(f"{path} holds neither {FILE_NAME} nor {PEFT_NAME}, but {found}")
    if not path.exists():
        hub = _HUB_NAME.fullmatch(str(path))
        hint = f". If it is a name on the Hugging Face hub: `hf download {path}`, then name the file" if hub else ""
        raise TensorFileError(f"{path} is no whole safetensors file: it is not there{hint}")
    return path


def holds_lora(path: pathlib.Path) -> bool:
    """Whether a folder is one that diffusers or PEFT saved a LoRA in (and not the folder of a run)."""
    return any((path / name).is_file() for name in (FILE_NAME, PEFT_NAME))


def load_lora(
    path: str | os.PathLike,
    family: ModelFamily,
    mesh: jax.sharding.Mesh,
    *,
    without: Collection[str] = (),
    alpha: float | None = None,
) -> PyTree:
    """An Executor from a LoRA file on the mesh; what was left out or assumed is logged. Arguments as of `read_lora`.

    Raises:
      UserError: a family that is not published has no LoRA files.
      TensorFileError: as `read_lora`.
    """
    if family.published is None:
        raise UserError(f"{path}: model family {family.name} has no LoRA files; name the folder of a run")
    found = read_lora(path, LoraModel.of(family), scale=family.lora_scale, without=without, alpha=alpha)
    for line in (*found.notes, *(f"{len(keys)} tensors left out: {part}" for part, keys in found.left_out.items())):
        logging.warning("%s: %s", path, line)
    return jax.device_put(found.tree, tree_shardings(mesh, family.lora_axes(found.tree), found.tree))


def combine(executors: Sequence[PyTree], strengths: Sequence[float]) -> PyTree:
    """The Executor whose change of the base is the sum of `strength` times that of each.

    Factors stand side by side along the rank, full differences are added up.

    Raises:
      ValueError: LoRA beside a full Executor.
    """
    full = ["full" in lora for lora in executors]
    if any(full) and not all(full):
        raise ValueError("LoRA and full weights cannot be added up: merge one of them into the base (export)")
    parts: list[dict[tuple, Any]] = [dict(flatten_dict(lora)) for lora in executors]
    found: dict[tuple, Any] = {}
    for path in dict.fromkeys(path for part in parts for path in part):
        having = [(part[path], strength) for part, strength in zip(parts, strengths, strict=True) if path in part]
        if path[0] not in ("full", DIFFERENCES) and path[-1] == "a":
            found[path] = jnp.concatenate([array for array, _ in having], axis=-1)
        elif path[0] not in ("full", DIFFERENCES):
            found[path] = jnp.concatenate([array * strength for array, strength in having], axis=-2)
        else:
            found[path] = sum(array * strength for array, strength in having)
    return unflatten_dict(found)
