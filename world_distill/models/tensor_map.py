"""Other projects' weights beside ours: which tensor is which array, and how its layout turns into ours.

An entry joins one array of ours to its tensor there or, where our blocks are stacked, to one tensor a block (`{n}` in
its name). Nothing here reads files or needs torch: entries turn numpy arrays over, one at a time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from world_distill.structs import PyTree


def same(x: np.ndarray) -> np.ndarray:
    """The layout is ours already."""
    return x


def transpose(x: np.ndarray) -> np.ndarray:
    """torch keeps [out in], we keep [in out]; either way."""
    return x.T


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array here, one tensor (or one a block) there.

    Attributes:
      path: dotted path in our tree.
      name: name there; `{n}` is the number of a block.
      shape: shape there, of one block.
      ours: from their layout to ours.
      theirs: back.
      blocks: how many are stacked along our leading axis; 0: none.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    ours: Callable[[np.ndarray], np.ndarray] = same
    theirs: Callable[[np.ndarray], np.ndarray] = same
    blocks: int = 0

    @property
    def names(self) -> list[str]:
        """Names there, in the order of our leading axis."""
        return [self.name.format(n=n) for n in range(self.blocks)] if self.blocks else [self.name]

    def gather(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Our array, from tensors that are read one at a time."""
        if not self.blocks:
            return np.ascontiguousarray(self.ours(read(self.name)))
        stacked = None
        for n, name in enumerate(self.names):
            part = self.ours(read(name))
            if stacked is None:
                stacked = np.empty((self.blocks, *part.shape), part.dtype)
            stacked[n] = part
        assert stacked is not None  # there is a block at least
        return stacked

    def scatter(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """Their tensors by name, from our array."""
        parts = array if self.blocks else [array]
        return {name: np.ascontiguousarray(self.theirs(part)) for name, part in zip(self.names, parts, strict=True)}


@dataclasses.dataclass(frozen=True)
class Published:
    """A model as published, in terms of this project.

    Attributes:
      layout: `interfaces.PublishedLayout` of networks of its sizes.
      entries: of each part of the base, under the names that the source has.
      constants: arrays of the base by dotted path that are no tensors there, but stand in a config.
      ignored: of a part, pattern of the names of tensors that are not converted.
      apart: as `PublishedLayout.apart`, under the names that the source has.
    """

    layout: Any
    entries: dict[str, list[Entry]]
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    apart: Mapping[str, list[Entry]] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, Any]:
        """As in a config's section `model`."""
        return dict(self.layout.sizes)


@dataclasses.dataclass(frozen=True)
class LoraRules:
    """What diffusers' loader takes of a LoRA file with a family's original names.

    Attributes:
      prefixes: what the names of its tensors begin with.
      reads: (name of a tensor, kind of tensor) -> whether it is read; kinds are those of `weights.lora_names.PARTS`.
      stops: (layer, kind) of each tensor by name -> why the loader ends with an error, a line each.
    """

    prefixes: tuple[str, ...] = ()
    reads: Callable[[str, str], bool] = lambda name, kind: kind in ("a", "b")
    stops: Callable[[Mapping[str, tuple[str, str]]], list[str]] = lambda tensors: []


def check_names(entries: Iterable[Entry], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What does not fit, a line each: tensors that are missing, not expected, or of another shape.

    Args:
      entries: what is expected.
      found: name -> shape of what is there.
    """
    expected = {name: entry.shape for entry in entries for name in entry.names}
    lines = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    lines += [f"unexpected: {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    return lines + [
        f"shape: {name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]


def our_shapes(entries: Iterable[Entry]) -> PyTree:
    """Our tree with the shape of each array, a tuple."""
    shapes = {}
    for entry in entries:
        shape = entry.ours(np.broadcast_to(np.float32(0), entry.shape)).shape  # takes no memory
        shapes[entry.path] = (entry.blocks, *shape) if entry.blocks else shape
    return unflatten_dict(shapes, sep=".")


def assemble(entries: Iterable[Entry], tensors: Mapping[str, np.ndarray]) -> PyTree:
    """Our tree of arrays from tensors that are all in memory.

    Raises:
      ValueError: tensors that are missing, not expected, or of another shape; all of them are listed.
    """
    entries = list(entries)
    if lines := check_names(entries, {name: tensor.shape for name, tensor in tensors.items()}):
        raise ValueError("the weights do not fit:\n  " + "\n  ".join(lines))
    return unflatten_dict({entry.path: entry.gather(tensors.__getitem__) for entry in entries}, sep=".")
