"""Tensors of a LoRA file to our Executor: `scale a b` on kernels, and differences of other weights.

A file adds `alpha / r lora_B lora_A` to the weight [o i]; we add `scale a b` to the kernel [i o]. What each of its
tensors changes is said by `lora_plan`. Nothing here reads files.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from world_distill.models.lora import DIFFERENCES
from world_distill.structs import PyTree
from world_distill.weights import lora_names
from world_distill.weights.lora_layouts import LoraModel
from world_distill.weights.lora_plan import Factors, Layer, Weight, part_of, plan, some


@dataclasses.dataclass
class Reading:
    """An Executor from a LoRA file, and what else the file says.

    Attributes:
      tree: our factors, and `DIFFERENCES` where the file has any.
      left_out: part of `lora_names.LEFT_OUT` -> keys that were not read.
      held: part of `lora_names.LEFT_OUT` -> how many differences are in the tree.
      ranks: rank -> layers.
      strengths: alpha / rank -> layers.
      notes: what the reader had to assume.
    """

    tree: PyTree
    left_out: dict[str, list[str]]
    held: dict[str, int]
    ranks: dict[int, int]
    strengths: dict[float, int]
    notes: list[str]


def read(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    model: LoraModel,
    *,
    scale: float,
    without: Collection[str] = (),
    alpha: float | None = None,
) -> Reading:
    """Our Executor, float32, from the tensors of a LoRA file: `scale a b` is the change that the file makes.

    All our factors get the largest rank of the file: missing entries are zero in `a` and in `b`, whole blocks that the
    file does not adapt among them. Such entries compute nothing, and get no gradient either: training goes on with what
    the file adapts.

    Args:
      tensors: by name.
      metadata: the file's header.
      model: what LoRA files may change.
      scale: of our product, not 0.
      without: parts of `lora_names.LEFT_OUT` that are not read.
      alpha: of a file that does not say it; None takes the rank.

    Raises:
      ValueError: as `lora_plan.plan`; values that are not finite. The tensors are named.
    """
    _check_finite(tensors)
    found = plan(tensors, metadata, model, without=without, alpha=alpha)
    tree = unflatten_dict(_read_factors(tensors, found.factors, model, scale), sep=".")
    if differences := _read_differences(tensors, found.differences):
        tree[DIFFERENCES] = unflatten_dict(differences, sep=".")
    held = collections.Counter(part_of(lora_names.parse(key)) for key in found.differences)
    return Reading(tree, found.left_out, dict(held), found.ranks, found.strengths, found.notes)


def _read_factors(tensors, factors: Mapping[Layer, Factors], model: LoraModel, scale: float) -> dict[str, Any]:
    """Dotted path -> factors `a` and `b`, of all layers that the file adapts."""
    changes = {}
    for layer, found in factors.items():
        down, up = (np.asarray(tensors[key], np.float32) for key in found[:2])
        rank, kernel = len(down), model.kernels.get(layer.path)
        down = down.reshape(rank, -1)
        a = down.T if kernel is None else kernel.ours(down.reshape(rank, *kernel.shape[1:]))
        changes[layer] = a, up.reshape(-1, rank).T * np.float32(found.strength / scale)
    rank, flat = max((a.shape[1] for a, _ in changes.values()), default=0), {}
    for path in sorted({layer.path for layer in changes}):
        *stack, i, o = model.shapes[path]
        a, b = np.zeros((*stack, i, rank), np.float32), np.zeros((*stack, rank, o), np.float32)
        for layer, (down, up) in changes.items():
            if layer.path == path:
                at = (layer.block,) if stack else ()
                a[*at, :, : len(up)], b[*at, : len(up)] = down, up
        flat[path] = {"a": a, "b": b}
    return flat


def _read_differences(tensors, changes: Mapping[str, Weight]) -> dict[str, np.ndarray]:
    """Dotted path -> difference of our array, zero in blocks that the file does not change."""
    found: dict[str, np.ndarray] = {}
    for key, (entry, block) in changes.items():
        ours = entry.ours(np.asarray(tensors[key], np.float32).reshape(entry.shape))
        if entry.path not in found:
            found[entry.path] = np.zeros((entry.blocks, *ours.shape) if entry.blocks else ours.shape, np.float32)
        found[entry.path][(block,) if entry.blocks else ()] += ours
    return found


def _check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    if broken := [key for key, x in tensors.items() if not np.isfinite(np.asarray(x, np.float32)).all()]:
        raise ValueError(f"it holds values that are not finite, so every frame would be black: {some(broken)}")
