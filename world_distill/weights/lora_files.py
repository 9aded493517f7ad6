"""LoRA files that diffusers and ComfyUI read, and those that they or their trainers wrote.

A family says how its layers are called: `names` is our path -> (name in diffusers, original name), such as
`models.wan.params.LORA_NAMES`.
"""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import unflatten_dict

from world_distill.devices.sharding import tree_shardings
from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily
from world_distill.storage.safetensors_folder import TensorFileError, open_tensors
from world_distill.storage.weight_files import save_weights
from world_distill.structs import PyTree
from world_distill.weights.lora_layouts import METADATA_KEY, Layout, adapter_metadata, lora_tensors, lora_tree

FILE_NAME = "pytorch_lora_weights.safetensors"  # that diffusers looks for in a folder
DTYPES = ("float32", "bfloat16")


def write_lora(
    path: str | os.PathLike,
    lora: PyTree,
    names: Mapping[str, tuple[str, str]],
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
      names: of the layers.
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
    tensors = lora_tensors(lora, names, scale=scale, layout=layout)
    header = {"format": "pt", **(metadata or {})}
    if layout == "diffusers":
        header[METADATA_KEY] = adapter_metadata(tensors)
    cast = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    save_weights(path, unflatten_dict(cast, sep="."), header)


def read_lora(
    path: str | os.PathLike,
    names: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    scale: float,
) -> PyTree:
    """Our factors from a LoRA file in either layout; see `lora_layouts.lora_tree`.

    Args:
      path: of the file.
      names: of the layers.
      shapes: our path -> shape of the base's kernel (of `models.lora.kernels(base)`).
      scale: of the product in which the factors will be used: `scale a b` is the change that the file makes.

    Raises:
      TensorFileError: not a whole safetensors file, or not a LoRA of this model; the file and its tensors are named.
    """
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        try:
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}
        except (safetensors.SafetensorError, AttributeError, TypeError) as error:
            raise TensorFileError(f"{path}: a tensor is of a type that cannot be read ({error})") from error
    try:
        return lora_tree(tensors, metadata, names, shapes, scale=scale)
    except ValueError as error:
        raise TensorFileError(f"{path}: {error}") from error


def load_lora(path: str | os.PathLike, family: ModelFamily, mesh: jax.sharding.Mesh) -> PyTree:
    """An Executor from a LoRA file in either layout, on the mesh.

    Raises:
      UserError: a family that is not published has no LoRA files.
      TensorFileError: as `read_lora`.
    """
    if family.published is None:
        raise UserError(f"{path}: model family {family.name} has no LoRA files; name the folder of a run")
    lora = read_lora(path, family.published.lora_names, family.kernel_shapes(), scale=family.lora_scale)
    return jax.device_put(lora, tree_shardings(mesh, family.lora_axes(lora), lora))
