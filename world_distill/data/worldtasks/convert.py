"""From a data set's rows to AnnotatedRecords, with its pictures as `annotate` keeps them.

Writes the records, NAME.unusable.jsonl with a line for each task that makes none, and NAME.card.json with what was
understood and counted. All three depend on the data alone: importing again gives the same bytes. Tasks are grouped by
their image, in the order of the first row of each, so that each is read and decoded once, in threads.

A task without a solution (a benchmark's) makes a record without one, which training and whatever is told the solution
refuse.
"""

import collections
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from world_distill.data.annotation.pair_rules import CHAT_MARK, check_pair, has_mark
from world_distill.data.images import kinds
from world_distill.data.images.decode import as_kept, decode_image, shrink
from world_distill.data.images.files import File
from world_distill.data.images.lookup import ImageLookup
from world_distill.data.images.ordered import map_ordered
from world_distill.data.images.png import ImageError
from world_distill.data.images.reader import read_rows
from world_distill.data.images.rows import Row
from world_distill.data.images.sources import ImageSource
from world_distill.data.images.unused import Unused
from world_distill.data.records.reader import AnnotatedRecord, RecordError, write_atomically, write_records
from world_distill.data.records.shard_files import check_name, disk, remove_leftovers
from world_distill.data.worldtasks.fields import Item, Schema, Unusable
from world_distill.interfaces import TaskPair

_Kept = tuple[str, bytes]  # sha256 of an image file, the picture as records keep it


