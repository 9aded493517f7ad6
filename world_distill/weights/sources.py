"""What `convert` reads: published models in the layouts that people have, recognised by their keys.

    diffusers   a folder with transformer/ and vae/, or a model on the Hugging Face hub, NAME or NAME@REVISION
    original    the repository of the authors: sharded files of bare names (`blocks.0.self_attn.q.weight`)
    comfyui     one file, its names after `model.diffusion_model.`; weights may be 8-bit floats with a scale

The last two keep the autoencoder in another file (`--vae`), unless the one file holds it, too.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.models.tensor_map import Published
from world_distill.models.wan import original
from world_distill.models.wan.published import Naming
from world_distill.storage.safetensors_folder import FLOATS_8, TensorFiles, open_tensors
from world_distill.weights import published

TAKE = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"  # what to convert in place of a file that is not read
_ORIGINALS = {"Wan-AI/Wan2.2-TI2V-5B": TAKE}  # repositories of the original layout, whose autoencoder is a pickle
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl")
# By part: prefixes of its names in a file, and names that only it has, with whose they are.
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "model.", ""),
    "vae": ("vae.", "first_stage_model.", ""),
}
_MARKS: dict[str, dict[str, Naming]] = {
    "transformer": {"blocks.0.self_attn.q.weight": "original", "blocks.0.attn1.to_q.weight": "diffusers"},
    "vae": {"decoder.middle.0.residual.0.gamma": "original", "decoder.mid_block.resnets.0.norm1.gamma": "diffusers"},
}
_SCALES = (".scale_weight", ".weight_scale")  # beside a weight of 8 bits, which they multiply
_BESIDE = re.compile(r".*\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)|scaled_fp8")


@dataclasses.dataclass(frozen=True)
class Located:
    """Where a source is, and what is known of its origin.

    Attributes:
      path: folder or file here.
      source: as it was named.
      revision: commit on the hub; "" where it is not known.
      license: as its README.md says; "" where it says none.
    """

    path: pathlib.Path
    source: str
    revision: str = ""
    license: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that can be converted.

    Attributes:
      family: name of the model family.
      layout: diffusers, original or comfyui.
      model: its sizes and entries.
      files: part -> its tensors, under the names of the entries.
    """

    family: str
    layout: str
    model: Published
    files: Mapping[str, "TensorFiles | PartView"]


class PartView:
    """The tensors of one part in a file: without their prefix, and with scales applied.

    `shapes` and `types` are by name; `view[name]` reads a tensor.
    """

    def __init__(self, files: TensorFiles, prefix: str):
        self.prefix, self._files, self.shapes, self.types = prefix, files, {}, {}
        names = [name for name in files.shapes if name.startswith(prefix)]
        self._scale = {}
        for name in names:
            short = name.removeprefix(prefix)
            if short.endswith(".weight_scale_2") or (short.endswith(".weight") and files.types[name] == "U8"):
                raise UserError(
                    f"{files.folder}: {name} is quantised to 4 bits (nvfp4 or alike), which is not read; take {TAKE}"
                )
            if _BESIDE.fullmatch(short):
                continue
            self.shapes[short], self.types[short] = files.shapes[name], files.types[name]
            layer = short.removesuffix(".weight")
            scales = (prefix + layer + end for end in _SCALES if short.endswith(".weight"))
            if scale := next((key for key in scales if key in files.shapes), None):
                self._scale[short] = scale

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._files[self.prefix + name]
        if name not in self._scale:
            return tensor
        scale = self._files[self._scale[name]].astype(np.float32)  # one number, or one a row
        return tensor.astype(np.float32) * scale.reshape(*scale.shape, *[1] * (tensor.ndim - scale.ndim))


# ---- Where it is


def locate(source: str) -> Located:
    """The folder or file that `source` names; downloaded if it looks like a model on the Hugging Face hub.

    Raises:
      UserError: it cannot be had, or is of a kind that is not read; the message says what to take.
    """
    path = pathlib.Path(source)
    if path.exists():
        return Located(path, source, _local_revision(path), _license(path))
    if "://" in source:
        raise UserError(f"{source} is an address; download it, and name the folder or file{_hub_hint(source)}")
    match = _HUB_NAME.fullmatch(source)
    if match is None or path.suffix in (*_PICKLES, ".safetensors", ".gguf"):
        return Located(path, source)
    name, revision = match["name"], match["revision"]
    if name in _ORIGINALS:
        raise UserError(
            f"{name} holds the original layout, whose autoencoder is a pickle, which is not read: take"
            f" {_ORIGINALS[name]}. (A folder of {name} converts with --vae FILE, ComfyUI's autoencoder)"
        )
    if "gguf" in name.lower():
        raise UserError(f"{name} holds GGUF files, which are quantised and not read; take {TAKE}")
    found = published.download(name, revision)
    commit = found.name if _COMMIT.fullmatch(found.name) else revision or ""
    return Located(found, source, commit, _license(found))


def _hub_hint(source: str) -> str:
    match = re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", source)
    return f", or name the model on the hub, {match[1]}" if match else ""


