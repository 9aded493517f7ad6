"""Records on disk: annotated tasks, encoded tasks, and a reader that trusts nothing half-written.

A data set NAME in a folder is
    NAME-00000-of-00004.arrayrecord, ...   record i is row `i // shards` of shard `i % shards`, or, where several
                                           machines wrote shards of different sizes, they follow one another
    NAME.json                              the index: counts, sizes and hashes; written last
The index is the promise that every shard is whole. Shards without one are the rest of a job that was cut off, and
are refused. Folders are on a file system (not `gs://`): atomic renames are what the promise rests on.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import pathlib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from world_distill.data.records.record_format import (
    READ,
    TEXT,
    AnnotatedRecord,
    EncodedRecord,
    Record,
    RecordError,
    read_encoded,
)
from world_distill.data.records.shard_files import (
    INDEX_FORMAT,
    SEQUENTIAL,
    TYPES,
    aside,
    check_name,
    disk,
    entry_of,
    fsync,
    index_of,
    remove_index,
    sha256,
    shard_name,
    shards_of,
    write_atomically,
    write_index,
    write_shards,
)

__all__ = [
    "AnnotatedRecord", "EncodedRecord", "Record", "RecordError", "RecordReader",
    "write_atomically", "write_records",
]  # fmt: skip


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
    check_name(name, shards)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in shards_of(folder, f".{name}", r"\..+\.tmp"):
            path.unlink(missing_ok=True)  # a writer that was killed left it
    paths = [folder / shard_name(name, i, shards) for i in range(shards)]
    temporary = [aside(path) for path in paths]
    try:
        written = write_shards(temporary, records)
        if written.kind is None:
            raise RecordError(f"{folder}: no records to write")
        with disk(folder):
            parts = zip(temporary, written.counts, paths, strict=True)
            entries = [entry_of(t, count, name=path.name) for t, count, path in parts]
            remove_index(folder, name)
            for old, new in zip(temporary, paths, strict=True):
                os.replace(old, new)
            fsync(folder)
            write_index(folder, name, index_of(written.kind, entries, written.longest, metadata))
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return folder / f"{name}.json"


class RecordReader:
    """Random access to a data set. A Grain data source; may be pickled and read by several threads."""

    def __init__(self, folder: str | os.PathLike, name: str, record_type: type | None = None):
        """Opens data set `name` in `folder`, of `record_type` if given. Raises RecordError for all that is wrong."""
        self.index_path = pathlib.Path(folder) / f"{name}.json"
        index = _read_index(self.index_path)
        if index["type"] not in TYPES or record_type not in (None, TYPES[index["type"]]):
            raise RecordError(
                f"{self.index_path} holds {index['type']}s, not {record_type.__name__ if record_type else 'records'}:"
                " encoded records come from encoding annotated ones"
            )
        self.record_type: type = TYPES[index["type"]]
        self.metadata: dict[str, str] = index["metadata"]
        self.longest_texts: dict[str, dict] = _longest_texts(index)  # of encoded records: {name: {"length", "id"}}
        # Two readers of the same bytes have the same fingerprint.
        self.fingerprint = hashlib.sha256("".join(s["sha256"] for s in index["shards"]).encode()).hexdigest()[:16]
        self.shards = len(index["shards"])  # how many files
        self._count = index["count"]
        ends = itertools.accumulate(s["count"] for s in index["shards"])
        self._ends = list(ends) if index.get("order") == SEQUENTIAL else None  # record after the last of each shard
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
        if self._ends is None:
            row, shard = divmod(i, len(self._shards))
        else:
            shard = bisect.bisect_right(self._ends, i)
            row = i - (self._ends[shard - 1] if shard else 0)
        try:
            return self._read(shard, row)
        except (RecordError, RuntimeError, OSError) as error:
            path = list(self._hashes)[shard]
            raise RecordError(
                f"{path}, row {row}: {error}; the shard is damaged: copy it, or write the data set again"
            ) from error

    def _read(self, shard: int, row: int) -> Any:
        if self.record_type is not EncodedRecord:
            return self.record_type.from_bytes(self._shards[shard][row])
        record, scene_row = read_encoded(self._shards[shard][row])
        if scene_row is None:
            return record
        if not scene_row < row:
            raise RecordError(f"its scene is said to be in row {scene_row}")
        full, further = read_encoded(self._shards[shard][scene_row])
        if further is not None or full.image_id != record.image_id:
            raise RecordError(f"row {scene_row} does not hold the scene of image {record.image_id!r}")
        return dataclasses.replace(record, scene=full.scene, image_png=full.image_png)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"RecordReader({str(self.index_path)!r}, {self._count} {self.record_type.__name__}s)"

    def verify(self) -> None:
        """Reads every byte and compares the hashes. Raises RecordError naming the shards that differ."""
        bad = [path.name for path, digest in self._hashes.items() if sha256(path) != digest]
        if bad:
            raise RecordError(f"{self.index_path}: shards {bad} are not the ones written; copy or write them again")


def _read_index(path: pathlib.Path) -> dict:
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        name = path.name.removesuffix(".json")
        found = path.parent.is_dir() and shards_of(path.parent, name)
        left = "shards are there, so its writing was cut off" if found else "no shards"
        raise RecordError(f"{path}: no readable index of a data set ({left}): write the data set (again)") from error
    except ValueError as error:
        raise RecordError(f"{path}: the index is damaged ({error}): write the data set again") from error
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT:
        raise RecordError(f"{path} is not the index of a data set: give the folder and name of one")
    kind = index.get("type")
    known = READ[TYPES[kind]] if isinstance(kind, str) and kind in TYPES else (1,)
    if index.get("version") not in known:
        raise RecordError(
            f"{path}: format version {index.get('version')}, this program reads {' and '.join(map(str, known))}: write"
            " the data set again"
        )
    try:
        problem = _contradiction(index)
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path}: the index is damaged (lacks {error}): write the data set again") from error
    if problem:
        raise RecordError(f"{path}: the index contradicts itself ({problem}): write the data set again")
    return index


def _longest_texts(index: dict) -> dict[str, dict]:
    longest = index["longest_text"]
    if longest is None:
        return {}
    if not isinstance(longest, dict):
        raise TypeError("a table of longest texts")
    return {TEXT: longest} if index["version"] == 1 else longest


def _contradiction(index: dict) -> str | None:
    """What in an index cannot be; None if all of it can. Raises KeyError where something is missing, or TypeError."""
    shards = [{key: s[key] for key in ("file", "count", "bytes", "sha256")} for s in index["shards"]]
    counts, files = [s["count"] for s in shards], [s["file"] for s in shards]
    total, order = index["count"], index.get("order")
    typed: list[tuple[Any, type]] = [(index["type"], str)]
    for name, longest in _longest_texts(index).items():
        typed += [(name, str), (longest["length"], int), (longest["id"], str)]
    typed += [(s[key], int) for s in shards for key in ("count", "bytes")]
    typed += [(s[key], str) for s in shards for key in ("file", "sha256")]
    metadata = index["metadata"] if isinstance(index["metadata"], dict) else {None: None}
    typed += [(text, str) for item in metadata.items() for text in item]
    if not all(type(value) is kind for value, kind in [*typed, (total, int)]):
        return "a value is of another type"
    if len(set(files)) < len(files) or not all(re.fullmatch(r"[\w.-]+\.arrayrecord", file) for file in files):
        return "shards have no names of their own"
    if min(counts, default=0) < 0 or sum(counts) != total:
        return f"shards have {sum(counts)} records, of {total}"
    if order not in (None, SEQUENTIAL):
        return f"order {order!r}"
    if order is None and counts != [len(range(i, total, len(shards))) for i in range(len(shards))]:
        return f"shards have {counts} records, which were not dealt out in turn"
    return None


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
