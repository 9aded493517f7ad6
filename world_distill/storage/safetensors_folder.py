"""Tensors of safetensors files, read one at a time."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from world_distill.errors import UserError

# What a tensor may be made of, as the files say it.
TYPES = ("F32", "F16", "BF16")
# Types of 8 bits, which numpy does not know; most files keep a scale beside such a tensor.
FLOATS_8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
NAMES = ("diffusion_pytorch_model", "model", "pytorch_lora_weights")


class TensorFileError(UserError):
    """Files that cannot be read, named."""


class TensorFiles:
    """Name, shape, type and content of every tensor of a file, or of a folder: one file, or several with an index.

    Files are opened for each tensor and closed again, so that memory holds no more than what was read. `header` is the
    text that the first file keeps beside its tensors.

    Args:
      folder: where the files are, or the one file.

    Raises:
      TensorFileError: no safetensors there, only pickles, a missing or damaged file.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._file: dict[str, pathlib.Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.header: dict[str, str] = {}
        for path, expected in _files(folder).items():
            with open_tensors(path) as file:
                found = set(file.keys())
                self.header = self.header or file.metadata() or {}
                if expected is not None and (lost := sorted(expected - found)):
                    raise TensorFileError(f"{path} lacks {len(lost)} tensors of its index, {lost[0]} for one")
                for name in sorted(found if expected is None else expected):
                    self._file[name] = path
                    tensor = file.get_slice(name)
                    self.shapes[name], self.types[name] = tuple(tensor.get_shape()), tensor.get_dtype()

    def __getitem__(self, name: str) -> np.ndarray:
        with open_tensors(self._file[name]) as file:
            return read_tensor(file, self._file[name], name)


class LazyTensor:
    """A tensor that is read whenever numpy makes an array of it."""

    def __init__(self, files: TensorFiles, name: str):
        self.shape, self._files, self._name = files.shapes[name], files, name

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what was read belongs to no one else
        return np.asarray(self._files[self._name], dtype)


def _files(folder: pathlib.Path) -> Mapping[pathlib.Path, set[str] | None]:
    """The folder's files; with an index, the names that each should hold."""
    if folder.is_file():
        return {folder: None}
    if not folder.is_dir():
        raise TensorFileError(f"{folder} is no folder")
    for name in NAMES:
        # A variant has its name before the end: `….index.bf16.json`.
        found = [folder / f"{name}.safetensors.index.json", *sorted(folder.glob(f"{name}.safetensors.index.*.json"))]
        if index := next((path for path in found if path.exists()), None):
            try:
                files: dict[pathlib.Path, set[str]] = {}
                for tensor, file in json.loads(index.read_text())["weight_map"].items():
                    files.setdefault(folder / file, set()).add(tensor)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TensorFileError(f"{index} is no index of safetensors: {error}") from error
            if missing := sorted(str(path.name) for path in files if not path.exists()):
                raise TensorFileError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
            return files
    found = [folder / f"{name}.safetensors" for name in NAMES if (folder / f"{name}.safetensors").exists()]
    found = found or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise TensorFileError(f"{folder} holds {len(found)} safetensors files and no index that says what is where")
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        raise TensorFileError(
            f"{folder} holds pickles ({', '.join(pickles[:3])}) and no safetensors. To read a pickle is to run the "
            "code in it, so they are not read; save the model again with safetensors (`save_pretrained` does)."
        )
    raise TensorFileError(f"{folder} holds no safetensors files")


def open_tensors(path: str | os.PathLike):
    """An open safetensors file. Raises TensorFileError if it is missing, cut off or something else."""
    try:
        return safetensors.safe_open(path, "numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise TensorFileError(f"{path} is no whole safetensors file: {_instead(path) or error}") from error


_INSTEAD = {
    b"version https://git-lfs": "it is a pointer of Git LFS; get the file with `git lfs pull` or `hf download`",
    b"<!doctype html": "it is a page; the download needs to be logged in, or the licence to be accepted",
    b"<html": "it is a page; the download needs to be logged in, or the licence to be accepted",
    b'{"error": ': "it is a server's error message; download it again",
}


def _instead(path: str | os.PathLike) -> str:
    """What a file is that was saved in the place of another, by its first bytes; "" where that is not known."""
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError:
        return ""
    return next((what for mark, what in _INSTEAD.items() if head.startswith(mark)), "")


class Found(NamedTuple):
    """A tensor, its name, and the file that holds it."""

    file: pathlib.Path
    name: str
    tensor: np.ndarray


def find_tensor(path: pathlib.Path, names: Sequence[str]) -> Found | None:
    """The first tensor that has one of these names, in a file or in the files of a folder; None: there is none.

    Raises:
      TensorFileError: one of the files is damaged.
    """
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with open_tensors(file) as opened:
            there = set(opened.keys())
            if name := next((name for name in names if name in there), None):
                return Found(file, name, read_tensor(opened, file, name))
    return None


def digest(tensor: np.ndarray) -> str:
    """16 hexadecimal digits that tell a tensor from others. Values are rounded to bfloat16, whatever type they have."""
    rounded = np.ascontiguousarray(tensor).astype(jnp.bfloat16, copy=False)
    found = hashlib.sha256(f"{rounded.shape}".encode())
    found.update(rounded.view(np.uint8).data)
    return found.hexdigest()[:16]


def read_tensor(file, path: str | os.PathLike, name: str) -> np.ndarray:
    """A tensor of the open safetensors file at `path`; one of 8-bit floats is float32.

    Raises:
      TensorFileError: a type that is not read here.
    """
    kind = file.get_slice(name).get_dtype()
    if kind in FLOATS_8:
        with open(path, "rb") as raw:  # the reader for numpy gives no such types
            length = int.from_bytes(raw.read(8), "little")
            entry = json.loads(raw.read(length))[name]
            start, end = entry["data_offsets"]
            raw.seek(8 + length + start)
            bits = np.frombuffer(raw.read(end - start), np.uint8)
        return bits.view(jnp.dtype(FLOATS_8[kind])).reshape(entry["shape"]).astype(np.float32)
    try:
        return file.get_tensor(name)
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise TensorFileError(f"{path}: {name} is of the type {kind}, a type that cannot be read") from error
