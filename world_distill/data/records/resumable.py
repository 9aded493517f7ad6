"""Data sets that are written shard after shard, by one process or by several, and go on after an interruption.

Beside each finished shard lies a note, NAME-00000-of-00004.arrayrecord.note: the request that it answers, its size and
hash, and what all shards together have to agree on. A note is believed if it is for the same request and the file is
what it says; any other shard is written anew. Whoever finds all notes in order writes the index, which is then the
same for everyone. The notes stay: a repeated call finds that there is nothing to do. What a shard should have held and
does not is in its note, too, and NAME.left_out.jsonl, written with the index, lists it.

Shards take their final names as they are finished, so a data set of that name that was there before is gone from the
first of them on. One process at a time may write a shard; several may write several. All of them see one folder.
"""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from world_distill.data.records.index import index_of, remove_index, write_index
from world_distill.data.records.record_format import Record, RecordError
from world_distill.data.records.shard_files import (
    aside,
    check_name,
    disk,
    entry_of,
    fsync,
    json_bytes,
    sha256,
    shard_name,
    shards_of,
    write_atomically,
    write_shards,
)

_ENTRY_KEYS = ("file", "count", "bytes", "sha256", "heads", "clips")
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
        accepts: Callable[[Mapping[str, Any]], bool] = lambda note: True,
    ):
        """`request` is all that the records depend on, as JSON values; `metadata` is kept in the index, too.

        `accepts` may refuse the note of a finished shard of this request, which is then written anew.

        Raises RecordError if the name or the number of shards will not do.
        """
        check_name(name, shards)
        self.folder, self.name, self.shards, self.metadata = pathlib.Path(folder), name, shards, dict(metadata or {})
        self.sequential, self._accepts = sequential, accepts
        self.request = json.loads(json.dumps({**request, "shards": shards, "metadata": self.metadata}))
        self._hashed: dict[int, dict] = {}  # notes whose shards this process has read, or written

    def note(self, shard: int) -> dict[str, Any] | None:
        """The note of a finished shard; None if there is none that can be believed."""
        path = self._path(shard)
        try:
            note = json.loads(_note_path(path).read_bytes())
            if not isinstance(note, dict) or not note.keys() >= _NOTE_KEYS or note["request"] != self.request:
                return None
            if note["file"] != path.name or path.stat().st_size != note["bytes"] or not self._accepts(note):
                return None
            if note != self._hashed.get(shard) and sha256(path) != note["sha256"]:
                return None
        except (OSError, ValueError):
            return None
        self._hashed[shard] = note
        return note

    def changes(self) -> list[str]:
        """What differs between this request and those that finished shards of the name are of, as `key old -> new`."""
        ours, found = _flat(self.request), set()
        for path in shards_of(self.folder, self.name, r"\.note") if self.folder.is_dir() else ():
            try:
                theirs = _flat(json.loads(path.read_bytes())["request"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged: written anew without a word, as its shard would be
            keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            found |= {f"{key} {theirs.get(key)} -> {ours.get(key)}" for key in keys}
        return sorted(found)

    def write(
        self,
        shard: int,
        records: Iterable[Record],
        *,
        scene_dtype: str | None = None,
        left_out: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """Writes one shard and its note, which it returns. `records` is read once; there may be none.

        `scene_dtype` is as in `write_shards`. `left_out` is what should have been in the shard; it is read when
        `records` has ended, and may grow until then.

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
            written = write_shards([temporary], records, scene_dtype=scene_dtype)
            with disk(self.folder):
                note = entry_of(temporary, written.counts[0], name=path.name, clips=written.clips) | {
                    "request": self.request, "type": written.kind, "ids": written.ids, "shapes": written.shapes,
                    "longest_text": written.longest, "left_out": list(left_out),
                }  # fmt: skip
                remove_index(self.folder, self.name)
                os.replace(temporary, path)
                fsync(self.folder)
                write_atomically(_note_path(path), json_bytes(note))
        except RecordError as error:
            # A call removes what it takes for the leftovers of one that was killed.
            if isinstance(error.__cause__, FileNotFoundError) and self.folder.is_dir():
                raise RecordError(
                    f"{path}: another call has begun to write this shard: let one of them do it"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        self._hashed[shard] = note
        return note

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
        entries = [{key: note[key] for key in _ENTRY_KEYS if key in note} for note in notes]
        kind = next(note["type"] for note in notes if note["count"])
        longest: dict[str, Any] = {}
        for note in notes:
            for name, text in (note["longest_text"] or {}).items():
                if text["length"] > longest.get(name, {"length": 0})["length"]:
                    longest[name] = text
        left_out = [line for note in notes for line in note.get("left_out", ())]
        index = index_of(
            kind, entries, longest or None, self.metadata, sequential=self.sequential, left_out=len(left_out)
        )
        path = self.folder / f"{self.name}.json"
        with disk(self.folder):
            _write_left_out(left_out_path(self.folder, self.name), left_out)
            if not path.exists() or path.read_bytes() != json_bytes(index):
                write_index(self.folder, self.name, index)
        return []

    def _path(self, shard: int) -> pathlib.Path:
        return self.folder / shard_name(self.name, shard, self.shards)

    def _check(self, notes: list[dict]) -> None:
        """Raises RecordError unless the shards belong together."""
        total = sum(note["count"] for note in notes)
        if not total:
            left_out = [line for note in notes for line in note.get("left_out", ())]
            why = f": all {len(left_out)} were left out, such as {left_out[0]}" if left_out else ""
            raise RecordError(f"{self.folder}: no records to write{why}")
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


def left_out_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Lists what was left out of data set `name`: an object a line."""
    return folder / f"{name}.left_out.jsonl"


def _write_left_out(path: pathlib.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
    if not lines:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def _flat(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with its metadata among the other keys."""
    rest = {key: value for key, value in request.items() if key != "metadata"}
    return rest | {f"metadata.{key}": value for key, value in request["metadata"].items()}


def _note_path(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_name(f"{shard.name}.note")
