"""From a data set's rows to AnnotatedRecords, with its pictures as `annotate` keeps them.

Writes the records, NAME.unusable.jsonl with a line for each task that makes none, and NAME.card.json with what was
understood and counted. All three depend on the data alone: importing again gives the same bytes.

A task without a solution (a benchmark's) makes a record without one, which training and whatever is told the solution
refuse.
"""

import collections
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from world_distill.data.annotation.pair_rules import CHAT_MARK, check_pair, has_mark
from world_distill.data.images.decode import as_png, clean_text, decode_image, shrink
from world_distill.data.images.lookup import ImageLookup
from world_distill.data.images.png import ImageError
from world_distill.data.images.sources import FileImage
from world_distill.data.records.reader import AnnotatedRecord, RecordError, write_atomically, write_records
from world_distill.data.records.shard_files import check_name, disk, remove_leftovers
from world_distill.data.worldtasks.fields import Item, Schema, Unusable
from world_distill.interfaces import TaskPair

_DECODED = 16  # images kept between the tasks of one


class TaskImport:
    """One import of the rows in file `rows` of the data set in folder `root`."""

    def __init__(
        self,
        root: pathlib.Path,
        rows: pathlib.Path,
        schema: Schema,
        *,
        licence: str = "unspecified",
        strict: bool = False,
        min_side: int = 16,
        max_side: int = 0,
    ):
        """`strict` leaves out tasks that break a rule of `pair_rules`; otherwise they are counted. Sides in pixels."""
        self.root, self.rows, self.schema = root, rows, schema
        self._licence, self._strict, self._min_side, self._max_side = licence, strict, min_side, max_side
        self._image = functools.lru_cache(_DECODED)(self._read)
        self.unusable: list[Unusable] = []
        self.broken_rules: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
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
                f"{self.rows}: no row can be used ({reasons or 'there are none'}); {name}.unusable.jsonl in {folder}"
                " lists them, with the keys that they have"
            )
        write_records(folder, name, _chain(first, records), shards)
        self._write_unusable(folder, name)
        card = self._card(name)
        with disk(folder):
            text = json.dumps(card, indent=1, ensure_ascii=False)
            write_atomically(folder / f"{name}.card.json", text.encode("utf-8", "replace"))
        return card

    def _find_images(self) -> list[tuple[Item, pathlib.Path]]:
        """The tasks that can be used so far, and their pictures' paths."""
        lookup = ImageLookup(self.root, self.rows)
        found = []
        for item in self.schema.read(self.rows):
            path = None if isinstance(item, Unusable) else lookup.find(item.image)
            if isinstance(item, Unusable):
                self.unusable.append(item)
            elif isinstance(path, str):
                self.unusable.append(Unusable.of(item, path, item.image))
            else:
                found.append((item, path))
        return found

    def _records(
        self, found: Sequence[tuple[Item, pathlib.Path]], progress: Callable[[int, int], None] | None
    ) -> Iterator[AnnotatedRecord]:
        seen = set()
        for number, (item, path) in enumerate(found):
            if progress is not None:
                progress(number + 1, len(found))
            image = self._image(path)
            if isinstance(image, str):
                self.unusable.append(Unusable.of(item, "image_broken", image))
                continue
            digest, png = image
            reason = "repeated" if (digest, item.task) in seen else self._rule(item)
            if reason is not None:
                self.unusable.append(Unusable.of(item, reason))
                continue
            seen.add((digest, item.task))
            yield self._record(item, path, digest, png)

    def _record(self, item: Item, path: pathlib.Path, digest: str, png: bytes) -> AnnotatedRecord:
        source = {"file": self._relative(path), "rows": self._relative(self.rows), "line": str(item.line)}
        source |= {"licence": self._licence} | ({"id": item.id} if item.id else {})
        image_id = digest[:16]
        number = self._images[image_id] = self._images.get(image_id, -1) + 1
        kind = item.kind or "unspecified"
        self.kinds[kind] += 1
        record = AnnotatedRecord(
            f"{image_id}-{number}", image_id, png, item.task, item.solution, item.agent, kind, source
        )
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

    def _read(self, path: pathlib.Path) -> tuple[str, bytes] | str:
        """(sha256 of an image file, PNG), or what is wrong with it."""
        try:
            data = FileImage(path, path.name, root=self.root).read()
            pixels = shrink(decode_image(data, self._relative(path), min_side=self._min_side), self._max_side)
        except ImageError as error:
            return str(error).replace(str(path), self._relative(path))
        return hashlib.sha256(data).hexdigest(), as_png(data, pixels)

    def _relative(self, path: pathlib.Path) -> str:
        return clean_text(path.relative_to(self.root).as_posix())

    def _reasons(self) -> collections.Counter[str]:
        return collections.Counter(line.reason for line in self.unusable)

    def _write_unusable(self, folder: pathlib.Path, name: str) -> None:
        lines = sorted(self.unusable, key=lambda line: (line.line, -1 if line.number is None else line.number))
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
            "rows": self._relative(self.rows),
            "max_side": self._max_side,
            "strict": self._strict,
            "counts": counts,
            "broken_rules": dict(sorted(self.broken_rules.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "schema": self.schema.report(),
            "example": self.example,
        }


def _chain(first: AnnotatedRecord, rest: Iterator[AnnotatedRecord]) -> Iterator[AnnotatedRecord]:
    yield first
    yield from rest