class TaskImport:
    """One import of the rows in `files` of the data set in folder `root`."""

    def __init__(
        self,
        root: str | os.PathLike,
        files: Sequence[File],
        schema: Schema,
        *,
        image_root: str | os.PathLike | None = None,
        skip_bad: bool = False,
        unused: Unused | None = None,
        licence: str = "unspecified",
        strict: bool = False,
        min_side: int = 16,
        max_side: int = 0,
        rows: Sequence[Row] | None = None,
        own_ids: bool = False,
    ):
        """
        Args:
          root: folder or address; no picture outside of it is read.
          files: that hold the rows, or rows and pictures (`reader.read_rows`).
          schema: which field is which.
          image_root: folder of the pictures that rows name; None: the root.
          skip_bad: of a damaged file, what comes before the damage counts; otherwise it stops the import.
          unused: learns what was passed over.
          licence: of tasks whose row names none.
          strict: leave out tasks that break a rule of `pair_rules`; otherwise they are counted.
          min_side: pixels; smaller pictures are broken.
          max_side: pixels that the longer side is shrunk to; 0: as it is.
          rows: what the files say; None: they are read.
          own_ids: records are called by the data set's own ids, which have to differ.
        """
        self._rows, self._own_ids = rows, own_ids
        self.root, self.files, self.schema = os.fspath(root), list(files), schema
        self.unused = Unused() if unused is None else unused
        self._image_root, self._skip_bad = image_root, skip_bad
        self._licence, self._strict, self._min_side, self._max_side = licence, strict, min_side, max_side
        self.unusable: list[Unusable] = []
        self.broken_rules: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.licences: collections.Counter[str] = collections.Counter()
        self.example: dict[str, str] | None = None  # of a record
        self._images: dict[str, int] = {}  # records of each, by id

    def write(
        self, folder: pathlib.Path, name: str, shards: int = 1, *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        """Writes data set `name` into `folder`; returns what is on its card.

        Raises:
          ImageError: the rows cannot be read.
          RecordError: no row can be used (NAME.unusable.jsonl says why), or the disk refuses.
        """
        check_name(name, shards)
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, [f"{name}.card.json", f"{name}.unusable.jsonl", f"{name}.json"])
        found = self._find_images()
        records = self._records(found, progress)
        first = next(records, None)
        if first is None:
            self._write_unusable(folder, name)
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._reasons().most_common())
            raise RecordError(
                f"{self._said()}: no row can be used ({reasons or 'there are none'}); {name}.unusable.jsonl in {folder}"
                " lists them, with the keys that they have"
            )
        write_records(folder, name, itertools.chain([first], records), shards)
        self._write_unusable(folder, name)
        for reason, count in self._reasons().items():
            self.unused.count("tasks", reason, count)
        card = self._card(name)
        with disk(folder):
            text = json.dumps(card, indent=1, ensure_ascii=False)
            write_atomically(folder / f"{name}.card.json", text.encode("utf-8", "replace"))
        return card

    def _find_images(self) -> list[tuple[ImageSource, list[Item]]]:
        """The images that rows name, in the order of their first rows, each with its tasks."""
        root = self.root if self._image_root is None else os.fspath(self._image_root)
        lookups: dict[str, ImageLookup] = {}
        found: dict[str, tuple[ImageSource, list[Item]]] = {}
        alone: list[ImageSource] = []  # pictures without words, which rows may name
        for row in self._rows or read_rows(self.files, self.unused, skip_bad=self._skip_bad):
            if row.image is not None and not row.fields:
                alone.append(row.image)
                continue
            for item in self.schema.items(row):
                if isinstance(item, Unusable):
                    self.unusable.append(item)
                    continue
                image: ImageSource | str = item.image
                if isinstance(image, str):
                    beside = root if self._image_root is not None else row.file.folder or root
                    if beside not in lookups:
                        lookups[beside] = ImageLookup(root, beside)
                    image = lookups[beside].find(image)
                if isinstance(image, str):
                    self.unusable.append(Unusable.of(item, image, str(item.image)))
                else:
                    found.setdefault(image.where, (image, []))[1].append(item)
        named = {os.path.realpath(where) for where in found} if alone else set()
        for image in alone:
            if os.path.realpath(image.where) not in named:
                self.unused.add(image.name, "no row names it")
        return list(found.values())

    def _records(
        self,
        found: Sequence[tuple[ImageSource, list[Item]]],
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[AnnotatedRecord]:
        total, done = sum(len(items) for _, items in found), 0
        seen: set[tuple[str, str]] = set()
        # Bytes are read in this thread, in order, as compressed archives and tables want it.
        images = map_ordered(self._decode, ((source, _bytes_of(source)) for source, _ in found))
        for (source, items), image in zip(found, images, strict=True):
            for item in items:
                if isinstance(image, str):
                    self.unusable.append(Unusable.of(item, "image_broken", image))
                    continue
                digest, kept = image
                reason = "repeated" if (digest, item.task) in seen else self._rule(item)
                if reason is not None:
                    self.unusable.append(Unusable.of(item, reason))
                    continue
                seen.add((digest, item.task))
                yield self._record(item, source.name, digest, kept)
            done += len(items)
            if progress is not None:
                progress(done, total)

    def _record(self, item: Item, file: str, digest: str, kept: bytes) -> AnnotatedRecord:
        source = {"file": file, "rows": item.rows, "line": str(item.line), "licence": self._licence, **item.origin}
        source |= {"id": item.id} if item.id else {}
        self.licences[source["licence"]] += 1
        image_id = digest[:16]
        number = self._images[image_id] = self._images.get(image_id, -1) + 1
        kind = item.kind or "unspecified"
        self.kinds[kind] += 1
        name = item.id if self._own_ids else f"{image_id}-{number}"
        record = AnnotatedRecord(name, image_id, kept, item.task, item.solution, item.agent, kind, source)
        if self.example is None:
            texts = {name: getattr(record, name) for name in ("task", "solution", "agent", "kind")}
            self.example = texts | {"image": source["file"]}
        return record

    def _rule(self, item: Item) -> str | None:
        """The rule that a task breaks, if those are left out; a mark of a chat is left out always."""
        pair = TaskPair(item.task, item.solution, item.agent, item.kind)
        if has_mark(pair):
            return CHAT_MARK
        if not item.solution:
            return None
        rule = check_pair(pair)
        if rule is None:
            return None
        self.broken_rules[rule] += 1
        return f"rule_{rule}" if self._strict else None

    def _decode(self, read: tuple[ImageSource, bytes | ImageError]) -> _Kept | str:
        """A picture as records keep it, or what is wrong with it, with no path of this machine."""
        source, data = read
        try:
            if isinstance(data, ImageError):
                raise data
            pixels = shrink(decode_image(data, source.where, min_side=self._min_side), self._max_side)
        except ImageError as error:
            return str(error).replace(source.where, source.name)
        return hashlib.sha256(data).hexdigest(), as_kept(data, pixels)

    def _said(self) -> str:
        """The files of the rows, for a message."""
        return self.files[0].path if len(self.files) == 1 else f"{self.root} ({len(self.files)} files)"

    def _reasons(self) -> collections.Counter[str]:
        return collections.Counter(line.reason for line in self.unusable)

    def _write_unusable(self, folder: pathlib.Path, name: str) -> None:
        order = {file.name: number for number, file in enumerate(self.files)}
        lines = sorted(
            self.unusable,
            key=lambda line: (order.get(line.rows, 0), line.line, -1 if line.number is None else line.number),
        )
        text = "".join(json.dumps(line.as_json(), ensure_ascii=False) + "\n" for line in lines)
        with disk(folder):
            write_atomically(folder / f"{name}.unusable.jsonl", text.encode("utf-8", "replace"))

    def _card(self, name: str) -> dict[str, Any]:
        kept = sum(self._images.values()) + len(self._images)  # numbers are counted from 0
        counts = {
            "rows": self.schema.rows, "tasks": kept + len(self.unusable), "images": len(self._images), "kept": kept,
            "unusable": len(self.unusable),
        }  # fmt: skip
        counts |= {f"unusable_{reason}": count for reason, count in sorted(self._reasons().items())}
        return {
            "name": name,
            "licence": self._licence,
            "rows": self.files[0].name
            if len(self.files) == 1
            else [f.name for f in self.files if not kinds.is_image(f.name)],
            "max_side": self._max_side,
            "strict": self._strict,
            "counts": counts,
            "broken_rules": dict(sorted(self.broken_rules.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "licences": dict(sorted(self.licences.items())),
            "schema": self.schema.report(),
            "example": self.example,
        }


def _bytes_of(source: ImageSource) -> bytes | ImageError:
    try:
        return source.read()
    except ImageError as error:
        return error
