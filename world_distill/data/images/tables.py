"""Rows of Parquet and Arrow files, as hubs and `datasets.save_to_disk` have them; their pictures are read when needed.

A picture is a cell `{bytes, path}`, a list of one such, or a cell of bytes. Listing the rows reads every other column
only; a picture's bytes come later, from a few rows at a time (Parquet) or from the mapped file (Arrow).
"""

import collections
import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from world_distill.data import field_names
from world_distill.data.images.compression import needs_pyarrow
from world_distill.data.images.decode import MAX_BYTES, clean_text
from world_distill.data.images.files import File
from world_distill.data.images.kinds import base_name, rows_of
from world_distill.data.images.png import ImageError
from world_distill.data.images.rows import Row
from world_distill.data.images.sources import EmbeddedImage

_BATCH = 64  # rows of pictures that are read at once
_BATCHES = 3  # of them that are kept, for threads that are not quite in order


def table_rows(file: File) -> Iterator[Row]:
    """The rows of a Parquet or Arrow file, in order.

    Raises:
      ImageError: pyarrow is missing, or the file is damaged.
    """
    pyarrow = needs_pyarrow(file.path)
    try:
        table = _Parquet(file) if rows_of(file.name) == "parquet" else _Arrow(file)
        for number, fields in enumerate(table.fields()):
            fields = {key: value for key, value in fields.items() if value is not None}
            yield Row(file, number + 1, fields, image=table.image(number, fields))
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise ImageError(f"{file.path}: damaged or cut off ({' '.join(str(error).split())[:200]})") from error


def has_pictures(file: File) -> bool:
    """Whether a Parquet file holds the bytes of pictures. Raises ImageError as `table_rows`."""
    pyarrow = needs_pyarrow(file.path)
    try:
        return _Parquet(file).column is not None
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise ImageError(f"{file.path}: damaged or cut off ({' '.join(str(error).split())[:200]})") from error


class _Table:
    """What both formats share.

    Attributes:
      column: that holds the pictures; None if there is none.
    """

    file: File
    column: str | None

    def image(self, number: int, fields: dict[str, Any]) -> EmbeddedImage | None:
        """The picture of row `number` (from 0), whose cell leaves `fields`; None if the row has but a path."""
        if self.column is None:
            return None
        cell, path = fields.get(self.column), None
        while isinstance(cell, list) and cell:
            cell = cell[0]
        if isinstance(cell, dict):
            path = cell.get("path")
        if not self.holds_bytes(number):
            return None
        fields.pop(self.column, None)
        name = base_name_as_it_is(path) if isinstance(path, str) and path else f"row {number + 1}"
        where = f"{self.file.path}, row {number + 1}"
        return EmbeddedImage(
            clean_text(f"{self.file.name}/{name}"), where, functools.partial(self._read, number, where)
        )

    def _read(self, number: int, where: str) -> bytes:
        pyarrow = needs_pyarrow(self.file.path)
        try:
            data = self.cell(number)
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            raise ImageError(f"{where}: cannot be read ({' '.join(str(error).split())[:200]})") from error
        if not isinstance(data, bytes):
            raise ImageError(f"{where}: the cell {self.column!r} holds no bytes")
        if len(data) > MAX_BYTES:
            raise ImageError(f"{where}: more than {MAX_BYTES >> 20} MiB, which is too large for a picture")
        return data

    def fields(self) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def holds_bytes(self, number: int) -> bool:
        raise NotImplementedError

    def cell(self, number: int) -> Any:
        raise NotImplementedError


