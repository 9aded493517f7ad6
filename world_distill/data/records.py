"""Records on disk: annotated tasks, encoded tasks, and a reader that trusts nothing half-written.

A data set NAME in a folder is
    NAME-00000-of-00004.arrayrecord, ...   record i is row `i // shards` of shard `i % shards`
    NAME.json                              the index: counts, sizes and hashes; written last
The index is the promise that every shard is whole. Shards without one are the rest of a job that was cut off, and
are refused. Folders are on a file system (not `gs://`): atomic renames are what the promise rests on.
"""

import contextlib
import hashlib
import json
import operator
import os
import pathlib
import re
import secrets
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from world_distill.data.record_types import VERSION, AnnotatedRecord, EncodedRecord, Record, RecordError

_FORMAT = "world_distill records"
# Group size 1 is one record a chunk, which random access wants. PNG and bf16 latents do not compress any further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_TYPES = {cls.__name__: cls for cls in (AnnotatedRecord, EncodedRecord)}

__all__ = [
    "AnnotatedRecord", "EncodedRecord", "Record", "RecordError", "RecordReader",
    "write_atomically", "write_records",
]  # fmt: skip


class _SameShapes:
    """Holds encoded records to one latent shape and one text width, and remembers the longest text."""

    def __init__(self):
        self.first = None
        self.longest = {"length": 0, "id": ""}

    def add(self, record: EncodedRecord) -> None:
        shapes = (record.scene.shape, record.task_text.shape[1], record.solution_text.shape[1])
        self.first = self.first or shapes
        if shapes != self.first or shapes[1] != shapes[2]:
            raise RecordError(
                f"record {record.id!r}: scene shape and text widths {shapes}, others have {self.first}: a data set"
                " holds one family at one resolution"
            )
        length = max(len(record.task_text), len(record.solution_text))
        if length > self.longest["length"]:
            self.longest = {"length": length, "id": record.id}


def _shard_name(name: str, shard: int, shards: int) -> str:
    return f"{name}-{shard:05d}-of-{shards:05d}.arrayrecord"


