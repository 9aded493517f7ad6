"""What one record is: a task as annotated, and a task as encoded for a model family; and their bytes.

Bytes are `WDREC`, one byte of format version, and a msgpack map of the record's type and fields.

    annotated  1  each record has its picture
               2  records may share it
    encoded    1  one scene latent and one array of states a text, which are read as `video` and `text`
               2  arrays by name; records may share picture and scene
               3  scene arrays may be stored in a narrower type than they have

Records of one image share its picture and scene: all but one are stored without, and say in which row of their file
these are.

A clip is kept apart from its record, since few programs read it: its bytes are `WDCLIP`, one byte of version (1), and a
msgpack map of its record's id and its arrays. Records of one video share its clip in the same way.
"""

import dataclasses
import hashlib
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

_MAGIC, _CLIP_MAGIC, _CLIP_VERSION = b"WDREC", b"WDCLIP", 1
SCENE, TEXT = "video", "text"  # names of the arrays of encoded records of version 1


class RecordError(ValueError):
    """A record or a data set that cannot be trusted. The message names the file and what to do."""


def without_solution(record: str) -> RecordError:
    """The error of a record that has no solution, where one is needed."""
    return RecordError(
        f"record {record!r} has no solution for the Demonstrator: it is for evaluating what is told the task"
    )


@dataclasses.dataclass(frozen=True)
class AnnotatedRecord:
    """One task about one scene image, before any model has seen it."""

    id: str  # unique in its data set
    image_id: str  # shared by the tasks of one image
    image_png: bytes  # a PNG, or the original file without its tags (`images.decode`)
    task: str  # `[agent]: imperative.`
    solution: str  # empty if none is known: the task is for evaluation only
    agent: str
    kind: str
    source: dict[str, str]  # where the image and the words come from

    def to_bytes(self, scene_row: int | None = None) -> bytes:
        """The record as bytes; without the picture if that is to be found in row `scene_row` of the same file.

        Raises RecordError if a field is not what it says.
        """
        return _pack(self, scene_row)

    @classmethod
    def from_bytes(cls, data: bytes) -> "AnnotatedRecord":
        """The record in `data`.

        Raises RecordError if that is another type or version, or damaged, or if its picture is in another row.
        """
        return _whole(cls, data)

    def shares_scene(self, other: "AnnotatedRecord") -> bool:
        """Whether both have the same picture."""
        return (self.image_id, self.image_png) == (other.image_id, other.image_png)

    def scene_digest(self) -> bytes:
        """Hash of what records of one image share."""
        return hashlib.sha256(self.image_png).digest()


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedRecord:
    """One task with its scene and its text states, ready for a model family. Arrays keep their dtype."""

    id: str
    image_id: str
    task: str
    solution: str
    agent: str
    kind: str
    scene: dict[str, np.ndarray]  # arrays of `Encoders.scene` by name, of one image
    task_states: dict[str, np.ndarray]  # [l d] by name, as `Encoders.text`, true length
    solution_states: dict[str, np.ndarray]  # the same; l is 0 if there is no solution
    image_png: bytes  # the image that was encoded, for reports; may be empty
    # Latents [n ...] of a clip by stream, to learn from; {} where there are none, or where they were not read.
    clip: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def to_bytes(self, scene_row: int | None = None, *, scene_dtype: str | None = None) -> bytes:
        """The record as bytes; without scene and image if they are to be found in row `scene_row` of the same file.

        Its clip has bytes of its own (`clip_to_bytes`).

        `scene_dtype` stores wider scene arrays in that type; they are read in their own, with the values rounded.
        Raises RecordError if a field is not what it says, or an array is not finite.
        """
        return _pack(self, scene_row, scene_dtype)

    @classmethod
    def from_bytes(cls, data: bytes) -> "EncodedRecord":
        """The record in `data`; arrays are read-only.

        Raises RecordError like `AnnotatedRecord.from_bytes`, and for a record whose scene is in another row.
        """
        return _whole(cls, data)

    def shares_scene(self, other: "EncodedRecord") -> bool:
        """Whether both have the same image, and the same arrays of it, bit for bit."""
        return (
            (self.image_id, self.image_png) == (other.image_id, other.image_png)
            and self.scene.keys() == other.scene.keys()
            and all(_same(array, other.scene[name]) for name, array in self.scene.items())
        )

    def shares_clip(self, other: "EncodedRecord") -> bool:
        """Whether both have the same clip of the same image, bit for bit."""
        return (
            self.image_id == other.image_id
            and self.clip.keys() == other.clip.keys()
            and all(_same(array, other.clip[name]) for name, array in self.clip.items())
        )

    def clip_to_bytes(self, clip_row: int | None = None, *, dtype: str | None = None) -> bytes:
        """The clip as bytes, or where it is to be found: beside record `clip_row` of the same file.

        `dtype` stores wider arrays in that type; they are read in their own, with the values rounded.
        Raises RecordError if an array is not finite.
        """
        _check(self)
        value: dict[str, Any] = {"id": self.id, "row": clip_row}
        if clip_row is None:
            arrays, types = _narrow(self.clip, dtype)
            _check_finite(self, "clip", arrays, dtype)
            value |= {"arrays": arrays, "types": types}
        return _CLIP_MAGIC + bytes([_CLIP_VERSION]) + serialization.msgpack_serialize(value)

    def scene_digest(self) -> bytes:
        """Hash of what records of one image share."""
        digest = hashlib.sha256(self.image_png)
        for name, array in sorted(self.scene.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.tobytes())
        return digest.digest()


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    return x is y or (x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes())


