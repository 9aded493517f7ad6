"""Our Executor under the names of other projects: diffusers (PEFT's layout), and the original code (ComfyUI).

For every adapted layer both keep `lora_A` [r i] and `lora_B` [o r], and add `alpha / r lora_B lora_A` to the weight
[o i]; we add `scale a b` to the kernel [i o]. What is written here has alpha = r, with our scale in `lora_B`: readers
that know nothing of alpha, or lose it, compute the same. `lora_reading` has the way back. Nothing here writes files.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily, PublishedLayout
from world_distill.models.lora import DIFFERENCES
from world_distill.models.tensor_map import Entry, LoraRules, our_shapes, transpose
from world_distill.storage.array_store import by_name
from world_distill.structs import PyTree

Layout = Literal["diffusers", "comfy"]
METADATA_KEY = "lora_adapter_metadata"  # of the header in which diffusers keeps PEFT's settings, as JSON

PREFIXES = {"diffusers": "transformer.", "comfy": "diffusion_model."}


@dataclasses.dataclass(frozen=True)
class LoraModel:
    """What of a model LoRA files name.

    Attributes:
      names: our path of a linear layer -> (name in diffusers, original name); `{n}` in it is the number of a block.
      shapes: our path -> shape of the base's kernel, [i o] or [layers i o].
      entries: all arrays of the adapted part, by layout. Without them only factors of linear layers are known.
      known_sizes: (blocks, width) -> what people call the published model of these sizes.
      rules: what diffusers reads of files with the original names.
      absent: names, as `names` has them, of layers that published models have and this one leaves out.
    """

    names: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, tuple[int, ...]]
    entries: Mapping[Layout, Sequence[Entry]] = dataclasses.field(default_factory=dict)
    known_sizes: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    rules: LoraRules = dataclasses.field(default_factory=LoraRules)
    absent: Collection[tuple[str, str]] = ()

    @classmethod
    def of(cls, family: ModelFamily) -> "LoraModel":
        """That of a family with a published layout."""
        layout = family.published
        assert layout is not None and family.adapted is not None
        entries: dict[Layout, Sequence[Entry]] = {
            "diffusers": layout.entries("diffusers")[family.adapted],
            "comfy": layout.entries("original")[family.adapted],
        }
        absent = tuple(layout.absent_lora_names.values())
        return cls(layout.lora_names, family.kernel_shapes(), entries, layout.known_sizes, layout.lora_rules, absent)

    @classmethod
    def whole(cls, layout: PublishedLayout) -> "LoraModel":
        """That of all parts of a published model; paths begin with the part."""
        names = {
            f"{part}.{path}": both for part, layers in layout.all_lora_names.items() for path, both in layers.items()
        }

        def entries(naming: Literal["diffusers", "original"]) -> list[Entry]:
            return [
                dataclasses.replace(entry, path=f"{part}.{entry.path}")
                for part, found in (layout.entries(naming) | layout.apart(naming)).items()
                if part in layout.all_lora_names
                for entry in found
            ]

        theirs = entries("diffusers")
        kernels = by_name(our_shapes(entry for entry in theirs if entry.path.endswith(".kernel")))
        shapes = {path.removesuffix(".kernel"): shape for path, shape in kernels.items()}
        return cls(
            names, shapes, {"diffusers": theirs, "comfy": entries("original")}, layout.known_sizes, layout.lora_rules
        )

    @property
    def sizes(self) -> tuple[int, int] | None:
        """(blocks, width); None where no blocks are stacked."""
        stacked = [shape for shape in self.shapes.values() if len(shape) == 3]
        return (stacked[0][0], Counter(shape[1] for shape in stacked).most_common(1)[0][0]) if stacked else None

    @property
    def widths(self) -> set[int]:
        """What layers of blocks read."""
        return {shape[1] for shape in self.shapes.values() if len(shape) == 3}

    @functools.cached_property
    def kernels(self) -> dict[str, Entry]:
        """Path of a linear layer -> the entry of its kernel."""
        entries = next(iter(self.entries.values()), ())
        return {entry.path.removesuffix(".kernel"): entry for entry in entries if entry.path.endswith(".kernel")}


def lora_tensors(lora: PyTree, model: LoraModel, *, scale: float, layout: Layout) -> dict[str, np.ndarray]:
    """Tensors of a LoRA file, float32, by name.

    Args:
      lora: factors `a` [i r] and `b` [r o], or [layers i r] and [layers r o], in a tree like the base's, and maybe
        `DIFFERENCES` of other weights.
      model: the names.
      scale: of our product.
      layout: whose names.

    Raises:
      ValueError: a full Executor, which no LoRA file can hold; a layer without a name there; or differences, which
        diffusers' layout cannot hold.
    """
    if "full" in lora:
        raise ValueError("a full Executor is no LoRA: merge it into the base and publish the weights")
    tensors = {}
    for path, a, b in sorted(_factors(lora), key=lambda item: item[0]):
        if path not in model.names:
            raise ValueError(f"layer {path} has no name in LoRA files: leave it out of the Executor's targets")
        name = PREFIXES[layout] + model.names[path][layout == "comfy"]
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        kernel = model.kernels.get(path)
        theirs = transpose if kernel is None else kernel.theirs
        for n, (down, up) in enumerate(zip(a, b, strict=True) if "{n}" in name else [(a, b)]):
            layer, factor = name.format(n=n), theirs(down)
            tensors[f"{layer}.lora_A.weight"] = np.ascontiguousarray(factor)
            ones = (1,) * (factor.ndim - 2)  # a convolution's window, which is in `lora_A`
            tensors[f"{layer}.lora_B.weight"] = np.ascontiguousarray(
                (np.float32(scale) * up.T).reshape(*up.T.shape, *ones)
            )
    return tensors | _difference_tensors(lora.get(DIFFERENCES, {}), model, layout)


def _difference_tensors(differences: PyTree, model: LoraModel, layout: Layout) -> dict[str, np.ndarray]:
    """`NAME.diff` and `NAME.diff_b`, as ComfyUI reads them."""
    if differences and layout != "comfy":
        raise ValueError("differences of biases and norms have no place in diffusers' layout: take ComfyUI's")
    entries, tensors = {entry.path: entry for entry in model.entries.get(layout, ())}, {}
    for path, array in flatten_dict(differences, sep=".").items():
        for name, value in entries[path].scatter(np.asarray(array, np.float32)).items():
            layer, kind = _changed(name)
            tensors[f"{PREFIXES[layout]}{layer}.{kind}"] = value
    return tensors


def _changed(name: str) -> tuple[str, str]:
    """(layer, kind) under which a file keeps the difference of a tensor."""
    return name.removesuffix(".weight").removesuffix(".bias"), "diff_b" if name.endswith(".bias") else "diff"


def unread_by_diffusers(lora: PyTree, model: LoraModel) -> list[str]:
    """Why diffusers does not read such a file in ComfyUI's layout, a line each; empty: it reads all."""
    entries = {entry.path: entry for entry in model.entries.get("comfy", ())}
    found = [(model.names[path][1], kind) for path, *_ in _factors(lora) for kind in "ab"]
    found += [_changed(entries[path].names[0]) for path in flatten_dict(lora.get(DIFFERENCES, {}), sep=".")]
    ends = {"a": "lora_A.weight", "b": "lora_B.weight"}
    tensors = {f"{PREFIXES['comfy']}{layer}.{ends.get(kind, kind)}": (layer, kind) for layer, kind in found}
    return model.rules.stops(tensors)


