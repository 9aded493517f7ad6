"""The files of a data set: shards are written aside, flushed, counted again, and then renamed into place.

Nothing here trusts a name: what a file holds is promised by an index (`reader.py`) or a note (`resumable.py`) with its
size and hash, which is written after the file has its name.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from array_record.python.array_record_data_source import ArrayRecordDataSource

from world_distill.data.records.record_format import VERSIONS, AnnotatedRecord, EncodedRecord, Record, RecordError

INDEX_FORMAT = "world_distill records"
SEQUENTIAL = "sequential"  # an index's "order"; without one, records are dealt out to the shards in turn
TYPES = {cls.__name__: cls for cls in (AnnotatedRecord, EncodedRecord)}
# Group size 1 is one record a chunk, which random access wants. PNG and bf16 latents do not compress any further.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def check_name(name: str, shards: int) -> None:
    """Raises RecordError unless a data set can be called `name` and have `shards` shards."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or shards < 1:
        raise RecordError(f"name {name!r} (letters, digits, . _ -) or shards {shards} (at least 1) will not do")


def part_suffix(part: int, parts: int) -> str:
    """What follows a data set's name in the files of one part of it."""
    return f"-{part:05d}-of-{parts:05d}"


def shard_name(name: str, shard: int, shards: int) -> str:
    """File name of a shard."""
    return f"{name}{part_suffix(shard, shards)}.arrayrecord"


def shards_of(folder: pathlib.Path, name: str, suffix: str = "") -> list[pathlib.Path]:
    """All shards of data set `name`, whatever their number, or what is called as one and a `suffix` (a pattern)."""
    pattern = re.escape(name) + r"-\d{5}-of-\d{5}\.arrayrecord" + suffix
    return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]


@dataclasses.dataclass(frozen=True)
class Written:
    """What went into the shards of one call of `write_shards`."""

    kind: str | None  # type of the records; None if there are none
    counts: list[int]  # records a shard
    ids: list[str]
    shapes: list | None  # of all encoded records: of each scene array shape and type, of each text width and type
    longest: dict[str, Any] | None  # {name: {"length", "id"}} of the longest text of encoded records


class _SameShapes:
    """Holds encoded records to one set of arrays and shapes, and remembers the longest text of each name."""

    def __init__(self):
        self.first = None
        self.longest: dict[str, Any] = {}

    def add(self, record: EncodedRecord) -> None:
        scene = {name: [list(array.shape), array.dtype.name] for name, array in sorted(record.scene.items())}
        task, solution = (
            {name: [text.shape[1], text.dtype.name] for name, text in sorted(states.items())}
            for states in (record.task_states, record.solution_states)
        )
        shapes = [scene, task, solution]
        self.first = self.first or shapes
        if shapes != self.first or task != solution:
            raise RecordError(
                f"record {record.id!r}: scene shapes and text widths {shapes}, others have {self.first}: a data set"
                " holds one family at one resolution"
            )
        for name, text in record.task_states.items():
            length = max(len(text), len(record.solution_states[name]))
            if length > self.longest.get(name, {"length": 0})["length"]:
                self.longest[name] = {"length": length, "id": record.id}


class _SharedScenes:
    """Rows of one shard that hold a scene which the records behind them may share."""

    def __init__(self):
        self._row, self._record = 0, None

    def row_of(self, record: EncodedRecord, row: int) -> int | None:
        """Where the scene of a record that becomes row `row` stands already; None: nowhere."""
        if self._record is not None and record.shares_scene(self._record):
            return self._row
        self._row, self._record = row, record
        return None


def write_shards(paths: Sequence[pathlib.Path], records: Iterable[Record]) -> Written:
    """Deals `records` out to the files `paths` in turn, flushes them to the disk and counts them again.

    Raises:
      RecordError: two records have one id, types or shapes differ, or the disk refuses.
    """
    counts, kinds, ids, shapes, writers = [0] * len(paths), set(), {}, _SameShapes(), []
    shared = [_SharedScenes() for _ in paths]
    try:
        with disk(paths[0].parent):
            for path in paths:
                writers.append(array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS))
        for i, record in enumerate(records):
            kinds.add(type(record).__name__)
            if len(kinds) > 1 or not kinds <= TYPES.keys():
                raise RecordError(f"a data set holds one record type, this one got {sorted(kinds)}")
            if record.id in ids:
                raise RecordError(f"two records have the id {record.id!r}")
            ids[record.id] = None
            shard = i % len(paths)
            if isinstance(record, EncodedRecord):
                shapes.add(record)
                data = record.to_bytes(shared[shard].row_of(record, counts[shard]))
            else:
                data = record.to_bytes()
            with disk(paths[0].parent):
                writers[shard].write(data)
            counts[shard] += 1
        with disk(paths[0].parent):
            for path, writer, count in zip(paths, writers, counts, strict=True):
                writer.close()
                fsync(path)
                if (found := len(ArrayRecordDataSource(str(path)))) != count:
                    raise OSError(f"{count} records were written and {found} came back")
    finally:
        for writer in writers:
            if writer.is_open():
                with contextlib.suppress(Exception):  # it is given up already, and the first error counts
                    writer.close()
    longest = shapes.longest if shapes.first else None
    return Written(kinds.pop() if kinds else None, counts, list(ids), shapes.first, longest)


def entry_of(path: pathlib.Path, count: int, *, name: str) -> dict[str, Any]:
    """What an index promises about the shard at `path` that will be called `name`."""
    return {"file": name, "count": count, "bytes": path.stat().st_size, "sha256": sha256(path)}


def index_of(
    kind: str,
    shards: Sequence[dict],
    longest: dict | None,
    metadata: Mapping[str, str] | None,
    *,
    sequential: bool = False,
) -> dict:
    """The index of a data set of these shards, dealt out in turn, or one after another if `sequential`."""
    index = {
        "format": INDEX_FORMAT,
        "version": VERSIONS[TYPES[kind]],
        "type": kind,
        "count": sum(s["count"] for s in shards),
        "shards": list(shards),
        "longest_text": longest,
        "metadata": dict(metadata or {}),
    }
    return index | ({"order": SEQUENTIAL} if sequential else {})


def write_index(folder: pathlib.Path, name: str, index: dict) -> None:
    """Makes the promise that the shards of `index` are whole, and removes those of another number of shards."""
    write_atomically(folder / f"{name}.json", json_bytes(index))
    current = {shard["file"] for shard in index["shards"]}
    for path in shards_of(folder, name, r"(\.note)?"):
        if path.name.removesuffix(".note") not in current:
            path.unlink(missing_ok=True)


def remove_index(folder: pathlib.Path, name: str) -> None:
    """Takes the promise back: old promises must never stand beside new shards."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    fsync(folder)


def aside(path: pathlib.Path) -> pathlib.Path:
    """A name beside `path` for writing what will take its place."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Removes what killed writers of these files left beside them. Nobody else may be writing them."""
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9]+-[0-9a-f]+\.tmp")
    with disk(folder):
        for path in folder.iterdir():
            if pattern.fullmatch(path.name):
                path.unlink(missing_ok=True)


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Makes `path` hold `data`, or leaves it as it was. Raises OSError."""
    temporary = aside(path)
    try:
        temporary.write_bytes(data)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def fsync(path: pathlib.Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: pathlib.Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk(folder: pathlib.Path):
    """Names the folder in what the disk, or array_record, has to say."""
    try:
        yield
    except RecordError:
        raise
    except (OSError, RuntimeError) as error:
        raise RecordError(
            f"{folder}: cannot write records ({error}): check that it is a writable local folder with space left"
        ) from error