class _Parquet(_Table):
    def __init__(self, file: File):
        self.file = file
        with self._opened() as parquet:
            self._counts = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            self.column = _picture_column(parquet.schema_arrow)
            leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema))]
            self._leaf = _leaf_of(self.column, leaves)
            binary = [f.name for f in parquet.schema_arrow if _is_picture(f.type)]
            path = [leaf for leaf in leaves if leaf.split(".")[0] == self.column and leaf.endswith(".path")]
            self._others = [leaf for leaf in leaves if leaf.split(".")[0] not in binary] + path
            self._empty = [self._is_empty(parquet, g, leaves) for g in range(parquet.num_row_groups)]
        self._batches: collections.OrderedDict[int, list[Any]] = collections.OrderedDict()  # by their first row
        self._stream: Any = None
        self._next = 0  # row that the stream gives next
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow.parquet

        with self.file.open() as opened, pyarrow.parquet.ParquetFile(opened) as parquet:
            yield parquet

    def _is_empty(self, parquet: Any, group: int, leaves: list[str]) -> bool:
        """Whether no cell of a row group has bytes: the rows have paths only."""
        if self._leaf is None:
            return True
        column = parquet.metadata.row_group(group).column(leaves.index(self._leaf))
        if column.total_uncompressed_size > 100 * self._counts[group]:
            return False  # more than a null or a repeated cell takes
        statistics = column.statistics
        return statistics is not None and bool(statistics.has_null_count) and statistics.num_values == 0

    def fields(self) -> Iterator[dict[str, Any]]:
        with self._opened() as parquet:
            if not self._others:
                yield from ({} for _ in range(sum(self._counts)))
                return
            for batch in parquet.iter_batches(batch_size=1024, columns=self._others):
                yield from batch.to_pylist()

    def holds_bytes(self, number: int) -> bool:
        for group, count in enumerate(self._counts):
            if number < count:
                return not self._empty[group]
            number -= count
        return False

    def cell(self, number: int) -> Any:
        _RECENT.append(self)
        if len(_RECENT) > 2 and (old := _RECENT.popleft()) not in _RECENT:
            old.forget()
        with self._lock:
            first = number - number % _BATCH
            if first not in self._batches:
                if self._stream is None or first < self._next:
                    self._close()
                    self._stream, self._next = self._pictures(), 0
                while self._next <= first:
                    at, batch = next(self._stream, (0, None))
                    if batch is None:  # it has ended too early, or at damage before
                        raise EOFError("its pictures end before this row")
                    self._next = at + _BATCH
                    self._batches[at] = batch
                    while len(self._batches) > _BATCHES:
                        self._batches.popitem(last=False)
            value = self._batches[first][number - first]
            if number + 1 == sum(self._counts):
                self._close()
            return value

    def forget(self) -> None:
        """Frees the pictures that are kept; a data set has many files, and is read one after another."""
        with self._lock:
            self._batches.clear()
            self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _pictures(self) -> Iterator[tuple[int, list[Any]]]:
        """(first row, cells) of `_BATCH` rows after another."""
        with self._opened() as parquet:
            waiting: list[Any] = []
            at = 0
            for batch in parquet.iter_batches(batch_size=_BATCH, columns=[self._leaf]):
                waiting += [_bytes_of(cell) for cell in batch.column(0).to_pylist()]
                while len(waiting) >= _BATCH:
                    yield at, waiting[:_BATCH]
                    waiting, at = waiting[_BATCH:], at + _BATCH
            if waiting:
                yield at, waiting


_RECENT: collections.deque[_Parquet] = collections.deque()  # files read last, to free what others keep


class _Arrow(_Table):
    def __init__(self, file: File):
        pyarrow = needs_pyarrow(file.path)
        self.file = file
        if file.is_local:
            source = pyarrow.memory_map(file.path)
        else:
            with file.open() as opened:
                source = pyarrow.BufferReader(opened.read())
        is_file = source.read(6) == b"ARROW1"  # the file format; `datasets` writes the stream format
        source.seek(0)
        self._table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).read_all()
        self._table.validate(full=True)  # places in the file are trusted from here on, and wrong ones end the program
        self.column = _picture_column(self._table.schema)

    def fields(self) -> Iterator[dict[str, Any]]:
        pyarrow = needs_pyarrow(self.file.path)
        table = self._table
        for field in self._table.schema:
            if _is_picture(field.type):
                at = table.schema.get_field_index(field.name)
                cells = table.column(at)
                paths = None
                if field.name == self.column and _is_struct(field.type) and field.type.get_field_index("path") >= 0:
                    parts = [chunk.field("path") for chunk in cells.chunks]
                    paths = pyarrow.chunked_array(parts, field.type.field("path").type)
                table = table.remove_column(at) if paths is None else table.set_column(at, field.name, paths)
        for batch in table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                path = row.get(self.column) if self.column is not None else None
                yield row | {self.column: {"path": path}} if isinstance(path, str) else row

    def holds_bytes(self, number: int) -> bool:
        cell = self._table.column(self.column)[number]
        while _is_list(cell.type) and cell.is_valid and len(cell):
            cell = cell[0]
        return bool(cell.is_valid and (not _is_struct(cell.type) or cell["bytes"].is_valid))

    def cell(self, number: int) -> Any:
        return _bytes_of(self._table.column(self.column)[number].as_py())


def _picture_column(schema: Any) -> str | None:
    """The column of pictures; of several, the one whose name says so, then the first `{bytes, path}`."""
    found = [field.name for field in schema if _is_picture(field.type)]
    names = field_names.ALIASES["image"]

    def place(name: str) -> tuple[int, bool]:
        plain = field_names.plain(name)
        known = names.index(plain) if plain in names else len(names)
        return known, _is_binary(schema.field(name).type)

    return min(found, key=place, default=None)


def _leaf_of(column: str | None, leaves: list[str]) -> str | None:
    """The Parquet column with the bytes of a column of pictures."""
    mine = [leaf for leaf in leaves if leaf.split(".")[0] == column]
    return next((leaf for leaf in mine if leaf == column or leaf.endswith(".bytes")), mine[0] if mine else None)


def _is_picture(kind: Any) -> bool:
    if _is_list(kind):
        return _is_struct(kind.value_type) and _is_picture(kind.value_type)
    return _is_binary(kind) or (
        _is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    )


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_struct(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def _bytes_of(cell: Any) -> Any:
    while isinstance(cell, list) and cell:
        cell = cell[0]
    return cell.get("bytes") if isinstance(cell, dict) else cell


def base_name_as_it_is(path: str) -> str:
    """The last part of a path, for a name; `base_name` would have it in lower case."""
    return path[len(path) - len(base_name(path)) :]
