"""Models that lie in files of tensors, in a folder or alone: whose they are, by their keys, and where each part is."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.models.ltx2 import original as ltx2
from world_distill.models.ltx2.versions import TAKE as TAKE_LTX2
from world_distill.models.tensor_map import Published
from world_distill.models.wan import original as wan
from world_distill.models.wan.published import Naming
from world_distill.storage.safetensors_folder import TensorFiles
from world_distill.weights import published

TAKE_WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
TAKE = f"{TAKE_WAN} or, of LTX-2, {TAKE_LTX2}"  # what to convert in place of a file that is not read
# By part: prefixes of Wan's names in a file, and names that only it has, with whose they are.
_WAN_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "model.", ""),
    "vae": ("vae.", "first_stage_model.", ""),
}
_WAN_MARKS: dict[str, dict[str, Naming]] = {
    "transformer": {"blocks.0.self_attn.q.weight": "original", "blocks.0.attn1.to_q.weight": "diffusers"},
    "vae": {"decoder.middle.0.residual.0.gamma": "original", "decoder.mid_block.resnets.0.norm1.gamma": "diffusers"},
}
_SCALES = (".scale_weight", ".weight_scale")  # beside a weight of 8 bits, which they multiply
_BESIDE = re.compile(r".*\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)|scaled_fp8")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that can be converted.

    Attributes:
      family: name of the model family.
      layout: diffusers, original or comfyui.
      model: its sizes and entries.
      files: part -> its tensors, under the names of the entries; those of `Published.apart` among them.
      ignored: part that is not converted -> tensors of it.
    """

    family: str
    layout: str
    model: Published
    files: Mapping[str, "TensorFiles | PartView"]
    ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)


class PartView:
    """The tensors of one part in files: without what their names begin with, and with scales applied.

    `shapes` and `types` are by name; `view[name]` reads a tensor.

    Args:
      files: all tensors.
      names: short name -> name in the files.
      take: a source of the same model that can be read, for messages.
    """

    def __init__(self, files: TensorFiles, names: Mapping[str, str], take: str = TAKE_WAN):
        self._files, self._names, self._scale, self.shapes, self.types = files, names, {}, {}, {}
        self.prefix = next((full.removesuffix(short) for short, full in names.items()), "")
        for short, name in names.items():
            if short.endswith(".weight_scale_2") or (short.endswith(".weight") and files.types[name] == "U8"):
                raise UserError(
                    f"{files.folder}: {name} is quantised to 4 bits (nvfp4 or alike), which is not read; take {take}"
                )
            if _BESIDE.fullmatch(short):
                continue
            self.shapes[short], self.types[short] = files.shapes[name], files.types[name]
            layer = name.removesuffix(".weight")
            scales = (layer + end for end in _SCALES if short.endswith(".weight"))
            if scale := next((key for key in scales if key in files.shapes), None):
                self._scale[short] = scale

    @classmethod
    def after(cls, files: TensorFiles, prefix: str) -> "PartView":
        """The tensors whose names begin so."""
        return cls(files, {name.removeprefix(prefix): name for name in files.shapes if name.startswith(prefix)})

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._files[self._names[name]]
        if name not in self._scale:
            return tensor
        scale = self._files[self._scale[name]].astype(np.float32)  # one number, or one a row
        return tensor.astype(np.float32) * scale.reshape(*scale.shape, *[1] * (tensor.ndim - scale.ndim))


def open_file(path: pathlib.Path, vae: pathlib.Path | None = None) -> Source:
    """What there is to convert in a file, or in a folder of files.

    Args:
      path: where the transformer is.
      vae: file or folder of the autoencoder, where it is kept apart.

    Raises:
      UserError: nothing that is known, or parts that are missing or not built here; the message says what to do.
    """
    files = TensorFiles(path)
    found = find_part(files, "transformer")
    if found is None:
        raise UserError(f"{path} is no model that can be converted: it is {what_is(files)}")
    family, view, naming = found
    try:
        return (_open_ltx2 if family == "ltx2" else _open_wan)(path, files, view, naming, vae)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _open_wan(
    path: pathlib.Path, files: TensorFiles, view: PartView, naming: Naming, vae: pathlib.Path | None
) -> Source:
    inside = _find_wan(files, "vae")
    if vae is not None:
        inside = _find_wan(TensorFiles(vae), "vae")
        if inside is None:
            raise UserError(f"--vae {vae} is no autoencoder of Wan: it is {what_is(TensorFiles(vae))}")
    if inside is None:
        raise UserError(
            f"{path} holds the transformer alone: give its autoencoder with --vae FILE (ComfyUI's"
            f" wan2.2_vae.safetensors), or convert {TAKE_WAN}, which has both"
        )
    codec, codec_naming = inside
    if codec_naming != "original":
        raise UserError(f"--vae {vae}: name an autoencoder with its original names (wan2.2_vae.safetensors)")
    namings: dict[str, Naming] = {"transformer": naming, "vae": codec_naming}
    model = wan.describe(view.shapes, codec.shapes, settings(path), namings)
    layout = "comfyui" if view.prefix or path.is_file() else "original"
    return Source("wan", layout, model, {"transformer": view, "vae": codec})


