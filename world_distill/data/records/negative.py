"""The negative text of a set of encoded records: what classifier-free guidance leads away from.

`encode` keeps its states in NAME.negative, beside the shards of record set NAME. The file is not a part of the set: the
set's index does not name it, so records that were encoded without a negative text stay valid, and another text is
encoded in seconds while the records stay as they are.

Its bytes are `WDNEG`, one byte of format version, the sha256 of the rest, and a msgpack map of the fields. Version 2
holds states by name; version 1 had one array, which is read as `text`.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from world_distill.data.records import fit
from world_distill.data.records.batches import pad
from world_distill.data.records.reader import RecordReader
from world_distill.data.records.record_format import TEXT, RecordError
from world_distill.data.records.shard_files import disk, write_atomically
from world_distill.devices import hosts
from world_distill.devices.sharding import replicated
from world_distill.settings.guidance import Guidance
from world_distill.structs import Texts

_START, _VERSION = b"WDNEG", 2
_HASH_BYTES = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True, eq=False)
class NegativeText:
    """A negative text and its states."""

    text: str
    text_encoder: str  # as the index of the records names it
    states: dict[str, np.ndarray]  # [l d] by name, as `Encoders.text`, true length

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
    encode_text: Callable[[Sequence[str]], Mapping[str, Sequence[np.ndarray]]],
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
    states = {}
    for key, arrays in encode_text([text]).items():
        found = [np.asarray(x) for x in arrays]
        if len(found) != 1 or found[0].ndim != 2 or not jnp.issubdtype(found[0].dtype, jnp.floating):
            shapes = [x.shape for x in found]
            raise RecordError(f"encode_text returned {key!r} of shapes {shapes} for the negative text, not one [l d]")
        if not np.isfinite(found[0].astype(np.float32)).all():
            raise RecordError(f"the states {key!r} of the negative text are not finite")
        states[key] = found[0]
    write_negative(path.parent, name, NegativeText(text, text_encoder, states))
    return True


def write_negative(folder: str | os.PathLike, name: str, negative: NegativeText) -> None:
    """Writes the file of record set `name`, or leaves it as it was. Raises RecordError if the disk refuses."""
    path, body = negative_path(folder, name), _body(negative)
    with disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _START + bytes([_VERSION]) + hashlib.sha256(body).digest() + body)


def read_negative(folder: str | os.PathLike, name: str) -> NegativeText | None:
    """The negative text of record set `name`; None if it has none. Raises RecordError if its file is damaged."""
    path = negative_path(folder, name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    at = len(_START) + 1
    head, digest, body = data[:at], data[at : at + _HASH_BYTES], data[at + _HASH_BYTES :]
    version = next((number for number in (1, _VERSION) if head == _START + bytes([number])), None)
    if version is None or digest != hashlib.sha256(body).digest():
        raise RecordError(f"{path} is damaged, or of another version: call `world-distill encode` again")
    fields: Any = serialization.msgpack_restore(body)
    if version == 1:
        fields["states"] = {TEXT: fields["states"]}
    return NegativeText(**fields)


def _body(negative: NegativeText) -> bytes:
    return serialization.msgpack_serialize({f.name: getattr(negative, f.name) for f in dataclasses.fields(negative)})


def load_negative(
    reader: RecordReader, guidance: Guidance, lengths: Mapping[str, int], mesh: jax.sharding.Mesh
) -> Texts | None:
    """The states of the config's negative text, from beside the records, on every device; None without guidance.

    Args:
      reader: encoded records.
      guidance: of the config.
      lengths: tokens to pad to, by the name of the text states.
      mesh: devices.

    Raises:
      RecordError: the records have no negative text, another one, or one that does not fit them.
    """
    if not guidance.used:
        return None
    kept = _kept(reader, guidance.negative, lengths)
    hosts.agree("negative text", kept.fingerprint)
    return jax.tree.map(lambda x: hosts.place(x, replicated(mesh)), pad_negative(kept.states, lengths))


def pad_negative(states: Mapping[str, np.ndarray], lengths: Mapping[str, int]) -> Texts:
    """One text's states [l d] by name, padded, without a batch axis: what guidance leads away from."""
    return jax.tree.map(lambda x: x[0], pad([states], lengths))


def _kept(reader: RecordReader, text: str, lengths: Mapping[str, int]) -> NegativeText:
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
    encoder = fit.text_encoder(reader.metadata)
    have, want = _kinds(kept.states), _kinds(reader[0].task_states)
    if kept.text_encoder != encoder or have != want:
        raise RecordError(
            f"{path} has states by text encoder {kept.text_encoder!r} ({have}), the records by {encoder!r} ({want}):"
            f" {again}"
        )
    for key, states in kept.states.items():
        if len(states) > lengths[key]:
            raise RecordError(
                f"the negative text in {path} has {len(states)} tokens, and texts are padded to {lengths[key]}: raise"
                " config.text_length"
            )
    return kept


def _kinds(states: Mapping[str, np.ndarray]) -> str:
    """Width and type of states by name."""
    return ", ".join(f"{name}: {x.shape[1]} wide, {x.dtype}" for name, x in sorted(states.items()))
