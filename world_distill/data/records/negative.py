"""The negative text of a set of encoded records: what classifier-free guidance leads away from.

`encode` keeps its states in NAME.negative, beside the shards of record set NAME. The file is not a part of the set: the
set's index does not name it, so records that were encoded without a negative text stay valid, and another text is
encoded in seconds while the records stay as they are.

Its bytes are `WDNEG`, one byte of format version, the sha256 of the rest, and a msgpack map of the fields.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from world_distill.data.records.batches import pad_texts
from world_distill.data.records.reader import RecordReader
from world_distill.data.records.shard_files import disk, write_atomically
from world_distill.data.records.types import RecordError
from world_distill.devices import hosts
from world_distill.devices.sharding import replicated
from world_distill.settings.guidance import Guidance
from world_distill.structs import Negative

_START = b"WDNEG\x01"
_HASH_BYTES = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True, eq=False)
class NegativeText:
    """A negative text and its states."""

    text: str
    text_encoder: str  # as the index of the records names it
    states: np.ndarray  # [l d] true length, no padding

    @property
    def fingerprint(self) -> str:
        """Names text, text encoder and states."""
        return hashlib.sha256(_body(self)).hexdigest()[:16]


def negative_path(folder: str | os.PathLike, name: str) -> pathlib.Path:
    """The file of record set `name`."""
    return pathlib.Path(folder) / f"{name}.negative"


def keep_negative(
    folder: str | os.PathLike,
    name: str,
    text: str,
    *,
    text_encoder: str,
    encode_text: Callable[[Sequence[str]], list[np.ndarray]],
) -> bool:
    """Encodes the negative text of record set `name`, unless its file has this text by this encoder already.

    Several processes may call this at once for one folder: each writes the same file, and none sees half of it.

    Returns:
      Whether the text was encoded.

    Raises:
      RecordError: the encoder returned the wrong number or shape, or the disk refuses.
    """
    path = negative_path(folder, name)
    try:
        found = read_negative(folder, name)
    except RecordError:
        found = None  # missing or damaged
    if found is not None and (found.text, found.text_encoder) == (text, text_encoder):
        return False
    states = [np.asarray(x) for x in encode_text([text])]
    if len(states) != 1 or states[0].ndim != 2 or not jnp.issubdtype(states[0].dtype, jnp.floating):
        raise RecordError(f"encode_text returned {[x.shape for x in states]} for the negative text, not one [l d]")
    if not np.isfinite(states[0].astype(np.float32)).all():
        raise RecordError("the states of the negative text are not finite")
    write_negative(path.parent, name, NegativeText(text, text_encoder, states[0]))
    return True


def write_negative(folder: str | os.PathLike, name: str, negative: NegativeText) -> None:
    """Writes the file of record set `name`, or leaves it as it was. Raises RecordError if the disk refuses."""
    path, body = negative_path(folder, name), _body(negative)
    with disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _START + hashlib.sha256(body).digest() + body)


def read_negative(folder: str | os.PathLike, name: str) -> NegativeText | None:
    """The negative text of record set `name`; None if it has none. Raises RecordError if its file is damaged."""
    path = negative_path(folder, name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    head, body = data[: len(_START) + _HASH_BYTES], data[len(_START) + _HASH_BYTES :]
    if head != _START + hashlib.sha256(body).digest():
        raise RecordError(f"{path} is damaged, or of another version: call `world-distill encode` again")
    fields: Any = serialization.msgpack_restore(body)
    return NegativeText(**fields)


def _body(negative: NegativeText) -> bytes:
    return serialization.msgpack_serialize({f.name: getattr(negative, f.name) for f in dataclasses.fields(negative)})


def load_negative(
    reader: RecordReader, guidance: Guidance, text_length: int, mesh: jax.sharding.Mesh
) -> Negative | None:
    """The states of the config's negative text, from beside the records, on every device; None without guidance.

    Raises:
      RecordError: the records have no negative text, another one, or one that does not fit them.
    """
    if not guidance.used:
        return None
    kept = _kept(reader, guidance.negative, text_length)
    hosts.agree("negative text", kept.fingerprint)
    states, mask = pad_texts([kept.states], text_length)
    place = lambda x: hosts.place(x[0], replicated(mesh))  # noqa: E731
    return Negative(place(states), place(mask))


def _kept(reader: RecordReader, text: str, text_length: int) -> NegativeText:
    folder, name = reader.index_path.parent, reader.index_path.stem
    path, kept = negative_path(folder, name), read_negative(folder, name)
    again = (
        "call `world-distill encode` with the flags that the records were encoded with and the config of this run, "
        "which keeps the records and encodes the negative text"
    )
    if kept is None:
        raise RecordError(f"guidance needs the states of a negative text, and there is no {path}: {again}")
    if kept.text != text:
        raise RecordError(
            f"{path} is of the negative text {kept.text!r}, and config.demonstrator.negative is {text!r}: {again}"
        )
    encoder, states = reader.metadata.get("text_encoder", ""), reader[0].task_text
    if kept.text_encoder != encoder or kept.states.shape[1] != states.shape[1] or kept.states.dtype != states.dtype:
        raise RecordError(
            f"{path} has states by text encoder {kept.text_encoder!r} ({kept.states.shape[1]} wide, "
            f"{kept.states.dtype}), the records by {encoder!r} ({states.shape[1]} wide, {states.dtype}): {again}"
        )
    if len(kept.states) > text_length:
        raise RecordError(
            f"the negative text in {path} has {len(kept.states)} tokens, and text_length is {text_length}: raise it"
        )
    return kept


def abstract_negative(guidance: Guidance, text_length: int, width: int, dtype, mesh) -> Negative | None:
    """Shapes and shardings of `load_negative`'s result."""
    if not guidance.used:
        return None

    def make(shape: tuple[int, ...], kind) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=replicated(mesh))

    return Negative(make((text_length, width), dtype), make((text_length,), np.bool_))
