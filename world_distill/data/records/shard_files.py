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
from collections.abc import Iterable, Sequence
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from array_record.python.array_record_data_source import ArrayRecordDataSource

from world_distill.data.records.heads import Heads
from world_distill.data.records.record_format import AnnotatedRecord, EncodedRecord, Record, RecordError

TYPES = {cls.__name__: cls for cls in (AnnotatedRecord, EncodedRecord)}
# Group size 1 is one record a chunk, which random access wants. Pictures and bf16 states do not compress any further.
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


def check_maker(folder: pathlib.Path, name: str, verb: str) -> None:
    """Keeps `verb` from replacing the annotated records that another verb wrote; a verb may replace its own.

    Raises:
      RecordError: the card of the data set tells of another verb.
    """
    try:
        card = json.loads((folder / f"{name}.card.json").read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(card, dict) or not (folder / f"{name}.json").exists():
        return
    signs = {"annotate": "annotator" in card, "import-tasks": "schema" in card}
    signs["import-videos"] = "videos" in card.get("counts", ())
    made = next((maker for maker, sign in signs.items() if sign), verb)
    if made != verb:
        raise RecordError(
            f"{folder / name} is there already, from `world-distill {made}`: {verb} would replace it. Give another"
            f" --out or --name, or delete {folder / name}.json"
        )


def shards_of(folder: pathlib.Path, name: str, suffix: str = "") -> list[pathlib.Path]:
    """All shards of data set `name`, whatever their number, or what is called as one and a `suffix` (a pattern)."""
    pattern = re.escape(name) + r"-\d{5}-of-\d{5}\.arrayrecord" + suffix
    return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]


@dataclasses.dataclass(frozen=True)
class Written:
    """What went into the shards of one call of `write_shards`."""

    kind: str | None  # type of the records; None if there are none
    counts: list[int]  # records a shard
    clips: bool  # whether a row with its clip follows each record
    ids: list[str]
    # Of all encoded records: of each scene array shape and type, of each text width and type, of each clip array as of
    # a scene's, where there are clips.
    shapes: list | None
    longest: dict[str, Any] | None  # {name: {"length", "id"}} of the longest text of encoded records
    runs: list[list[int]]  # [shard, count] of neighbouring records in one shard


class _SameShapes:
    """Holds encoded records to one set of arrays and shapes, and remembers the longest text of each name."""

    def __init__(self):
        self.first = None
        self.longest: dict[str, Any] = {}

    def add(self, record: EncodedRecord) -> None:
        scene, clip = (
            {name: [list(array.shape), array.dtype.name] for name, array in sorted(arrays.items())}
            for arrays in (record.scene, record.clip)
        )
        task, solution = (
            {name: [text.shape[1], text.dtype.name] for name, text in sorted(states.items())}
            for states in (record.task_states, record.solution_states)
        )
        shapes = [scene, task, solution] + ([clip] if clip else [])
        self.first = self.first or shapes
        if shapes != self.first or task != solution:
            raise RecordError(
                f"record {record.id!r}: scene shapes and text widths, and clip shapes, {shapes}, others have"
                f" {self.first}: a set holds one family at one resolution"
            )
        for name, text in record.task_states.items():
            length = max(len(text), len(record.solution_states[name]))
            if length > self.longest.get(name, {"length": 0})["length"]:
                self.longest[name] = {"length": length, "id": record.id}