def _local_revision(path: pathlib.Path) -> str:
    """The commit that a folder was downloaded from: of the hub's cache, or of `hf download --local-dir`."""
    if _COMMIT.fullmatch(path.resolve().name):
        return path.resolve().name
    for file in ("model_index.json", "config.json", "transformer/config.json"):
        kept = path / ".cache" / "huggingface" / "download" / f"{file}.metadata"
        if kept.is_file() and _COMMIT.fullmatch(line := kept.read_text().partition("\n")[0].strip()):
            return line
    return ""


def _license(path: pathlib.Path) -> str:
    readme = path / "README.md"
    if not readme.is_file():
        return ""
    parts = readme.read_text(errors="replace").split("---")
    match = re.search(r"^license:\s*['\"]?([\w.-]+)", parts[1] if len(parts) > 2 else "", re.MULTILINE)
    return match[1] if match else ""


# ---- What it is


def open_source(path: pathlib.Path, vae: pathlib.Path | None = None) -> Source:
    """What there is to convert at `path`.

    Args:
      path: a folder or a file.
      vae: file or folder of the autoencoder, for layouts that keep it apart.

    Raises:
      UserError: nothing that is known, or parts that are missing or not built here; the message says what to do.
      TensorFileError: files that are missing, damaged, or no safetensors.
    """
    if (path / "transformer").is_dir() or (path / "model_index.json").is_file():
        if vae is not None:
            raise UserError(f"--vae {vae}: {path} is in diffusers' layout and has an autoencoder; leave --vae out")
        family, model = published.describe(path)
        return Source(family, "diffusers", model, {part: TensorFiles(path / part) for part in model.entries})
    for file in (path, vae):
        if file is not None:
            check_readable(file)
    files = TensorFiles(path)
    found = find_part(files, "transformer")
    if found is None:
        raise UserError(f"{path} is no model that can be converted: it is {what_is(files)}")
    view, naming = found
    inside = find_part(files, "vae")
    if vae is not None:
        inside = find_part(TensorFiles(vae), "vae")
        if inside is None:
            raise UserError(f"--vae {vae} is no autoencoder of Wan: it is {what_is(TensorFiles(vae))}")
    if inside is None:
        raise UserError(
            f"{path} holds the transformer alone: give its autoencoder with --vae FILE (ComfyUI's"
            f" wan2.2_vae.safetensors), or convert {TAKE}, which has both"
        )
    codec, codec_naming = inside
    if codec_naming != "original":
        raise UserError(f"--vae {vae}: name an autoencoder with its original names (wan2.2_vae.safetensors)")
    try:
        namings: dict[str, Naming] = {"transformer": naming, "vae": codec_naming}
        model = original.describe(view.shapes, codec.shapes, settings(path), namings)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    layout = "comfyui" if view.prefix or path.is_file() else "original"
    return Source("wan", layout, model, {"transformer": view, "vae": codec})


def find_part(files: TensorFiles, part: str) -> tuple[PartView, Naming] | None:
    """A part of a model in a file, and whose names it has; None where the file lacks it."""
    for prefix in _PREFIXES[part]:
        for mark, naming in _MARKS[part].items():
            if prefix + mark in files.shapes:
                return PartView(files, prefix), naming
    return None


def what_is(files: TensorFiles) -> str:
    """What a file of another kind than asked for is, in words, by its keys."""
    names = files.shapes
    if any("lora" in name for name in names):
        return "a LoRA file (generate --executor, or --config.executor.start of train)"
    if find_part(files, "transformer"):
        return "a transformer of Wan"
    if find_part(files, "vae"):
        return "an autoencoder of Wan (--vae)"
    if any(name.endswith(("shared.weight", "token_embedding.weight")) for name in names):
        return "a text encoder"
    for mark, what in original.OTHERS.items():
        if any(mark in name for name in names):
            return what
    return f"of another kind; its first tensor is {min(names, default='missing')}"


def settings(path: pathlib.Path) -> dict[str, Any]:
    """The original repository's config.json, which lies beside its files."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    return {k: v for k, v in published.read_config(file).items() if not k.startswith("_")}


def check_readable(path: pathlib.Path) -> None:
    """Raises UserError for files that are not read on purpose, and for what is not there."""
    if path.is_dir():
        files = [file.name for file in sorted(path.iterdir()) if file.is_file()]
        if any(name.endswith(".safetensors") for name in files):
            return
        kinds = {
            "GGUF files": [n for n in files if n.endswith(".gguf")],
            "pickles": [n for n in files if n.endswith(_PICKLES)],
        }
        for kind, names in kinds.items():
            if names:
                raise UserError(f"{path} holds {kind} ({names[0]}), which are not read; take {TAKE}")
        raise UserError(
            f"{path} holds no model: neither transformer/ and vae/ as in diffusers' layout, nor safetensors files"
        )
    if not path.exists():
        raise UserError(f"{path} is not there; name a folder in diffusers' layout, a safetensors file, or OWNER/NAME")
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"GGUF" or path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file, quantised for llama.cpp and alike, which is not read; take {TAKE}")
    if path.suffix in _PICKLES or head[:2] in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{path} is a pickle. To read a pickle is to run the code in it, so it is not read; take {TAKE}, or"
            " safetensors of it (ComfyUI's wan2.2_vae.safetensors for the autoencoder)"
        )
    open_tensors(path)


def types_8(view: "TensorFiles | PartView") -> list[str]:
    """Names of the tensors that are 8-bit floats."""
    return [name for name, kind in view.types.items() if kind in FLOATS_8]
