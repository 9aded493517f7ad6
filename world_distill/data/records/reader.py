"""Records on disk: annotated tasks, encoded tasks, and a reader that trusts nothing half-written.

A data set NAME in a folder is
    NAME-00000-of-00004.arrayrecord, ...   the records, and in the last row of each file their heads (`heads`)
    NAME.json                              the index: counts, sizes, hashes, and which record is where; written last
The index is the promise that every shard is whole. Shards without one are the rest of a job that was cut off, and
are refused. Folders are on a file system (not `gs://`): atomic renames are what the promise rests on.
"""

import bisect
import dataclasses
import hashlib
import itertools
import operator
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from world_distill.data.records.heads import Heads
from world_distill.data.records.index import (
    RUNS,
    SEQUENTIAL,
    WITH_CLIPS,
    index_of,
    longest_texts,
    places,
    read_index,
    remove_index,
    write_index,
)
from world_distill.data.records.record_format import (
    AnnotatedRecord,
    EncodedRecord,
    Record,
    RecordError,
    read_clip,
    read_stored,
)
from world_distill.data.records.shard_files import (
    TYPES,
    aside,
    check_name,
    disk,
    entry_of,
    fsync,
    sha256,
    shard_name,
    shards_of,
    write_atomically,
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
    scene_dtype: str | None = None,
) -> pathlib.Path:
    """Writes a data set and returns the path of its index.

    `records` is read once, one at a time. A data set of that name is replaced, and during the moment of replacing
    there is none: a reader sees the old one, an error, or the new one. One process at a time may write a name.
    `metadata` (text to text) is kept in the index. `scene_dtype` is as in `EncodedRecord.to_bytes`, of clips too.
    Raises RecordError if there are no records, two have one id, types or shapes differ, or the disk refuses; whatever
    stops it before the replacing, the old data set stays.
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
        written = write_shards(temporary, records, scene_dtype=scene_dtype)
        if written.kind is None:
            raise RecordError(f"{folder}: no records to write")
        with disk(folder):
            parts = zip(temporary, written.counts, paths, strict=True)
            entries = [entry_of(t, count, name=path.name, clips=written.clips) for t, count, path in parts]
            remove_index(folder, name)
            for old, new in zip(temporary, paths, strict=True):
                os.replace(old, new)
            fsync(folder)
            write_index(folder, name, index_of(written.kind, entries, written.longest, metadata, runs=written.runs))
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return folder / f"{name}.json"


class RecordReader:
    """Random access to a data set. A Grain data source; may be pickled and read by several threads."""

    def __init__(self, folder: str | os.PathLike, name: str, record_type: type | None = None, *, clips: bool = False):
        """Opens data set `name` in `folder`, of `record_type` if given; with `clips`, records come with their clips.

        Raises RecordError for all that is wrong, such as a data set without the clips that are asked for.
        """
        self.index_path = pathlib.Path(folder) / f"{name}.json"
        index = read_index(self.index_path)
        if index["type"] not in TYPES or record_type not in (None, TYPES[index["type"]]):
            raise RecordError(
                f"{self.index_path} holds {index['type']}s, not {record_type.__name__ if record_type else 'records'}:"
                " encoded records come from encoding annotated ones"
            )
        self.record_type: type = TYPES[index["type"]]
        self.metadata: dict[str, str] = index["metadata"]
        self.longest_texts: dict[str, dict] = longest_texts(index)  # of encoded records: {name: {"length", "id"}}
        # Two readers of the same bytes have the same fingerprint.
        self.fingerprint = hashlib.sha256("".join(s["sha256"] for s in index["shards"]).encode()).hexdigest()[:16]
        self.shards = len(index["shards"])  # how many files
        self.bytes: int = sum(s["bytes"] for s in index["shards"])
        self.left_out: int = index.get("left_out", 0)  # annotated records that were not encoded (NAME.left_out.jsonl)
        self._count = index["count"]
        self._counts = [s["count"] for s in index["shards"]]
        # Where a record is: by the runs of neighbours, by the ends of shards that follow one another, or by its number.
        self._runs = places(index["runs"]) if index.get("order") == RUNS else None
        self._ends = list(itertools.accumulate(self._counts)) if index.get("order") == SEQUENTIAL else None
        self.has_clips: bool = index["version"] == WITH_CLIPS
        self._clips, self._rows_each = clips, 2 if self.has_clips else 1
        if clips and not self.has_clips:
            raise RecordError(
                f"{self.index_path} holds no clips to learn from: `world-distill import-videos` and `encode` make"
                " records of videos, and `world-distill demonstrate` gives records the Demonstrator's clips"
            )
        self._with_heads = [s.get("heads", False) for s in index["shards"]]
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
        return self._named(*self._place(i), self._read_with_clip if self._clips else self._read)

    def without_scene(self, index: int) -> Any:
        """Record `index` in [0, len) as it is stored: without picture and scene where another row holds them."""
        return self._named(*self._place(index), lambda shard, row: self._stored(shard, row)[0])

    def heads(self) -> Heads:
        """The heads of all records, in their order, without reading the records (of earlier versions: reading them).

        Raises RecordError naming a shard that is damaged.
        """
        shards = Heads.joined(self._named(shard, self._counts[shard], self._heads) for shard in range(self.shards))
        first = [0, *itertools.accumulate(self._counts)]
        return shards.take(first[shard] + row for shard, row in map(self._place, range(self._count)))

    @property
    def has_heads(self) -> bool:
        """Whether `heads` reads them alone."""
        return all(self._with_heads)

    def _place(self, i: int) -> tuple[int, int]:
        """(shard, row) of record i."""
        if self._runs is not None:
            shards, rows = self._runs
            return int(shards[i]), int(rows[i])
        if self._ends is not None:
            shard = bisect.bisect_right(self._ends, i)
            return shard, i - (self._ends[shard - 1] if shard else 0)
        row, shard = divmod(i, len(self._shards))
        return shard, row

    def _named(self, shard: int, row: int, read: Callable[[int, int], Any]) -> Any:
        try:
            return read(shard, row)
        except (RecordError, RuntimeError, OSError) as error:
            path = list(self._hashes)[shard]
            raise RecordError(
                f"{path}, row {row}: {error}; the shard is damaged: copy it, or write the data set again"
            ) from error

    def _read(self, shard: int, row: int) -> Any:
        record, scene_row = self._stored(shard, row)
        if scene_row is None:
            return record
        if not scene_row < row:
            raise RecordError(f"its scene is said to be in row {scene_row}")
        full, further = self._stored(shard, scene_row)
        if further is not None or full.image_id != record.image_id:
            raise RecordError(f"row {scene_row} does not hold the scene of image {record.image_id!r}")
        arrays = {"scene": full.scene} if isinstance(full, EncodedRecord) else {}
        return dataclasses.replace(record, image_png=full.image_png, **arrays)

    def _read_with_clip(self, shard: int, row: int) -> Any:
        record = self._read(shard, row)
        clip = read_clip(self._shards[shard][2 * row + 1], record.id)
        if isinstance(clip, int):
            other = clip
            if not other < row:
                raise RecordError(f"its clip is said to be beside record {other}")
            owner = self._stored(shard, other)[0]
            clip = read_clip(self._shards[shard][2 * other + 1], owner.id)
            if owner.image_id != record.image_id or isinstance(clip, int):
                raise RecordError(f"record {other} does not hold the clip of image {record.image_id!r}")
        return dataclasses.replace(record, clip=clip)

    def _stored(self, shard: int, row: int) -> tuple[Any, int | None]:
        return read_stored(self.record_type, self._shards[shard][row * self._rows_each])

    def _heads(self, shard: int, count: int) -> Heads:
        if self._with_heads[shard]:
            return Heads.from_bytes(bytes(self._shards[shard][count * self._rows_each]), count)
        return Heads.of(self._stored(shard, row)[0] for row in range(count))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"RecordReader({str(self.index_path)!r}, {self._count} {self.record_type.__name__}s)"

    def verify(self) -> None:
        """Reads every byte and compares the hashes. Raises RecordError naming the shards that differ."""
        bad = [path.name for path, digest in self._hashes.items() if sha256(path) != digest]
        if bad:
            raise RecordError(f"{self.index_path}: shards {bad} are not the ones written; copy or write them again")


def _open_shard(path: pathlib.Path, shard: dict) -> ArrayRecordDataSource:
    advice = "the shard is truncated or replaced: copy it, or write the data set again"
    if path.stat().st_size != shard["bytes"]:
        raise RecordError(f"{path} has {path.stat().st_size} bytes, its index says {shard['bytes']}: {advice}")
    try:
        source = ArrayRecordDataSource(str(path))
    except (RuntimeError, OSError) as error:
        raise RecordError(f"{path} cannot be opened ({error}): {advice}") from error
    count, odd = divmod(len(source) - shard.get("heads", False), 1 + shard.get("clips", False))
    if odd or count != shard["count"]:
        raise RecordError(f"{path} has {count} records, its index says {shard['count']}: {advice}")
    return source
