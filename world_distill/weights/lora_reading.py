"""Tensors of a LoRA file to our Executor: `scale a b` on kernels, and differences of other weights.

For every adapted layer a file keeps `lora_A` [r i] and `lora_B` [o r], and adds `alpha / r lora_B lora_A` to the weight
[o i]; we add `scale a b` to the kernel [i o]. Which names there are stands in `lora_names`. Nothing here reads files.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from world_distill.models.lora import DIFFERENCES
from world_distill.models.tensor_map import Entry
from world_distill.structs import PyTree
from world_distill.weights import lora_names
from world_distill.weights.lora_layouts import METADATA_KEY, LoraModel

# Kinds of adapters that PEFT's settings may say (`peft_type`).
_PLAIN = (None, "LORA")


class _Layer(NamedTuple):
    path: str  # in our tree
    block: int  # along our leading axis; 0 where there is none
    name: str  # in diffusers


class _Weight(NamedTuple):
    entry: Entry
    block: int


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
) -> Reading:
    """Our Executor, float32, from the tensors of a LoRA file: `scale a b` is the change that the file makes.

    Names are those of `lora_names`. Alpha is a layer's tensor `alpha`, or what the settings of PEFT say, or the rank.
    All our factors get the largest rank of the file: missing entries are zero in `a` and in `b`, whole blocks that the
    file does not adapt among them. Such entries compute nothing, and get no gradient either: training goes on with what
    the file adapts.

    Args:
      tensors: by name.
      metadata: the file's header.
      model: what LoRA files may change.
      scale: of our product, not 0.
      without: parts of `lora_names.LEFT_OUT` that are not read.

    Raises:
      ValueError: no LoRA; another kind of adapter; a part that this model does not have or hold, and `without` does not
        name; layers that the model lacks or whose sizes are others; one factor without the other; a layer twice; values
        that are not finite. The tensors are named.
    """
    if unknown := set(without) - lora_names.LEFT_OUT.keys():
        raise ValueError(
            f"{', '.join(sorted(unknown))} cannot be left out; these can: {', '.join(lora_names.LEFT_OUT)}"
        )
    _check_finite(tensors)
    settings = _settings(metadata)
    _check_kind(tensors, settings)
    left_out: dict[str, list[str]] = {}
    for key in tensors:
        if part := lora_names.other_part(key):
            left_out.setdefault(part, []).append(key)
    gone = {key for found in left_out.values() for key in found}
    keys = {key: lora_names.parse(key) for key in tensors if key not in gone}
    if not any(key.part in ("a", "b") or key.part.startswith("diff") for key in keys.values()):
        raise ValueError(f"it holds no LoRA of a video transformer, but {some(tensors) or 'nothing'}")
    if strange := [key for key, found in keys.items() if not found.part]:
        raise ValueError(f"it holds more than LoRA, which would be lost: {some(strange)}")
    changes = {key: found for key, found in keys.items() if found.part.startswith("diff")}
    factors = {key: found for key, found in keys.items() if key not in changes}
    weights = _weights(model, changes)
    for key, found in changes.items():
        if (part := _part_of(found)) in without:
            left_out.setdefault(part, []).append(key)
    _check_left_out(left_out, without)
    changes = {key: found for key, found in changes.items() if _part_of(found) not in left_out}

    _check_layers(tensors, {key: lora_names.flat(found.layer) for key, found in factors.items()}, model)
    result = Reading({}, left_out, {}, {}, {}, [])
    flat = _read_factors(tensors, factors, settings, model, scale, result)
    differences = _read_differences(tensors, changes, weights, result)
    result.tree = unflatten_dict(flat, sep=".")
    if differences:
        result.tree[DIFFERENCES] = unflatten_dict(differences, sep=".")
    return result


def _read_factors(tensors, factors, settings, model: LoraModel, scale: float, result: Reading) -> dict[str, Any]:
    """Dotted path -> factors `a` and `b`, of all layers that the file adapts."""
    misfits, changes = [], {}
    for layer, slot in _sort(factors, _layers(model)).items():
        *_, i, o = model.shapes[layer.path]
        down, up = (np.asarray(tensors[slot[part]], np.float32) for part in ("a", "b"))
        rank = down.shape[0] if down.ndim else 0
        # A convolution has its window's axes at the end of `lora_A`, and axes of length 1 in `lora_B`.
        flat, kernel = down.reshape(rank, -1) if rank else down, model.kernels.get(layer.path)
        if not rank or flat.shape != (rank, i) or up.shape[:2] != (o, rank) or up.size != o * rank:
            found = f"{slot['a']} {list(down.shape)} with {list(up.shape)}"
            misfits.append(f"{found} where {layer.path} needs [r, {i}] with [{o}, r]")
            continue
        a = flat.T if kernel is None else kernel.ours(flat.reshape(rank, *kernel.shape[1:]))
        alpha = float(tensors[slot["alpha"]].item()) if "alpha" in slot else None
        strength = _strength(settings, layer.name, alpha, rank)
        changes[layer] = a, up.reshape(o, rank).T * np.float32(strength / scale)
        result.ranks[rank] = result.ranks.get(rank, 0) + 1
        result.strengths[strength] = result.strengths.get(strength, 0) + 1
    if misfits:
        raise ValueError(f"it was made for a model of other sizes: {some(misfits, '; ')}")
    # PEFT keeps alpha beside its files; everyone else who writes none means the rank.
    of_peft = any(key.startswith("base_model.") for key in factors)
    if of_peft and not settings and not any(found.part == "alpha" for found in factors.values()):
        result.notes.append(
            "PEFT wrote it, and adapter_config.json is not beside it, so alpha is taken to be the rank (strength 1)"
        )

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


def _read_differences(tensors, changes, weights: Mapping[str, _Weight], result: Reading) -> dict[str, np.ndarray]:
    """Dotted path -> difference of our array, zero in blocks that the file does not change."""
    found: dict[str, np.ndarray] = {}
    for key, parsed in changes.items():
        entry, block = weights[key]
        value = np.asarray(tensors[key], np.float32)
        if value.size != math.prod(entry.shape):
            raise ValueError(
                f"it was made for a model of other sizes: {key} is {list(value.shape)}, not {list(entry.shape)}"
            )
        ours = entry.ours(value.reshape(entry.shape))
        if entry.path not in found:
            found[entry.path] = np.zeros((entry.blocks, *ours.shape) if entry.blocks else ours.shape, np.float32)
        found[entry.path][(block,) if entry.blocks else ()] += ours
        part = _part_of(parsed)
        result.held[part] = result.held.get(part, 0) + 1
    return found


# ---- Which layer a name means


def _layers(model: LoraModel) -> dict[str, _Layer]:
    """Every name that a file may have for a layer of the model: without prefixes, and flat."""
    layers = {}
    for path in model.names.keys() & model.shapes.keys():
        for n in range(model.shapes[path][0] if "{n}" in model.names[path][0] else 1):
            theirs, original = (name.format(n=n) for name in model.names[path])
            for name in (theirs, original):
                layers[lora_names.flat(name)] = _Layer(path, n, theirs)
    return layers


def _sort(keys: Mapping[str, lora_names.Key], layers: Mapping[str, _Layer]) -> dict[_Layer, dict[str, str]]:
    """Layer -> names of its tensors, by part: a, b, and alpha where there is one."""
    slots: dict[_Layer, dict[str, str]] = {}
    for key, found in keys.items():
        slot = slots.setdefault(layers[lora_names.flat(found.layer)], {})
        if found.part in slot:
            raise ValueError(f"it has the same thing under two names, {slot[found.part]} and {key}: remove one")
        slot[found.part] = key
    if lonely := [next(iter(slot.values())) for slot in slots.values() if not {"a", "b"} <= slot.keys()]:
        raise ValueError(f"it has one factor without the other, so it was cut or badly saved: {some(lonely)}")
    return slots


def _weights(model: LoraModel, changes: Mapping[str, lora_names.Key]) -> dict[str, _Weight]:
    """The array that each difference changes."""
    entries = [entry for layout in model.entries.values() for entry in layout]
    tensors = {name: _Weight(entry, n) for entry in entries for n, name in enumerate(entry.names)}
    by_name = {lora_names.flat(name): weight for name, weight in tensors.items()}
    found = {}
    for key, (layer, part) in changes.items():
        ends = {"diff": ("weight", ""), "diff_b": ("bias",), "diff_m": ("modulation", "scale_shift_table")}[part]
        names = [lora_names.flat(f"{layer}.{end}" if end else layer) for end in ends]
        weight = next((by_name[name] for name in names if name in by_name), None)
        if weight is None:
            known = "" if entries else " (only linear layers' weights can be adapted here)"
            raise ValueError(f"it changes {key}, which this model lacks{known}")
        found[key] = weight
    return found


def _part_of(found: lora_names.Key) -> str:
    """The part of `lora_names.LEFT_OUT` that a difference belongs to."""
    if "norm" in found.layer:
        return lora_names.NORMS
    if found.part == "diff_m" or "modulation" in found.layer or "scale_shift_table" in found.layer:
        return lora_names.MODULATION
    return lora_names.BIASES if found.part == "diff_b" else lora_names.WEIGHTS


# ---- What is refused


def _check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    if broken := [key for key, x in tensors.items() if not np.isfinite(np.asarray(x, np.float32)).all()]:
        raise ValueError(f"it holds values that are not finite, so every frame would be black: {some(broken)}")


def _check_kind(keys: Iterable[str], settings: Mapping[str, Any]) -> None:
    kinds: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        if kind := lora_names.refused_kind(key):
            kinds.setdefault(kind, []).append(key)
    for (kind, reason), found in kinds.items():
        raise ValueError(f"it is {_an(kind)}, which is not read here: {reason}. {some(found)}")
    if settings.get("peft_type") not in _PLAIN or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings["peft_type"]
        raise ValueError(f"its settings say that it is {_an(kind)}; plain LoRA is read here")


def _an(kind: str) -> str:
    return f"{'an' if kind[0] in 'aAO' else 'a'} {kind}"


def _check_left_out(left_out: Mapping[str, Collection[str]], without: Collection[str]) -> None:
    for part, keys in left_out.items():
        if part not in without:
            raise ValueError(
                f"it also holds {lora_names.LEFT_OUT[part]}: {some(keys)}. To go on without: --without {part} of"
                f" generate, config.executor.start_without of training"
            )


def _check_layers(tensors, layer_of: Mapping[str, str], model: LoraModel) -> None:
    """Raises ValueError where the file adapts layers that the model lacks."""
    layers = _layers(model)
    unknown = [key for key, layer in layer_of.items() if layer not in layers]
    theirs = sizes_of({key: tuple(tensors[key].shape) for key in layer_of})
    ours = model.sizes
    if theirs and ours and (theirs[0] > ours[0] or theirs[1] != ours[1]):
        first = [layer for layer in layer_of.values() if re.sub(r"\d+", "0", layer, count=1) in layers]
        if first:
            raise ValueError(
                f"it was made for a model of other sizes: {theirs[0]} block{'s' * (theirs[0] > 1)} of width {theirs[1]}"
                f"{known_as(theirs, model.known_sizes)}; this model has {ours[0]} of width {ours[1]}"
            )
    if unknown:
        part = "none" if len(unknown) == len(layer_of) else "not all"
        raise ValueError(f"it is of another model: {part} of its layers are this one's; {some(unknown)}")


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(blocks, width) of the model that a LoRA file was made for, from its tensors' shapes; None where it says none."""
    numbers, widths = set(), collections.Counter()
    for key, shape in shapes.items():
        found = lora_names.parse(key)
        match = re.match(r"blocks[._](\d+)[._]", found.layer)
        if match and found.part == "a" and len(shape) == 2:
            numbers.add(int(match[1]))
            widths[shape[1]] += 1
    return (max(numbers) + 1, widths.most_common(1)[0][0]) if numbers else None


def known_as(sizes: tuple[int, int], known: Mapping[tuple[int, int], str]) -> str:
    """A colon and the name of the published model of these sizes; nothing for other sizes."""
    return f": {known[sizes]}'s" if sizes in known else ""


# ---- How strong


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT was set to, as far as the file says."""
    try:
        found = json.loads(metadata.get(METADATA_KEY, "{}"))
        return {key.removeprefix("transformer."): value for key, value in found.items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"its {METADATA_KEY}, which says how strong it is, is not the JSON of a dict") from error


def _strength(settings: Mapping[str, Any], name: str, alpha: float | None, rank: int) -> float:
    """What PEFT multiplies lora_B lora_A by."""
    if alpha is not None:
        return alpha / rank
    patterns = settings.get("alpha_pattern") or {}
    chosen = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    set_to = next(chosen, settings.get("lora_alpha", rank))
    return set_to / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def some(items: Collection[str], separator: str = ", ", shown: int = 4) -> str:
    """The first few, and how many more there are."""
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(sorted(items)[:shown]) + rest