class _Shard:
    """One file that is being written: records, of each image the scene once, and at the end their heads.

    Where records have clips, each is followed by a row with its clip; rows are then counted in such pairs.
    """

    def __init__(self, path: pathlib.Path, scene_dtype: str | None):
        self.path, self._scene_dtype, self._heads = path, scene_dtype, Heads.empty()
        self._rows: dict[str, tuple[int, bytes]] = {}  # by image: where a scene stands, and its hash
        self._last: tuple[int, Any] | None = None  # row of a scene, and the record that it was written with
        self._last_clip: tuple[int, Any] | None = None  # the same of a clip
        self.clips = False
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)

    def __len__(self) -> int:
        return len(self._heads)

    def add(self, record: Record) -> None:
        row = self._row_of(record)
        if isinstance(record, EncodedRecord):
            data = record.to_bytes(row, scene_dtype=self._scene_dtype)
        else:
            data = record.to_bytes(row)
        rows = [data, *self._clip_of(record)]
        with disk(self.path.parent):
            for data in rows:
                self._writer.write(data)
        self._heads.append(record)

    def _clip_of(self, record: Record) -> list[bytes]:
        """The row of a record's clip; [] where records have none."""
        if not isinstance(record, EncodedRecord) or not record.clip:
            return []
        self.clips = True
        if self._last_clip is not None and record.shares_clip(self._last_clip[1]):
            return [record.clip_to_bytes(self._last_clip[0])]
        self._last_clip = len(self), record
        return [record.clip_to_bytes(dtype=self._scene_dtype)]

    def _row_of(self, record: Any) -> int | None:
        """Where the scene of a record stands already; None: nowhere."""
        if self._last is not None and record.shares_scene(self._last[1]):
            return self._last[0]
        digest, known = record.scene_digest(), self._rows.get(record.image_id)
        if known is not None and known[1] == digest:
            return known[0]
        self._last, self._rows[record.image_id] = (len(self), record), (len(self), digest)
        return None

    def finish(self) -> None:
        """Flushes the file to the disk and counts it again. Raises OSError or RuntimeError."""
        self._writer.write(self._heads.to_bytes())
        self._writer.close()
        fsync(self.path)
        rows = len(self) * (1 + self.clips)
        if (found := len(ArrayRecordDataSource(str(self.path)))) != rows + 1:
            raise OSError(f"{rows} rows were written and {found - 1} came back")

    def give_up(self) -> None:
        if self._writer.is_open():
            with contextlib.suppress(Exception):  # it is given up already, and the first error counts
                self._writer.close()


def write_shards(
    paths: Sequence[pathlib.Path], records: Iterable[Record], *, scene_dtype: str | None = None
) -> Written:
    """Deals `records` out to the files `paths`, flushes them to the disk and counts them again.

    All records of an image go to one file, in which its scene stands once, in the type `scene_dtype` if given, as do
    clips; a new image goes to the file with the fewest records.

    Raises:
      RecordError: two records have one id, types or shapes differ, or the disk refuses.
    """
    kinds, ids, shapes, shards = set(), {}, _SameShapes(), []
    of_image: dict[str, int] = {}
    runs: list[list[int]] = []
    try:
        with disk(paths[0].parent):
            for path in paths:
                shards.append(_Shard(path, scene_dtype))
        for record in records:
            kinds.add(type(record).__name__)
            if len(kinds) > 1 or not kinds <= TYPES.keys():
                raise RecordError(f"a data set holds one record type, this one got {sorted(kinds)}")
            if record.id in ids:
                raise RecordError(f"two records have the id {record.id!r}")
            ids[record.id] = None
            if isinstance(record, EncodedRecord):
                shapes.add(record)
            if record.image_id not in of_image:
                of_image[record.image_id] = min(range(len(shards)), key=lambda i: len(shards[i]))
            shard = of_image[record.image_id]
            shards[shard].add(record)
            if not runs or runs[-1][0] != shard:
                runs.append([shard, 0])
            runs[-1][1] += 1
        with disk(paths[0].parent):
            for shard in shards:
                shard.finish()
    finally:
        for shard in shards:
            shard.give_up()
    longest = shapes.longest if shapes.first else None
    kind, clips = kinds.pop() if kinds else None, any(shard.clips for shard in shards)
    return Written(kind, [len(s) for s in shards], clips, list(ids), shapes.first, longest, runs)


def entry_of(path: pathlib.Path, count: int, *, name: str, clips: bool) -> dict[str, Any]:
    """What an index promises about the shard at `path` that will be called `name`."""
    entry = {"file": name, "count": count, "bytes": path.stat().st_size, "sha256": sha256(path), "heads": True}
    return entry | ({"clips": True} if clips and count else {})


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