def _open_ltx2(
    path: pathlib.Path, files: TensorFiles, view: PartView, naming: Naming, vae: pathlib.Path | None
) -> Source:
    del view  # with all names that are of no other part, below
    parts = _parts_of_ltx2(files)
    ltx2.check(files.header, parts["transformer"].shapes)
    header = files.header
    if vae is not None:
        beside_files = TensorFiles(vae)
        beside = _parts_of_ltx2(beside_files)
        if (codec := find_part(beside_files, "vae")) is None or codec[0] != "ltx2":
            raise UserError(f"--vae {vae} is no autoencoder of LTX-2: it is {what_is(beside_files)}")
        # The published file has the connectors, too, which a transformer for ComfyUI lacks.
        missing = {part: beside[part] for part in ("connectors", "text_projection") if part in beside} | parts
        parts, header = missing | {"vae": beside["vae"]}, beside_files.header | header
    if lost := [part for part in ("connectors", "vae") if part not in parts]:
        what = {"connectors": "the text connectors", "vae": "the autoencoder"}
        raise UserError(
            f"{path} lacks {' and '.join(what[part] for part in lost)} of its model: give --vae with the published"
            f" file, from which missing parts are taken; or convert {TAKE_LTX2}"
        )
    model = ltx2.describe(header, {part: found.shapes for part, found in parts.items()}, naming)
    ignored = {part: len(parts.pop(part).shapes) for part in ltx2.BESIDE if part in parts}
    return Source("ltx2", "original", model, parts, ignored)


def _parts_of_ltx2(files: TensorFiles) -> dict[str, PartView]:
    """Part -> its tensors; what is of no other part is the transformer's."""
    names: dict[str, dict[str, str]] = {}
    for name in files.shapes:
        part, begins = next((part, match) for part, text in ltx2.PARTS.items() if (match := re.match(text, name)))
        names.setdefault(part, {})[name[begins.end() :]] = name
    return {part: PartView(files, found, TAKE_LTX2) for part, found in names.items()}


def find_part(files: TensorFiles, part: str) -> tuple[str, PartView, Naming] | None:
    """(family, view, whose names it has) of a part of a model in files; None where they lack it."""
    if found := _find_wan(files, part):
        return "wan", *found
    begins = re.compile(ltx2.PARTS[part])
    ends = {name: begins.sub("", name, count=1) for name in files.shapes if begins.match(name)}
    for mark, naming in ltx2.MARKS[part].items():
        if mark in ends.values():
            return "ltx2", PartView(files, {short: name for name, short in ends.items()}, TAKE_LTX2), naming
    return None


def _find_wan(files: TensorFiles, part: str) -> tuple[PartView, Naming] | None:
    for prefix in _WAN_PREFIXES.get(part, ()):
        for mark, naming in _WAN_MARKS[part].items():
            if prefix + mark in files.shapes:
                return PartView.after(files, prefix), naming
    return None


TITLES = {"wan": "Wan", "ltx2": "LTX-2"}
_KINDS = {
    "transformer": "a transformer of {}", "vae": "an autoencoder of {} (--vae)", "connectors": "text connectors of {}"
}  # fmt: skip


def what_is(files: TensorFiles) -> str:
    """What a file of another kind than asked for is, in words, by its keys."""
    names = files.shapes
    if any("lora" in name for name in names):
        return "a LoRA file (generate --executor, or --config.executor.start of train)"
    for part, words in _KINDS.items():
        if found := find_part(files, part):
            return words.format(TITLES[found[0]])
        if part == "transformer" and any("transformer_blocks." in name for name in names):
            return wan.OTHERS["transformer_blocks."]  # whatever is beside it
    if any(name.endswith(("shared.weight", "token_embedding.weight")) for name in names):
        return "a text encoder"
    for mark, what in wan.OTHERS.items():
        if any(mark in name for name in names):
            return what
    return f"of another kind; its first tensor is {min(names, default='missing')}"


def settings(path: pathlib.Path) -> dict[str, Any]:
    """The original repository's config.json, which lies beside its files."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    return {k: v for k, v in published.read_config(file).items() if not k.startswith("_")}