def check_targets(family: ModelFamily) -> None:
    """Raises UserError where the Executor adapts layers that no LoRA file can hold, before it is trained."""
    if family.published is None:
        return
    lora = jax.eval_shape(lambda: family.init_lora(jax.random.key(0), family.init_base(jax.random.key(0)), rank=1))
    if lost := sorted(path for path, *_ in _factors(lora) if path not in family.published.lora_names):
        raise UserError(
            f"config.executor.targets names {', '.join(lost)}, which no LoRA file can hold: the Executor could not be"
            f" exported. Layers that can be: {', '.join(family.published.lora_names)}"
        )


def adapter_metadata(tensors: Mapping[str, np.ndarray]) -> str:
    """PEFT's settings of tensors in diffusers' layout, as JSON: alpha is the rank, in layers of another rank too."""
    prefix, suffix = PREFIXES["diffusers"], ".lora_A.weight"
    ranks = {k.removeprefix(prefix).removesuffix(suffix): len(x) for k, x in tensors.items() if k.endswith(suffix)}
    rank = max(ranks.values())
    others = {f"^{layer}": r for layer, r in ranks.items() if r != rank}
    settings = {
        "r": rank, "lora_alpha": rank, "target_modules": sorted(ranks), "rank_pattern": others, "alpha_pattern": others
    }  # fmt: skip
    return json.dumps({prefix + key: value for key, value in settings.items()}, sort_keys=True)


def _factors(lora: PyTree, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name, value in lora.items():
        if name == DIFFERENCES:
            continue
        if value.keys() == {"a", "b"} and not isinstance(value["a"], dict):
            yield prefix + name, value["a"], value["b"]
        else:
            yield from _factors(value, f"{prefix}{name}.")
