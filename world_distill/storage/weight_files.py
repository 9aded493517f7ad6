"""Weights in one safetensors file, with text metadata."""

import contextlib
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from world_distill.errors import UserError
from world_distill.storage import atomic

_DTYPES = {"bool", "bfloat16", "float16", "float32", "float64"}
_FORMAT_TYPES = {"float32": "F32", "bfloat16": "BF16"}  # as the format spells those that are streamed
_DTYPES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class WeightFileError(UserError):
    """A weight file cannot be written or read. The message names it."""


def save_weights(path: str | os.PathLike, tree: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a nested dict of arrays as one safetensors file, or leaves what was there.

    Array `tree["a"]["b"]` becomes tensor `a.b`; `metadata` is text to text.

    Raises:
      ValueError: an empty dict, a key that is not text or has a dot, a leaf that is no array, or a dtype that the
        format does not carry. The path of the leaf is named.
      WeightFileError: the file cannot be written.
    """
    path = pathlib.Path(path)
    tensors = {".".join(keys): _to_numpy(".".join(keys), leaf) for keys, leaf in _walk(tree)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, temporary, metadata=dict(metadata))
        atomic.usual_mode(temporary)  # safetensors makes files that others cannot read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightFileError(f"{path}: the weights could not be written ({type(error).__name__}: {error})") from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


def stream_weights(
    path: str | os.PathLike,
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> int:
    """Writes one safetensors file tensor by tensor, holding one in memory; returns the tensors' bytes.

    Args:
      path: of the file.
      kinds: name -> (type, shape) of every tensor, in the order of `tensors`; types of more bytes first, so that each
        tensor begins at a multiple of its type's bytes.
      tensors: (name, array).
      metadata: text to text.

    Raises:
      ValueError: a tensor that is another than `kinds` says.
      WeightFileError: the file cannot be written; there may be a part of it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (kind, shape) in kinds.items():
        size = math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _FORMAT_TYPES[kind.name], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, array), (expected, (kind, shape)) in zip(tensors, kinds.items(), strict=True):
                if (name, array.dtype, array.shape) != (expected, kind, shape):
                    raise ValueError(f"{name} {array.dtype} {array.shape} is not {expected} {kind} {shape}")
                file.write(np.ascontiguousarray(array).tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WeightFileError(f"{path}: the weights could not be written ({type(error).__name__}: {error})") from error
    return end


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """The (nested dict of numpy arrays, metadata) of a file that `save_weights` wrote.

    Raises WeightFileError if the file is missing, cut off or not in the safetensors format.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            return unflatten_dict(arrays, sep="."), file.metadata() or {}
    except (OSError, safetensors.SafetensorError, AttributeError, IndexError, TypeError) as error:
        raise WeightFileError(f"{path}: not a readable weight file ({type(error).__name__}: {error})") from error


def _walk(tree: Mapping[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not tree:
        raise ValueError(f"the dict at {'.'.join(parents) or 'the root'!r} is empty: it would be lost in the file")
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "." in key:
            raise ValueError(f"key {key!r} under {'.'.join(parents)!r} is not a text without dots")
        if isinstance(value, Mapping):
            yield from _walk(value, (*parents, key))
        else:
            yield (*parents, key), value


def _to_numpy(name: str, leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise ValueError(f"{name} is a {type(leaf).__name__}, not an array")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"{name} lies on several hosts: gather it first")
    if leaf.dtype.name not in _DTYPES:
        raise ValueError(f"{name} has dtype {leaf.dtype}, which a weight file does not carry")
    # safetensors writes the memory as it lies, whatever the strides say: a transposed array would come back scrambled.
    return np.array(leaf, order="C")
