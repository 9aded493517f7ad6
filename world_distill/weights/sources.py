"""What `convert` reads: published models in the layouts that people have, recognised by their keys.

    diffusers   a folder with transformer/ and vae/, or a model on the Hugging Face hub, NAME or NAME@REVISION
    original    the authors' files: Wan's repository, of sharded files with bare names (`blocks.0.self_attn.q.weight`),
                and LTX-2's single file, which has all parts and a config in its header
    comfyui     one file, its names after `model.diffusion_model.`; weights may be 8-bit floats with a scale

Wan's last two keep the autoencoder in another file (`--vae`), unless the one file holds it, too.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from world_distill.errors import UserError
from world_distill.models.tensor_map import Published
from world_distill.storage.safetensors_folder import FLOATS_8, TensorFileError, TensorFiles, open_tensors
from world_distill.weights import published
from world_distill.weights.single_files import TAKE, TAKE_WAN, PartView, Source, open_file

_ORIGINALS = {"Wan-AI/Wan2.2-TI2V-5B": TAKE_WAN}  # repositories of the original layout, whose autoencoder is a pickle
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
LICENSE_LENGTH = 200  # characters; some files hold the whole text
_PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl")


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
    if path.is_file():
        return _license_of_file(path)
    readme = path / "README.md"
    if not readme.is_file():
        return ""
    parts = readme.read_text(errors="replace").split("---")
    match = re.search(r"^license:\s*['\"]?([\w.-]+)", parts[1] if len(parts) > 2 else "", re.MULTILINE)
    return match[1] if match else ""


def _license_of_file(path: pathlib.Path) -> str:
    """What the header of a safetensors file says, its first line."""
    try:
        with open_tensors(path) as file:
            text = (file.metadata() or {}).get("license", "")
    except TensorFileError:  # another kind of file, which is named when it is opened
        return ""
    return text.strip().partition("\n")[0][:LICENSE_LENGTH]


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
        files = {part: TensorFiles(path / part) for part in model.entries}
        return Source(family, "diffusers", model, {**files, **_apart(model, files)})
    for file in (path, vae):
        if file is not None:
            check_readable(file)
    return open_file(path, vae)


def _apart(model: Published, files: Mapping[str, TensorFiles]) -> dict[str, PartView]:
    """What lies among the tensors of a part and is none of it, where it is there."""
    found = {}
    for part, entries in model.apart.items():
        names = {name: name for entry in entries for name in entry.names}
        if there := next((x for x in files.values() if names.keys() <= x.shapes.keys()), None):
            found[part] = PartView(there, names)
    return found


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
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w./-]+\.safetensors)", str(path))
        hint = f". If it is on the Hugging Face hub: `hf download {match[1]} {match[2]}`" if match else ""
        raise UserError(
            f"{path} is not there; name a folder in diffusers' layout, a safetensors file, or OWNER/NAME{hint}"
        )
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