Record = AnnotatedRecord | EncodedRecord
VERSIONS: Mapping[type, int] = {AnnotatedRecord: 2, EncodedRecord: 3}  # written here
READ: Mapping[type, tuple[int, ...]] = {AnnotatedRecord: (1, 2), EncodedRecord: (1, 2, 3)}
SCENE_DTYPES = ("float32", "bfloat16", "float16")  # that scene arrays may be stored in
_STATES = ("task_states", "solution_states")
_ARRAYS = ("scene", *_STATES)


def read_stored(cls: type, data: bytes) -> tuple[Any, int | None]:
    """The record of type `cls` in `data`, and the row of its file that holds its scene; None: it has that itself.

    A record whose scene is elsewhere has no picture and no scene arrays. Raises RecordError like
    `AnnotatedRecord.from_bytes`.
    """
    return _unpack(cls, data)


def _whole(cls: type, data: bytes) -> Any:
    record, scene_row = _unpack(cls, data)
    if scene_row is not None:
        raise RecordError(f"record {record.id!r} has its scene in row {scene_row} of its file")
    return record


def _pack(record: Record, scene_row: int | None, scene_dtype: str | None = None) -> bytes:
    _check(record, scene_row)
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "clip"}
    if scene_row is not None:
        fields |= {"image_png": b"", "scene_row": scene_row} | ({"scene": {}} if "scene" in fields else {})
    elif scene_dtype is not None and isinstance(record, EncodedRecord):
        fields["scene"], fields["scene_types"] = _narrow(record.scene, scene_dtype)
    for name in _ARRAYS if isinstance(record, EncodedRecord) else ():
        _check_finite(record, name, fields[name], scene_dtype)
    # msgpack, as Flax writes it: text, bytes and arrays (bf16 too) in one value, nothing that can run code on reading
    # (pickle), and no second parser for the strings (safetensors keeps only flat text beside its arrays).
    body = serialization.msgpack_serialize({"type": type(record).__name__, "fields": fields})
    return _MAGIC + bytes([VERSIONS[type(record)]]) + body


def _narrow(arrays: Mapping[str, np.ndarray], dtype: str | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays in a type where they are wider, the types that those had)."""
    found, wide = dict(arrays), {}
    for name, array in arrays.items():
        if dtype is not None and array.dtype.itemsize > np.dtype(dtype).itemsize:
            with np.errstate(over="ignore"):  # `_check_finite` refuses infinities, by name
                found[name], wide[name] = array.astype(np.dtype(dtype)), array.dtype.name
    return found, wide


def _widen(arrays: dict[str, np.ndarray], types: Mapping[str, str]) -> None:
    """Gives narrowed arrays their own types back."""
    for name, dtype in types.items():
        arrays[name] = arrays[name].astype(np.dtype(dtype))


def _check_finite(record: Any, field: str, stored: Mapping[str, np.ndarray], dtype: str | None) -> None:
    """Raises RecordError for an array of a record's field that is not finite as it is to be stored."""
    for name, array in stored.items():
        if not np.isfinite(array.astype(np.float32)).all():
            full = np.isfinite(getattr(record, field)[name].astype(np.float32)).all()
            why = f" in {dtype}: choose bfloat16 or float32" if full else ""
            raise RecordError(f"record {record.id!r}: {field} {name!r} has values that are not finite{why}")


