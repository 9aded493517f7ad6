"""What one record is: a task as annotated, and a task as encoded for a model family; and their bytes.

Bytes are `WDREC`, one byte of format version, and a msgpack map of the record's type and fields.
"""

import dataclasses
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

VERSION = 1
_MAGIC = b"WDREC"


class RecordError(ValueError):
    """A record or a data set that cannot be trusted. The message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class AnnotatedRecord:
    """One task about one scene image, before any model has seen it."""

    id: str  # unique in its data set
    image_id: str  # shared by the tasks of one image
    image_png: bytes  # RGB
    task: str  # `[agent]: imperative.`
    solution: str  # empty if none is known: the task is for evaluation only
    agent: str
    kind: str
    source: dict[str, str]  # where the image and the words come from

    def to_bytes(self) -> bytes:
        """The record as bytes. Raises RecordError if a field is not what it says."""
        return _pack(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> "AnnotatedRecord":
        """The record in `data`. Raises RecordError if that is another type or version, or damaged."""
        return _unpack(cls, data)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedRecord:
    """One task with its scene latent and text states, ready for a model family. Arrays keep their dtype."""

    id: str
    image_id: str
    task: str
    solution: str
    agent: str
    kind: str
    scene: np.ndarray  # [1 h w c] clean latent of the first frame
    task_text: np.ndarray  # [l d] true length, no padding
    solution_text: np.ndarray  # [l d]; l is 0 if there is no solution
    image_png: bytes  # what was encoded, for reports; may be empty

    def to_bytes(self) -> bytes:
        """The record as bytes. Raises RecordError if a field is not what it says, or an array is not finite."""
        return _pack(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> "EncodedRecord":
        """The record in `data`; arrays are read-only. Raises RecordError like `AnnotatedRecord.from_bytes`."""
        return _unpack(cls, data)


Record = AnnotatedRecord | EncodedRecord
_RANKS = {"scene": 4, "task_text": 2, "solution_text": 2}


def _pack(record: Record) -> bytes:
    _check(record)
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    for name in _RANKS.keys() & fields.keys():
        if not np.isfinite(fields[name].astype(np.float32)).all():
            raise RecordError(f"record {record.id!r}: {name} has values that are not finite")
    # msgpack, as Flax writes it: text, bytes and arrays (bf16 too) in one value, nothing that can run code on reading
    # (pickle), and no second parser for the strings (safetensors keeps only flat text beside its arrays).
    body = serialization.msgpack_serialize({"type": type(record).__name__, "fields": fields})
    return _MAGIC + bytes([VERSION]) + body


def _unpack(cls: type, data: bytes) -> Any:
    data = bytes(data)
    if data[: len(_MAGIC)] != _MAGIC:
        raise RecordError("not a world_distill record (wrong first bytes)")
    version = data[len(_MAGIC)] if len(data) > len(_MAGIC) else None
    if version != VERSION:
        raise RecordError(f"record of format version {version}, this program reads {VERSION}: write the data again")
    try:
        value: Any = serialization.msgpack_restore(data[len(_MAGIC) + 1 :])
        kind, fields = value["type"], value["fields"]
        record = cls(**fields) if kind == cls.__name__ else None
    except Exception as error:  # msgpack has its own exceptions, numpy others: all mean damaged bytes
        raise RecordError(f"damaged record ({type(error).__name__}: {error})") from error
    if record is None:
        raise RecordError(f"this is a {kind}, not the {cls.__name__} asked for")
    _check(record)
    return record


def _check(record: Record) -> None:
    """Raises RecordError unless every field has its type, rank and some content."""
    problems = []
    for field in dataclasses.fields(record):
        value, declared = getattr(record, field.name), typing.cast(Any, field.type)
        kind = typing.get_origin(declared) or declared
        if not isinstance(value, kind):
            problems.append(f"{field.name} is a {type(value).__name__}, not {kind.__name__}")
        elif kind is dict and not all(isinstance(x, str) for item in value.items() for x in item):
            problems.append(f"{field.name} has entries that are not text")
        elif kind is np.ndarray and not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{field.name} is {value.dtype}, not floating point")
        elif field.name == "solution_text" and not record.solution and value.ndim == 2 and value.shape[0] == 0:
            continue
        elif kind is np.ndarray and (value.ndim != _RANKS[field.name] or value.size == 0):
            problems.append(f"{field.name} has shape {value.shape}, not {_RANKS[field.name]} axes with content")
        elif field.name == "scene" and value.shape[0] != 1:
            problems.append(f"scene has {value.shape[0]} frames, not 1")
        elif field.name in ("id", "image_id", "task") and not value:
            problems.append(f"{field.name} is empty")
    if problems:
        raise RecordError(f"record {getattr(record, 'id', '?')!r}: " + "; ".join(problems))
