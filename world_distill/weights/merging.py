"""LoRA added to a base while it is converted (`convert --merge FILE[:SCALE]`): tensor by tensor, in float32.

A tensor [o i] becomes `tensor + sum of scale (alpha / r) lora_B lora_A`, and is rounded once, to the type in which it
is stored. Factors are read when their tensor is: memory holds a part of one tensor's product and little more.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from world_distill.errors import UserError
from world_distill.interfaces import PublishedLayout
from world_distill.models.tensor_map import Entry
from world_distill.weights import lora_plan
from world_distill.weights.lora_files import open_lazily
from world_distill.weights.lora_layouts import LoraModel

PIECE_BYTES = 64 * 2**20  # of a product that is computed at a time, float32


class Merge(NamedTuple):
    """One file, and how much of its change is added."""

    path: pathlib.Path
    scale: float = 1.0
    alpha: float | None = None  # of a file that does not say it

    def __str__(self) -> str:
        name = self.path.name if self.path.suffix else f"{self.path.resolve().name}/"
        return f"{name} at {self.scale:g}" + ("" if self.alpha is None else f" (alpha {self.alpha:g})")


def parse(text: str) -> tuple[pathlib.Path, float]:
    """(path, scale) of `FILE[:SCALE]`.

    Raises:
      ValueError: a scale that is 0 or not finite.
    """
    file, colon, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        return pathlib.Path(text), 1.0
    if not colon or not file or pathlib.Path(text).exists():
        return pathlib.Path(text), 1.0
    if not scale or not math.isfinite(scale):
        raise ValueError(f"{text}: the scale is {number}, and would merge nothing or nonsense")
    return pathlib.Path(file), scale


class Merged:
    """Published tensors with LoRA added.

    Args:
      merges: what is added; all of it is in the sum before that is rounded.
      layout: of the model.
      parts: that the source has; LoRA of another one is an error.

    Raises:
      UserError: a file that is no LoRA of this model, or that holds more than can be added: the tensors are named.
    """

    def __init__(self, merges: Iterable[Merge], layout: PublishedLayout, parts: Iterable[str]):
        self.merges, parts = tuple(merges), set(parts)
        self._changes: dict[tuple[str, int], list[_Change]] = {}
        model = LoraModel.whole(layout) if self.merges else None
        for merge in self.merges:
            assert model is not None
            file, tensors, metadata = open_lazily(merge.path)
            try:
                found = lora_plan.plan(tensors, metadata, model, alpha=merge.alpha, may_leave_out=False)
            except ValueError as error:
                raise UserError(f"--merge {file}: {error}") from error
            products = {
                (layer.path + ".kernel", layer.block): _Change(file, tensors, (b, a), merge.scale * strength)
                for layer, (a, b, strength) in found.factors.items()
            }
            differences = [
                ((entry.path, block), _Change(file, tensors, (key,), merge.scale))
                for key, (entry, block) in found.differences.items()
            ]
            for key, change in (*products.items(), *differences):
                if (part := key[0].partition(".")[0]) not in parts:
                    raise UserError(f"--merge {file}: it changes the {part}, which the source lacks: {change.names[0]}")
                self._changes.setdefault(key, []).append(change)

    def changes(self, part: str) -> bool:
        """Whether anything of the part is changed."""
        return any(path.startswith(f"{part}.") for path, _ in self._changes)

    def named(self, part: str, entries: Iterable[Entry]) -> Mapping[str, tuple[str, int]]:
        """Published name -> path and block, for `add`."""
        return {name: (f"{part}.{entry.path}", n) for entry in entries for n, name in enumerate(entry.names)}

    def add(self, key: tuple[str, int], tensor: np.ndarray, dtype: Any = None) -> np.ndarray:
        """The tensor with its changes, of its own type or of `dtype`.

        Args:
          key: what `named` says of it.
          tensor: as published.
          dtype: of the result; None: that of the tensor.

        Raises:
          UserError: the sum is not finite.
        """
        dtype = np.dtype(dtype or tensor.dtype)
        changes = self._changes.get(key)
        if not changes:
            return tensor.astype(dtype, copy=False)
        factors = [change.read() for change in changes]
        rows = tensor.reshape(len(tensor), -1)
        result = np.empty(rows.shape, dtype)
        step = max(1, PIECE_BYTES // (4 * max(rows.shape[1], 1)))
        for start in range(0, len(rows), step):
            here = slice(start, start + step)
            total = rows[here].astype(np.float32)
            for left, right, strength in factors:
                change = left[here] if right is None else left[here] @ right
                total += np.float32(strength) * change.reshape(total.shape)
            if not np.isfinite(total).all():
                names = ", ".join(change.names[0] for change in changes)
                raise UserError(f"--merge {changes[0].file}: {names} and its base give values that are not finite")
            result[here] = total.astype(dtype)
        return result.reshape(tensor.shape)

    def metadata(self) -> list[dict[str, Any]]:
        """What was merged, for the checkpoint: file, scale, and alpha where it was given."""
        return [
            {"file": merge.path.resolve().name, "scale": merge.scale}
            | ({} if merge.alpha is None else {"alpha": merge.alpha})
            for merge in self.merges
        ]


class _Change(NamedTuple):
    file: pathlib.Path
    tensors: Mapping[str, Any]
    names: Sequence[str]  # lora_B and lora_A, or a difference
    strength: float

    def read(self) -> tuple[np.ndarray, np.ndarray | None, float]:
        """(lora_B [o r], lora_A [r i], strength), or a difference, a row for each of the weight's, and None."""
        arrays = [np.asarray(self.tensors[name], np.float32) for name in self.names]
        if broken := [name for name, x in zip(self.names, arrays, strict=True) if not np.isfinite(x).all()]:
            raise UserError(f"--merge {self.file}: {broken[0]} holds values that are not finite")
        if len(arrays) == 1:
            return arrays[0], None, self.strength
        up, down = arrays
        rank = len(down)
        return up.reshape(-1, rank), down.reshape(rank, -1), self.strength


def text(metadata: Mapping[str, Any]) -> str:
    """What a checkpoint says that was merged into it, in a line; "" where nothing was."""
    return ", ".join(f"{found['file']} at {found['scale']:g}" for found in metadata.get("merged", ()))
