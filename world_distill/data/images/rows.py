"""Rows of JSONL, JSON and CSV files, compressed or not: what they say of pictures, one `Row` after another."""

import codecs
import collections
import contextlib
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from world_distill.data import field_names
from world_distill.data.images.compression import open_plain
from world_distill.data.images.files import File
from world_distill.data.images.kinds import rows_of
from world_distill.data.images.sources import ImageSource

_KNOWN = {name for names in field_names.ALIASES.values() for name in names}
_LONGEST_CELL = 1 << 24  # characters of a CSV cell
_LISTS = ("data", "rows", "annotations", "items", "samples", "examples", "train", "images")  # of a JSON file, of rows


@dataclasses.dataclass(frozen=True)
class Row:
    """What a file says of one picture, or of a task of it.

    Attributes:
      file: what holds it.
      number: of its line, row or member, from 1.
      fields: as they stand there.
      image: the picture, if the file holds it; otherwise a field has its path.
      bad: (one word, what is wrong) of a row that cannot be read; its other fields are empty.
    """

    file: File
    number: int
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image: ImageSource | None = None
    bad: tuple[str, str] | None = None

    @property
    def where(self) -> str:
        """In full, for messages."""
        unit = "line" if rows_of(self.file.name) in ("jsonl", "json", "csv") else "row"
        return f"{self.file.path}, {unit} {self.number}"


def text_rows(file: File) -> Iterator[Row]:
    """The rows of a JSONL, JSON or CSV file, in order.

    Raises:
      OSError, EOFError, ValueError, zlib.error, LZMAError (`compression.DAMAGE`): it cannot be read, or is cut off.
      ImageError: a package is missing that reads it.
    """
    kind = rows_of(file.name)
    with contextlib.closing(open_plain(file)) as plain:
        if kind == "csv":
            yield from _csv(file, plain)
        elif kind == "json":
            yield from _json(file, _in_utf8(plain).read())
        else:
            lines = enumerate(_in_utf8(plain), 1)
            yield from (parse_line(file, number, line) for number, line in lines if line.strip())


def path_rows(file: File) -> Iterator[Row]:
    """The rows of a text with a path a line. Raises as `text_rows`."""
    with contextlib.closing(open_plain(file)) as plain:
        for number, line in enumerate(_in_utf8(plain), 1):
            if line.strip():
                yield Row(file, number, {"path": line.decode("utf-8", "replace").strip()})


def parse_line(file: File, number: int, line: bytes) -> Row:
    """One line of JSONL."""
    try:
        row = json.loads(line, object_pairs_hook=_without_repeats)
    except _Repeated as error:
        return Row(file, number, bad=("repeated_key", f"{str(error)!r} stands there twice"))
    except (ValueError, RecursionError) as error:
        return Row(file, number, bad=("not_json", f"not JSON ({error})"))
    return _object(file, number, row)


def _object(file: File, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        return Row(file, number, bad=("not_an_object", f"a JSON {type(row).__name__}, not an object with a path"))
    return Row(file, number, row)


def _json(file: File, data: bytes) -> Iterator[Row]:
    """A list of objects, an object with one, columns, objects by the names of their images; or JSONL after all."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        lines = enumerate(data.splitlines(), 1)
        yield from (parse_line(file, number, line) for number, line in lines if line.strip())
        return
    if isinstance(value, dict):
        value = _listed(value)
    rows: Iterable[Any] = value if isinstance(value, list) else [value]
    yield from (_object(file, number, row) for number, row in enumerate(rows, 1))


def _listed(value: dict[str, Any]) -> Any:
    for name in _LISTS:
        if isinstance(value.get(name), list) and value[name] and all(isinstance(x, dict) for x in value[name]):
            return value[name]
    columns = list(value.values())
    if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        if len(columns) > 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if columns and all(isinstance(c, dict) for c in columns) and not value.keys() & _KNOWN:
        return [{"image": name, **row} for name, row in value.items()]
    return value


def _csv(file: File, plain: Any) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    text = io.TextIOWrapper(_in_utf8(plain), encoding="utf-8", errors="replace", newline="")
    first = text.readline()
    # Excel separates by semicolons where a comma stands in numbers.
    separator = max(",;\t", key=first.count)
    lines = itertools.chain([first], text)
    try:
        names = next(csv.reader(lines, delimiter=separator), [])
        for number, cells in enumerate(csv.reader(lines, delimiter=separator), 2):
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                bad = ("uneven_row", f"{len(cells)} cells under {len(names)} names")
                yield Row(file, number, bad=bad)
                continue
            yield Row(file, number, {n: cell for n, cell in zip(names, cells, strict=True) if cell.strip()})
    except csv.Error as error:
        raise ValueError(f"no CSV: {error}") from error


def _in_utf8(plain: Any) -> Any:
    """The stream without a byte order mark, and in UTF-8 if it is UTF-16, as PowerShell writes."""
    reader = plain if isinstance(plain, io.BufferedReader) else io.BufferedReader(plain)
    start = reader.peek(4)[:4]
    if start.startswith(codecs.BOM_UTF8):
        reader.read(3)
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.BytesIO(reader.read().decode("utf-16", "replace").encode())
    return reader


class _Repeated(Exception):
    """A name that a field is known by stands twice in one object; the message is the name."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(field_names.plain(key) for key, _ in pairs)
    for key, count in counts.items():
        if count > 1 and key in _KNOWN:
            raise _Repeated(key)
    return dict(pairs)
