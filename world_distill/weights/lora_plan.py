"""Tensors of a LoRA file, by name and shape: what each changes in which layer, how strongly, and what is refused.

For every adapted layer a file keeps `lora_A` [r i] and `lora_B` [o r], and adds `alpha / r lora_B lora_A` to the weight
[o i]. Which names there are stands in `lora_names`. Nothing here reads files or, but for alpha, values.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from world_distill.models.tensor_map import Entry
from world_distill.weights import lora_names
from world_distill.weights.lora_layouts import METADATA_KEY, LoraModel

# Kinds of adapters that PEFT's settings may say (`peft_type`).
_PLAIN = (None, "LORA")


class Layer(NamedTuple):
    """A linear layer of one block."""

    path: str  # in our tree
    block: int  # along our leading axis; 0 where there is none
    name: str  # in diffusers


class Factors(NamedTuple):
    """Names of a layer's two factors, and what their product is multiplied by."""

    down: str
    up: str
    strength: float


class Weight(NamedTuple):
    """An array of one block, by its entry."""

    entry: Entry
    block: int


@dataclasses.dataclass
class Plan:
    """What each tensor of a LoRA file changes, and how strongly.

    Attributes:
      factors: layer -> its factors.
      differences: key of a tensor that is added as it is -> the weight.
      left_out: part of `lora_names.LEFT_OUT` -> keys that are not read.
      ranks: rank -> layers.
      strengths: alpha / rank -> layers.
      notes: what the reader had to assume.
    """

    factors: dict[Layer, Factors]
    differences: dict[str, Weight]
    left_out: dict[str, list[str]]
    ranks: dict[int, int]
    strengths: dict[float, int]
    notes: list[str]


def plan(
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    model: LoraModel,
    *,
    without: Collection[str] = (),
    alpha: float | None = None,
    may_leave_out: bool = True,
) -> Plan:
    """What each tensor of a LoRA file changes. Of their values, only `alpha` is read.

    Names are those of `lora_names`. Alpha is a layer's tensor `alpha`, or what the settings of PEFT say, or the
    argument, or the rank.

    Args:
      tensors: by name; what has a `shape` and becomes an array for numpy.
      metadata, model, without, alpha: as for `lora_reading.read`.
      may_leave_out: whether the caller has a flag for `without`, which errors then name.

    Raises:
      ValueError: no LoRA; another kind of adapter; a part that this model does not have or hold, and `without` does not
        name; layers that the model lacks or whose sizes are others; one factor without the other; a layer twice;
        `alpha` for a file that says its own. The tensors are named.
    """
    if unknown := set(without) - lora_names.LEFT_OUT.keys():
        raise ValueError(
            f"{', '.join(sorted(unknown))} cannot be left out; these can: {', '.join(lora_names.LEFT_OUT)}"
        )
    settings = _settings(metadata)
    _check_kind(tensors, settings, metadata)
    layers = _layers(model)
    left_out = other_parts(tensors, model)
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
        if (part := part_of(found)) in without:
            left_out.setdefault(part, []).append(key)
    _check_left_out(left_out, without, may_leave_out)
    _check_layers(tensors, {key: lora_names.flat(found.layer) for key, found in factors.items()}, model, layers)

    result = Plan({}, {}, left_out, {}, {}, [])
    _plan_factors(tensors, factors, settings, model, alpha, result)
    gone = {key for found in left_out.values() for key in found}
    for key in (key for key in changes if key not in gone):
        entry, _ = result.differences[key] = weights[key]
        if math.prod(tensors[key].shape) != math.prod(entry.shape):
            raise ValueError(
                f"it was made for a model of other sizes: {key} is {list(tensors[key].shape)}, not {list(entry.shape)}"
            )
    return result


def other_parts(keys: Iterable[str], model: LoraModel) -> dict[str, list[str]]:
    """Part of `lora_names.LEFT_OUT` -> keys that belong to it and to no layer of the model."""
    layers, absent = _layers(model), {lora_names.flat(name) for names in model.absent for name in names}
    found: dict[str, list[str]] = {}
    for key in keys:
        layer = lora_names.flat(lora_names.parse(key).layer)
        if layer in layers:
            continue
        is_absent = re.sub(r"(?<=blocks_)\d+", "{n}", layer, count=1) in absent
        if part := lora_names.AUDIO if is_absent else lora_names.other_part(key):
            found.setdefault(part, []).append(key)
    return found