def read_clip(data: bytes, record: str) -> dict[str, np.ndarray] | int:
    """The clip of a record in `data`, or the number of the record of its file that has it.

    Raises RecordError if that is another record's, of another version, or damaged.
    """
    data, start = bytes(data), _CLIP_MAGIC + bytes([_CLIP_VERSION])
    if data[: len(start)] != start:
        raise RecordError("not a clip, or of a later version")
    try:
        value: Any = serialization.msgpack_restore(data[len(start) :])
        owner, row, arrays = value["id"], value["row"], value.get("arrays", {})
        _widen(arrays, value.get("types", {}))
        sound = all(isinstance(name, str) and _is_clip(array) for name, array in arrays.items())
    except Exception as error:  # msgpack has its own exceptions, numpy others: all mean damaged bytes
        raise RecordError(f"damaged clip ({type(error).__name__}: {error})") from error
    if owner != record:
        raise RecordError(f"the clip of record {record!r} is said to be that of {owner!r}")
    if not sound or (row is None) != bool(arrays) or not (row is None or (type(row) is int and row >= 0)):
        raise RecordError(f"damaged clip of record {record!r}")
    return arrays if row is None else row


def _is_clip(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.size > 0 and bool(jnp.issubdtype(array.dtype, jnp.floating))


def _unpack(cls: Any, data: bytes) -> tuple[Any, int | None]:
    data = bytes(data)
    if data[: len(_MAGIC)] != _MAGIC:
        raise RecordError("not a world_distill record (wrong first bytes)")
    version = data[len(_MAGIC)] if len(data) > len(_MAGIC) else None
    if version not in READ[cls]:
        known = ", ".join(map(str, READ[cls]))
        raise RecordError(f"record of format version {version}, this program reads {known}: write the data again")
    record, scene_row = None, None
    try:
        value: Any = serialization.msgpack_restore(data[len(_MAGIC) + 1 :])
        kind, fields = value["type"], value["fields"]
        if kind == cls.__name__:
            if cls is EncodedRecord and version == 1:
                fields = _from_version_1(fields)
            scene_row = fields.pop("scene_row", None)
            _widen(fields.get("scene", {}), fields.pop("scene_types", {}))
            record = cls(**fields)
    except Exception as error:  # msgpack has its own exceptions, numpy others: all mean damaged bytes
        raise RecordError(f"damaged record ({type(error).__name__}: {error})") from error
    if record is None:
        raise RecordError(f"this is a {kind}, not the {cls.__name__} asked for")
    _check(record, scene_row)
    return record, scene_row


def _from_version_1(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an encoded record of version 1, as those of version 2."""
    fields = dict(fields)
    for name in ("task", "solution"):
        fields[f"{name}_states"] = {TEXT: fields.pop(f"{name}_text")}
    return fields | {"scene": {SCENE: fields["scene"]}}


def _check(record: Record, scene_row: int | None = None) -> None:
    """Raises RecordError unless every field has its type, rank and some content."""
    problems = []
    for field in dataclasses.fields(record):
        value, declared = getattr(record, field.name), typing.cast(Any, field.type)
        kind = typing.get_origin(declared) or declared
        if not isinstance(value, kind):
            problems.append(f"{field.name} is a {type(value).__name__}, not {kind.__name__}")
        elif field.name in _ARRAYS or (field.name == "clip" and value):
            problems += _array_problems(record, field.name, value, elsewhere=scene_row is not None)
        elif kind is dict and not all(isinstance(x, str) for item in value.items() for x in item):
            problems.append(f"{field.name} has entries that are not text")
        elif field.name in ("id", "image_id", "task") and not value:
            problems.append(f"{field.name} is empty")
    if isinstance(record, EncodedRecord) and not problems:
        task, solution = (sorted(states) for states in (record.task_states, record.solution_states))
        if task != solution:
            problems.append(f"task states are {task}, solution states {solution}")
    if scene_row is not None and (type(scene_row) is not int or scene_row < 0):
        problems.append(f"scene_row is {scene_row!r}")
    if problems:
        raise RecordError(f"record {getattr(record, 'id', '?')!r}: " + "; ".join(problems))


def _array_problems(record: Any, field: str, arrays: dict[Any, Any], *, elsewhere: bool) -> list[str]:
    """What is wrong with one of the fields that hold arrays by name."""
    if field == "scene" and elsewhere:
        return []
    if not arrays or not all(isinstance(name, str) for name in arrays):
        return [f"{field} holds no arrays by name"]
    problems = []
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            problems.append(f"{field} {name!r} is a {type(array).__name__}, not an array")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{field} {name!r} is {array.dtype}, not floating point")
        elif field == "solution_states" and not record.solution and array.ndim == 2 and array.shape[0] == 0:
            continue
        elif field in _STATES and array.ndim != 2 or array.ndim == 0 or array.size == 0:
            axes = "2 axes" if field in _STATES else "axes"
            problems.append(f"{field} {name!r} has shape {array.shape}, not {axes} with content")
    return problems