def write_records(
    folder: str | os.PathLike,
    name: str,
    records: Iterable[Record],
    shards: int = 1,
    *,
    metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes a data set and returns the path of its index.

    `records` is read once, one at a time. A data set of that name is replaced, and during the moment of replacing
    there is none: a reader sees the old one, an error, or the new one. One process at a time may write a name.
    `metadata` (text to text) is kept in the index. Raises RecordError if there are no records, two have one id, types
    or shapes differ, or the disk refuses; whatever stops it before the replacing, the old data set stays.
    """
    folder = pathlib.Path(folder)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or shards < 1:
        raise RecordError(f"name {name!r} (letters, digits, . _ -) or shards {shards} (at least 1) will not do")
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in _shards_of(folder, f".{name}", r"\..+\.tmp"):
            path.unlink(missing_ok=True)  # a writer that was killed left it
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = [folder / f".{_shard_name(name, i, shards)}.{token}.tmp" for i in range(shards)]
    try:
        kind, counts, longest = _write_shards(temporary, records)
        index = {"format": _FORMAT, "version": VERSION, "type": kind, "count": sum(counts)}
        with _disk(folder):
            index["shards"] = [
                {"file": _shard_name(name, i, shards), "count": n, "bytes": t.stat().st_size, "sha256": _sha256(t)}
                for i, (t, n) in enumerate(zip(temporary, counts, strict=True))
            ]
            index |= {"longest_text": longest, "metadata": dict(metadata or {})}
            _publish(folder, name, temporary, index)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return folder / f"{name}.json"


def _write_shards(paths: list[pathlib.Path], records: Iterable[Record]) -> tuple[str, list[int], dict | None]:
    """Deals `records` out to `paths`, flushes them to the disk and counts them again."""
    counts, kinds, ids, shapes, writers = [0] * len(paths), set(), set(), _SameShapes(), []
    try:
        with _disk(paths[0].parent):
            for path in paths:
                writers.append(array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS))
        for i, record in enumerate(records):
            kinds.add(type(record).__name__)
            if len(kinds) > 1 or not kinds <= _TYPES.keys():
                raise RecordError(f"a data set holds one record type, this one got {sorted(kinds)}")
            if record.id in ids:
                raise RecordError(f"two records have the id {record.id!r}")
            ids.add(record.id)
            if isinstance(record, EncodedRecord):
                shapes.add(record)
            data = record.to_bytes()
            with _disk(paths[0].parent):
                writers[i % len(paths)].write(data)
            counts[i % len(paths)] += 1
        if not ids:
            raise RecordError(f"{paths[0].parent}: no records to write")
        with _disk(paths[0].parent):
            for path, writer, count in zip(paths, writers, counts, strict=True):
                writer.close()
                _fsync(path)
                if (found := len(ArrayRecordDataSource(str(path)))) != count:
                    raise OSError(f"{count} records were written and {found} came back")
    finally:
        for writer in writers:
            if writer.is_open():
                with contextlib.suppress(Exception):  # it is given up already, and the first error counts
                    writer.close()
    return kinds.pop(), counts, shapes.longest if shapes.first else None


def _publish(folder: pathlib.Path, name: str, temporary: list[pathlib.Path], index: dict) -> None:
    # The old index goes first: old promises must never stand beside new shards.
    (folder / f"{name}.json").unlink(missing_ok=True)
    _fsync(folder)
    for path, shard in zip(temporary, index["shards"], strict=True):
        os.replace(path, folder / shard["file"])
    _fsync(folder)
    write_atomically(folder / f"{name}.json", json.dumps(index, indent=1).encode())
    current = {shard["file"] for shard in index["shards"]}
    for path in _shards_of(folder, name):
        if path.name not in current:  # an earlier data set of this name had another number of shards
            path.unlink(missing_ok=True)


def _shards_of(folder: pathlib.Path, name: str, suffix: str = "") -> list[pathlib.Path]:
    pattern = re.escape(name) + r"-\d{5}-of-\d{5}\.arrayrecord" + suffix
    return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Makes `path` hold `data`, or leaves it as it was. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _disk(folder: pathlib.Path):
    """Names the folder in what the disk, or array_record, has to say."""
    try:
        yield
    except RecordError:
        raise
    except (OSError, RuntimeError) as error:
        raise RecordError(
            f"{folder}: cannot write records ({error}): check that it is a writable local folder with space left"
        ) from error


class RecordReader:
    """Random access to a data set. A Grain data source; may be pickled and read by several threads."""

    def __init__(self, folder: str | os.PathLike, name: str, record_type: type | None = None):
        """Opens data set `name` in `folder`, of `record_type` if given. Raises RecordError for all that is wrong."""
        self.index_path = pathlib.Path(folder) / f"{name}.json"
        index = _read_index(self.index_path)
        if index["type"] not in _TYPES or record_type not in (None, _TYPES[index["type"]]):
            raise RecordError(
                f"{self.index_path} holds {index['type']}s, not {record_type.__name__ if record_type else 'records'}:"
                " encoded records come from encoding annotated ones"
            )
        self.record_type: type = _TYPES[index["type"]]
        self.metadata: dict[str, str] = index["metadata"]
        self.longest_text: dict | None = index["longest_text"]  # {"length", "id"} of encoded records
        # Two readers of the same bytes have the same fingerprint.
        self.fingerprint = hashlib.sha256("".join(s["sha256"] for s in index["shards"]).encode()).hexdigest()[:16]
        self._count = index["count"]
        self._hashes = {pathlib.Path(folder) / s["file"]: s["sha256"] for s in index["shards"]}
        if self._count == 0:
            raise RecordError(f"{self.index_path}: the data set is empty; write it again")
        missing = [p.name for p in self._hashes if not p.exists()]
        if missing:
            raise RecordError(f"{self.index_path}: missing shards {missing}; copy them, or write the data set again")
        self._shards = [_open_shard(p, s) for p, s in zip(self._hashes, index["shards"], strict=True)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: typing.SupportsIndex) -> Any:
        """Record `index`, in the order of writing. Raises IndexError, or RecordError naming the shard and row."""
        i = operator.index(index)
        i += self._count if i < 0 else 0
        if not 0 <= i < self._count:
            raise IndexError(f"{self.index_path}: no record {index} among {self._count}")
        row, shard = divmod(i, len(self._shards))
        try:
            return self.record_type.from_bytes(self._shards[shard][row])
        except (RecordError, RuntimeError, OSError) as error:
            path = list(self._hashes)[shard]
            raise RecordError(
                f"{path}, row {row}: {error}; the shard is damaged: copy it, or write the data set again"
            ) from error

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"RecordReader({str(self.index_path)!r}, {self._count} {self.record_type.__name__}s)"

    def verify(self) -> None:
        """Reads every byte and compares the hashes. Raises RecordError naming the shards that differ."""
        bad = [path.name for path, digest in self._hashes.items() if _sha256(path) != digest]
        if bad:
            raise RecordError(f"{self.index_path}: shards {bad} are not the ones written; copy or write them again")


def _read_index(path: pathlib.Path) -> dict:
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        name = path.name.removesuffix(".json")
        found = path.parent.is_dir() and _shards_of(path.parent, name)
        left = "shards are there, so its writing was cut off" if found else "no shards"
        raise RecordError(f"{path}: no readable index of a data set ({left}): write the data set (again)") from error
    except ValueError as error:
        raise RecordError(f"{path}: the index is damaged ({error}): write the data set again") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise RecordError(f"{path} is not the index of a data set: give the folder and name of one")
    if index.get("version") != VERSION:
        raise RecordError(
            f"{path}: format version {index.get('version')}, this program reads {VERSION}: write the data set again"
        )
    try:
        counts = [(s["count"], s["bytes"], s["sha256"], s["file"])[0] for s in index["shards"]]
        whole = sum(counts) == index["count"] and index.keys() >= {"type", "metadata", "longest_text"}
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path}: the index is damaged (lacks {error}): write the data set again") from error
    if not whole:
        raise RecordError(f"{path}: the index contradicts itself: write the data set again")
    return index


def _open_shard(path: pathlib.Path, shard: dict) -> ArrayRecordDataSource:
    advice = "the shard is truncated or replaced: copy it, or write the data set again"
    if path.stat().st_size != shard["bytes"]:
        raise RecordError(f"{path} has {path.stat().st_size} bytes, its index says {shard['bytes']}: {advice}")
    try:
        source = ArrayRecordDataSource(str(path))
    except (RuntimeError, OSError) as error:
        raise RecordError(f"{path} cannot be opened ({error}): {advice}") from error
    if len(source) != shard["count"]:
        raise RecordError(f"{path} has {len(source)} records, its index says {shard['count']}: {advice}")
    return source