def _plan_factors(tensors, factors, settings, model: LoraModel, given: float | None, result: Plan) -> None:
    """Finds the factors of all layers that the file adapts, and their strengths."""
    says_alpha = "lora_alpha" in settings or any(found.part == "alpha" for found in factors.values())
    if given is not None and says_alpha:
        raise ValueError(f"it says its alpha, so alpha = {given:g} is not for it: leave that out")
    misfits = []
    for layer, slot in _sort(factors, _layers(model)).items():
        *_, i, o = model.shapes[layer.path]
        down, up = (tuple(tensors[slot[part]].shape) for part in ("a", "b"))
        # A convolution has its window's axes at the end of `lora_A`, and axes of length 1 in `lora_B`.
        rank = down[0] if down else 0
        if not rank or math.prod(down) != rank * i or up[:2] != (o, rank) or math.prod(up) != o * rank:
            misfits.append(f"{slot['a']} {list(down)} with {list(up)} where {layer.path} needs [r, {i}] with [{o}, r]")
            continue
        alpha = float(np.asarray(tensors[slot["alpha"]], np.float32).item()) if "alpha" in slot else None
        strength = _strength(settings, layer.name, alpha, rank, given)
        result.factors[layer] = Factors(slot["a"], slot["b"], strength)
        result.ranks[rank] = result.ranks.get(rank, 0) + 1
        result.strengths[strength] = result.strengths.get(strength, 0) + 1
    if misfits:
        raise ValueError(f"it was made for a model of other sizes: {some(misfits, '; ')}")
    # PEFT keeps alpha beside its files; everyone else who writes none means the rank.
    if any(key.startswith("base_model.") for key in factors) and not settings and not says_alpha and given is None:
        result.notes.append(
            "PEFT wrote it, and adapter_config.json is not beside it, so alpha is taken to be the rank (strength 1);"
            " if training had another, give it"
        )


# ---- Which layer a name means


def _layers(model: LoraModel) -> dict[str, Layer]:
    """Every name that a file may have for a layer of the model: without prefixes, and flat."""
    layers = {}
    for path in model.names.keys() & model.shapes.keys():
        for n in range(model.shapes[path][0] if "{n}" in model.names[path][0] else 1):
            theirs, original = (name.format(n=n) for name in model.names[path])
            for name in (theirs, original):
                layers[lora_names.flat(name)] = Layer(path, n, theirs)
    return layers


def _sort(keys: Mapping[str, lora_names.Key], layers: Mapping[str, Layer]) -> dict[Layer, dict[str, str]]:
    """Layer -> names of its tensors, by part: a, b, and alpha where there is one."""
    slots: dict[Layer, dict[str, str]] = {}
    for key, found in keys.items():
        slot = slots.setdefault(layers[lora_names.flat(found.layer)], {})
        if found.part in slot:
            raise ValueError(f"it has the same thing under two names, {slot[found.part]} and {key}: remove one")
        slot[found.part] = key
    if lonely := [next(iter(slot.values())) for slot in slots.values() if not {"a", "b"} <= slot.keys()]:
        raise ValueError(f"it has one factor without the other, so it was cut or badly saved: {some(lonely)}")
    return slots


def _weights(model: LoraModel, changes: Mapping[str, lora_names.Key]) -> dict[str, Weight]:
    """The array that each difference changes."""
    entries = [entry for layout in model.entries.values() for entry in layout]
    tensors = {name: Weight(entry, n) for entry in entries for n, name in enumerate(entry.names)}
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


def part_of(found: lora_names.Key) -> str:
    """The part of `lora_names.LEFT_OUT` that a difference belongs to."""
    if "norm" in found.layer:
        return lora_names.NORMS
    if found.part == "diff_m" or "modulation" in found.layer or "scale_shift_table" in found.layer:
        return lora_names.MODULATION
    return lora_names.BIASES if found.part == "diff_b" else lora_names.WEIGHTS


# ---- What is refused


def _check_kind(keys: Iterable[str], settings: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    if mark := next((f"{key} = {metadata[key]}" for key in lora_names.REFERENCES if key in metadata), None):
        raise ValueError(f"it is an IC-LoRA ({mark}), which needs a reference clip; nothing here gives it one")
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


def _check_left_out(left_out: Mapping[str, Collection[str]], without: Collection[str], may_leave_out: bool) -> None:
    for part, keys in left_out.items():
        if part not in without:
            flags = f"--without {part} of generate, config.executor.start_without of training"
            way = f". To go on without: {flags}" if may_leave_out else ""
            raise ValueError(f"it also holds {lora_names.LEFT_OUT[part]}: {some(keys)}{way}")


def _check_layers(tensors, layer_of: Mapping[str, str], model: LoraModel, layers: Collection[str]) -> None:
    """Raises ValueError where the file adapts layers that the model lacks."""
    unknown = [key for key, layer in layer_of.items() if layer not in layers]
    # By layers that are called as here, in whichever block.
    alike = [key for key, layer in layer_of.items() if re.sub(r"\d+", "0", layer, count=1) in layers]
    theirs, ours = sizes_of({key: tuple(tensors[key].shape) for key in alike}), model.sizes
    if theirs and ours and (theirs[0] > ours[0] or theirs[1] not in model.widths):
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
        match = re.match(r"(?:transformer_)?blocks[._](\d+)[._]", found.layer)
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


def _strength(
    settings: Mapping[str, Any], name: str, alpha: float | None, rank: int, given: float | None = None
) -> float:
    """What PEFT multiplies lora_B lora_A by."""
    if alpha is not None:
        return alpha / rank
    patterns = settings.get("alpha_pattern") or {}
    chosen = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    set_to = next(chosen, settings.get("lora_alpha", rank if given is None else given))
    return set_to / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def some(items: Collection[str], separator: str = ", ", shown: int = 4) -> str:
    """The first few, and how many more there are."""
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(sorted(items)[:shown]) + rest
