"""Data sets that are written shard after shard, by one process or by several, and go on after an interruption.

Beside each finished shard lies a note, NAME-00000-of-00004.arrayrecord.note: the request that it answers, its size and
hash, and what all shards together have to agree on. A note is believed if it is for the same request and the file is
what it says; any other shard is written anew. Whoever finds all notes in order writes the index, which is then the
same for everyone. The notes stay: a repeated call finds that there is nothing to do.

Shards take their final names as they are finished, so a data set of that name that was there before is gone from the
first of them on. One process at a time may write a shard; several may write several. All of them see one folder.
"""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from world_distill.data.records.record_format import Record, RecordError
from world_distill.data.records.shard_files import (
    aside,
    check_name,
    disk,
    entry_of,
    fsync,
    index_of,
    json_bytes,
    remove_index,
    sha256,
    shard_name,
    write_atomically,
    write_index,
    write_shards,
)

_NOTE_KEYS = {"request", "file", "count", "bytes", "sha256", "type", "ids", "shapes", "longest_text"}


class ResumableSet:
    """Writes data set `name` in `folder`.

    Record i is row `i // shards` of shard `i % shards`; of a `sequential` set, shards of any size follow each other.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        name: str,
        shards: int,
        *,
        request: Mapping[str, Any],
        metadata: Mapping[str, str] | None = None,
        sequential: bool = False,
    ):
        """`request` is all that the records depend on, as JSON values; `metadata` is kept in the index, too.

        Raises RecordError if the name or the number of shards will not do.
        """
        check_name(name, shards)
        self.folder, self.name, self.shards, self.metadata = pathlib.Path(folder), name, shards, dict(metadata or {})
        self.sequential = sequential
        self.request = json.loads(json.dumps({**request, "shards": shards, "metadata": self.metadata}))
        self._hashed: dict[int, dict] = {}  # notes whose shards this process has read, or written

    def note(self, shard: int) -> dict[str, Any] | None:
        """The note of a finished shard; None if there is none that can be believed."""
        path = self._path(shard)
        try:
            note = json.loads(_note_path(path).read_bytes())
            if not isinstance(note, dict) or not note.keys() >= _NOTE_KEYS or note["request"] != self.request:
                return None
            if note["file"] != path.name or path.stat().st_size != note["bytes"]:
                return None
            if note != self._hashed.get(shard) and sha256(path) != note["sha256"]:
                return None
        except (OSError, ValueError):
            return None
        self._hashed[shard] = note
        return note

    def write(self, shard: int, records: Iterable[Record]) -> None:
        """Writes one shard and its note. `records` is read once; there may be none.

        Raises RecordError if two records have one id, types or shapes differ, or the disk refuses.
        """
        path = self._path(shard)
        with disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.iterdir():  # of a writer of this shard that was killed
                if leftover.name.startswith(f".{path.name}.") and leftover.suffix == ".tmp":
                    leftover.unlink(missing_ok=True)
        temporary = aside(path)
        try:
            written = write_shards([temporary], records)
            with disk(self.folder):
                note = entry_of(temporary, written.counts[0], name=path.name) | {
                    "request": self.request, "type": written.kind, "ids": written.ids, "shapes": written.shapes,
                    "longest_text": written.longest,
                }  # fmt: skip
                remove_index(self.folder, self.name)
                os.replace(temporary, path)
                fsync(self.folder)
                write_atomically(_note_path(path), json_bytes(note))
        finally:
            temporary.unlink(missing_ok=True)
        self._hashed[shard] = note

    def join(self) -> list[int]:
        """Writes the index if every shard is finished; returns those that are not. May be called again, by anyone.

        Raises:
          RecordError: there are no records, or the shards do not agree with each other, or the disk refuses.
        """
        present = [_note_path(self._path(i)).exists() for i in range(self.shards)]  # hashing takes its time
        if not all(present):
            return [i for i, there in enumerate(present) if not there]
        found = [self.note(i) for i in range(self.shards)]
        notes = [note for note in found if note is not None]
        if len(notes) < len(found):
            return [i for i, note in enumerate(found) if note is None]
        self._check(notes)
        entries = [{key: note[key] for key in ("file", "count", "bytes", "sha256")} for note in notes]
        kind = next(note["type"] for note in notes if note["count"])
        longest: dict[str, Any] = {}
        for note in notes:
            for name, text in (note["longest_text"] or {}).items():
                if text["length"] > longest.get(name, {"length": 0})["length"]:
                    longest[name] = text
        index = index_of(kind, entries, longest or None, self.metadata, sequential=self.sequential)
        path = self.folder / f"{self.name}.json"
        with disk(self.folder):
            if not path.exists() or path.read_bytes() != json_bytes(index):
                write_index(self.folder, self.name, index)
        return []

    def _path(self, shard: int) -> pathlib.Path:
        return self.folder / shard_name(self.name, shard, self.shards)

    def _check(self, notes: list[dict]) -> None:
        """Raises RecordError unless the shards belong together."""
        total = sum(note["count"] for note in notes)
        if not total:
            raise RecordError(f"{self.folder}: no records to write")
        for i, note in enumerate(notes):
            if not self.sequential and note["count"] != len(range(i, total, self.shards)):
                raise RecordError(f"{self._path(i)} has {note['count']} of {total} records, which is not its share")
        full = [note for note in notes if note["count"]]
        for note in full:
            if (note["type"], note["shapes"]) != (full[0]["type"], full[0]["shapes"]):
                raise RecordError(
                    f"{self.folder / note['file']} holds {note['type']}s of shapes {note['shapes']}, {full[0]['file']}"
                    f" {full[0]['type']}s of {full[0]['shapes']}: a data set holds one family at one resolution."
                    " Delete the shard that is wrong and write it again"
                )
        ids = collections.Counter(i for note in notes for i in note["ids"])
        repeated, times = ids.most_common(1)[0]
        if times > 1:
            raise RecordError(f"{self.folder / self.name}: two records have the id {repeated!r}")


def _note_path(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_name(f"{shard.name}.note")
