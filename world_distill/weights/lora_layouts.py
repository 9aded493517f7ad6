"""LoRA factors under the names of other projects: diffusers (PEFT's layout), and the original code (ComfyUI).

For every adapted layer both keep `lora_A` [r i] and `lora_B` [o r], and add `alpha / r lora_B lora_A` to the weight
[o i]; we add `scale a b` to the kernel [i o]. What is written here has alpha = r, with our scale in `lora_B`: readers
that know nothing of alpha, or lose it, compute the same. Nothing here reads files.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from world_distill.structs import PyTree

Layout = Literal["diffusers", "comfy"]
METADATA_KEY = "lora_adapter_metadata"  # of the header in which diffusers keeps PEFT's settings, as JSON

_PREFIXES = {"diffusers": "transformer.", "comfy": "diffusion_model."}
_KEY = re.compile(
    r"(?P<layer>.+)\.((?P<a>lora_A|lora_down)|(?P<b>lora_B|lora_up))(\.default)?\.weight|(?P<scaled>.+)\.alpha"
)


class _Layer(NamedTuple):
    path: str  # in our tree
    block: int  # along our leading axis; 0 where there is none
    name: str  # in diffusers


# ---- Ours to theirs


def lora_tensors(
    lora: PyTree, names: Mapping[str, tuple[str, str]], *, scale: float, layout: Layout
) -> dict[str, np.ndarray]:
    """Tensors of a LoRA file, float32, by name.

    Args:
      lora: factors `a` [i r] and `b` [r o], or [layers i r] and [layers r o], in a tree like the base's.
      names: our path -> (name in diffusers, original name); `{n}` in it is the number of a block.
      scale: of our product.
      layout: whose names.

    Raises:
      ValueError: a full Executor, which no LoRA file can hold, or a layer without a name there.
    """
    if "full" in lora:
        raise ValueError("a full Executor is no LoRA: merge it into the base and publish the weights")
    tensors = {}
    for path, a, b in sorted(_factors(lora), key=lambda item: item[0]):
        if path not in names:
            raise ValueError(f"layer {path} has no name in LoRA files: leave it out of the Executor's targets")
        name = _PREFIXES[layout] + names[path][layout == "comfy"]
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        for n, (down, up) in enumerate(zip(a, b, strict=True) if "{n}" in name else [(a, b)]):
            layer = name.format(n=n)
            tensors[f"{layer}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{layer}.lora_B.weight"] = np.ascontiguousarray(np.float32(scale) * up.T)
    return tensors


def adapter_metadata(tensors: Mapping[str, np.ndarray]) -> str:
    """PEFT's settings of tensors in diffusers' layout, as JSON: alpha is the rank, in layers of another rank too."""
    prefix, suffix = _PREFIXES["diffusers"], ".lora_A.weight"
    ranks = {k.removeprefix(prefix).removesuffix(suffix): len(x) for k, x in tensors.items() if k.endswith(suffix)}
    rank = max(ranks.values())
    others = {f"^{layer}": r for layer, r in ranks.items() if r != rank}
    settings = {
        "r": rank, "lora_alpha": rank, "target_modules": sorted(ranks), "rank_pattern": others, "alpha_pattern": others
    }  # fmt: skip
    return json.dumps({prefix + key: value for key, value in settings.items()}, sort_keys=True)


def _factors(lora: PyTree, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name, value in lora.items():
        if value.keys() == {"a", "b"} and not isinstance(value["a"], dict):
            yield prefix + name, value["a"], value["b"]
        else:
            yield from _factors(value, f"{prefix}{name}.")


# ---- Theirs to ours


def lora_tree(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    names: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    scale: float,
) -> PyTree:
    """Our factors, float32, from the tensors of a LoRA file: `scale a b` is the change that the file makes.

    Names are diffusers' or the original ones, with their usual prefix or none, or joined by underscores after
    `lora_unet_`; matrices are called lora_A and lora_B or lora_down and lora_up. Alpha is a layer's tensor `alpha`, or
    what the settings of PEFT say, or the rank. All our factors get the largest rank of the file: what is missing is
    zero in `a` and in `b`, whole blocks that the file does not adapt among them. Such entries compute nothing, and get
    no gradient either: training goes on with what the file adapts.

    Args:
      tensors: by name.
      metadata: the file's header.
      names: our path -> (name in diffusers, original name); `{n}` in it is the number of a block.
      shapes: our path -> shape of the base's kernel, [i o] or [layers i o].
      scale: of our product, not 0.

    Raises:
      ValueError: no LoRA, changes that are no LoRA (biases, norms, magnitudes), layers that the model lacks or whose
        sizes are others, one factor without the other, a layer twice. The tensors are named.
    """
    slots = _sort(tensors, _layers(names, shapes))
    settings = _settings(metadata)
    misfits, changes = [], {}
    for layer, keys in slots.items():
        *_, i, o = shapes[layer.path]
        down, up = (np.asarray(tensors[keys[part]], np.float32) for part in ("a", "b"))
        rank = down.shape[0] if down.ndim else 0
        if not rank or down.shape != (rank, i) or up.shape != (o, rank):
            found = f"{keys['a']} {list(down.shape)} with {list(up.shape)}"
            misfits.append(f"{found} where {layer.path} needs [r, {i}] with [{o}, r]")
            continue
        alpha = float(tensors[keys["alpha"]].item()) if "alpha" in keys else None
        changes[layer] = down.T, up.T * np.float32(_strength(settings, layer.name, alpha, rank) / scale)
    if misfits:
        raise ValueError(f"it was made for a model of other sizes: {_some(misfits, '; ')}")

    rank = max(a.shape[1] for a, _ in changes.values())
    factors = {}
    for path in sorted({layer.path for layer in changes}):
        *stack, i, o = shapes[path]
        a, b = np.zeros((*stack, i, rank), np.float32), np.zeros((*stack, rank, o), np.float32)
        for layer, (down, up) in changes.items():
            if layer.path == path:
                at = (layer.block,) if stack else ()
                a[*at, :, : len(up)], b[*at, : len(up)] = down, up
        factors[path] = {"a": a, "b": b}
    return unflatten_dict(factors, sep=".")


def _layers(names: Mapping[str, tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Layer]:
    """Every name that a file may have for a layer of the model."""
    layers = {}
    for path in names.keys() & shapes.keys():
        for n in range(shapes[path][0] if "{n}" in names[path][0] else 1):
            theirs, original = (name.format(n=n) for name in names[path])
            spellings = (theirs, f"transformer.{theirs}", original, f"diffusion_model.{original}")
            for name in (*spellings, "lora_unet_" + original.replace(".", "_")):
                layers[name] = _Layer(path, n, theirs)
    return layers


def _sort(tensors: Collection[str], layers: Mapping[str, _Layer]) -> dict[_Layer, dict[str, str]]:
    """Layer -> names of its tensors, by part: a, b, and alpha where there is one."""
    matches = {key: _KEY.fullmatch(key) for key in tensors}
    if not any(match and match["layer"] for match in matches.values()):
        raise ValueError(f"it holds no LoRA, but {_some(tensors) or 'nothing'}")
    known = {key: match for key, match in matches.items() if match}
    if strange := [key for key in matches if key not in known]:
        raise ValueError(
            "it holds more than LoRA factors, which would be lost (only linear layers' weights can be adapted; export "
            f"it without changes of biases, norms or magnitudes): {_some(strange)}"
        )
    if unknown := [key for key, match in known.items() if (match["layer"] or match["scaled"]) not in layers]:
        part = "none" if len(unknown) == len(tensors) else "not all"
        raise ValueError(f"it is of another model: {part} of its tensors belong to this one's layers; {_some(unknown)}")
    slots: dict[_Layer, dict[str, str]] = {}
    for key, match in known.items():
        slot = slots.setdefault(layers[match["layer"] or match["scaled"]], {})
        part = "a" if match["a"] else "b" if match["b"] else "alpha"
        if part in slot:
            raise ValueError(f"it has the same thing under two names, {slot[part]} and {key}: remove one")
        slot[part] = key
    if lonely := [next(iter(slot.values())) for slot in slots.values() if not {"a", "b"} <= slot.keys()]:
        raise ValueError(f"it has one factor without the other, so it was cut or badly saved: {_some(lonely)}")
    return slots


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT was set to, as far as the file says."""
    try:
        found = json.loads(metadata.get(METADATA_KEY, "{}"))
        return {key.removeprefix(_PREFIXES["diffusers"]): value for key, value in found.items()}
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


def _some(items: Collection[str], separator: str = ", ", shown: int = 4) -> str:
    """The first few, and how many more there are."""
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(sorted(items)[:shown]) + rest
