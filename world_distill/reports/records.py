"""`world-distill inspect`: the records of a set as a table on the terminal, and as a page with pictures.

Texts come from a VLM, so nothing in them is trusted: control characters never reach the terminal, and a page holds
them escaped.
"""

import collections
import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from world_distill import console
from world_distill.data.images.png import ImageError, decode_png
from world_distill.data.records.reader import AnnotatedRecord, RecordReader
from world_distill.data.records.record_format import Record
from world_distill.reports import page

_THUMB = 320  # pixels of the longer side of a picture on the page
_MOST_KINDS = 12  # kinds that are listed by name


def survey(reader: RecordReader, wanted: re.Pattern) -> tuple[list[int], dict[str, Any]]:
    """Rows whose task matches, and the figures of the whole set, without reading its pictures and arrays.

    Returns:
      The rows, and a dict of records, images, matching, bytes, left_out, and the numbers by kind and agent, most first.
    """
    heads = reader.heads()
    matching = [row for row, task in enumerate(heads.task) if wanted.search(task)]
    kinds = collections.Counter(heads.kind)
    agents = collections.Counter(agent.casefold() for agent in heads.agent)
    return matching, {
        "name": reader.index_path.stem, "type": reader.record_type.__name__, "records": len(reader),
        "images": len(set(heads.image_id)), "matching": len(matching), "bytes": reader.bytes,
        "left_out": reader.left_out, "kinds": dict(kinds.most_common()), "agents": dict(agents.most_common()),
    }  # fmt: skip


def choose(rows: Sequence[int], limit: int, seed: int | None) -> list[int]:
    """At most `limit` of the rows, all if it is 0: the first ones, or with a seed a sample, in order."""
    if not limit or limit >= len(rows):
        return list(rows)
    if seed is None:
        return list(rows[:limit])
    chosen = np.random.default_rng(seed).choice(len(rows), limit, replace=False)
    return [rows[i] for i in sorted(chosen)]


def describe(counts: dict[str, Any]) -> list[str]:
    """The figures of `survey` as lines for a terminal."""
    kinds = [f"{printable(kind) or '(none)'} {n}" for kind, n in counts["kinds"].items()]
    more = [f"and {len(kinds) - _MOST_KINDS} more"] if len(kinds) > _MOST_KINDS else []
    size, each = console.disk(counts["bytes"]), console.disk(counts["bytes"] / counts["records"])
    left_out = f"; {counts['left_out']} left out ({counts['name']}.left_out.jsonl)" if counts["left_out"] else ""
    return [
        f"{counts['name']}: {counts['records']} {counts['type']}s about {counts['images']} images,"
        f" {len(counts['agents'])} agents; {counts['matching']} match",
        f"on the disk: {size}, {each} a record{left_out}",
        f"kinds: {', '.join([*kinds[:_MOST_KINDS], *more])}",
    ]


def table(records: Any, width: int) -> list[str]:
    """A line a record, cut to `width` columns: id, kind, task, solution."""
    widths = [20, 12, max(20, (width - 38) * 2 // 5)]
    widths.append(max(20, width - sum(widths) - 6))
    rows = [("id", "kind", "task", "solution"), *((r.id, r.kind, r.task, r.solution) for r in records)]
    return ["  ".join(_cell(text, w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def printable(text: str) -> str:
    """One line without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def _cell(text: str, width: int) -> str:
    """A text in `width` columns of a terminal, where Chinese characters take two and accents none of their own."""
    text = printable(text)
    columns = [_columns(character) for character in text]
    if sum(columns) > width:
        ends = itertools.accumulate(columns)
        text = text[: sum(end < width for end in ends)] + "…"
        columns = [_columns(character) for character in text]
    return text + " " * (width - sum(columns))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as the page holds it."""

    uri: str
    width: int
    height: int
    alt: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A record's texts."""

    text: str
    about: str
    solution: str


@dataclasses.dataclass(frozen=True)
class Card:
    """An image with its tasks; `trouble` says why there is no picture."""

    picture: Picture | None
    trouble: str
    tasks: Sequence[Task]
    source: str


def html_page(title: str, counts: dict[str, Any], records: Sequence[Record]) -> str:
    """A page with a card for each image: its picture, and its tasks with their solutions."""
    images: dict[str, list[Record]] = {}
    for record in records:
        images.setdefault(record.image_id, []).append(record)
    cards = [_card(image) for image in images.values()]
    shown = f"{len(records)} of {counts['matching']} matching records"
    return str(page.render("records.html", title=title, lines=describe(counts), shown=shown, cards=cards))


def _card(records: Sequence[Record]) -> Card:
    first = records[0]
    picture, trouble = _picture(first)
    origin = first.source if isinstance(first, AnnotatedRecord) else {}
    source = "; ".join([first.image_id, *(f"{key}: {value}" for key, value in origin.items())])
    return Card(picture, trouble, [Task(r.task, _about(r), r.solution) for r in records], source)


def _about(record: Record) -> str:
    parts = [record.kind]
    if not isinstance(record, AnnotatedRecord):
        parts += [f"scene {name} {'x'.join(map(str, array.shape))}" for name, array in record.scene.items()]
        for name, states in record.task_states.items():
            parts.append(f"{name}: {len(states)} and {len(record.solution_states[name])} tokens")
    return ", ".join(filter(None, parts))


def _picture(record: Record) -> tuple[Picture | None, str]:
    """A record's picture, or what to say in its place."""
    if not record.image_png:
        return None, "no picture"
    try:
        image = Image.fromarray(decode_png(record.image_png))
    except ImageError:
        return None, "the picture is damaged"
    image.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
    uri = page.data_uri(image, "webp", quality=80, method=4)
    return Picture(uri, image.width, image.height, f"image {record.image_id}"), ""
