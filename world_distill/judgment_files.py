"""Judgments in other files than a cache: JSONL and Parquet to look at, segments to read."""

import contextlib
import gzip
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

from world_distill.config import UserError
from world_distill.judges.cache import JudgmentCache
from world_distill.judges.entries import Entry, flat, to_line
from world_distill.judges.segments import list_segments, read_segment

_PART = 10_000
_NUMBERS = ("log_odds", "created")


def parts(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Lists of some thousands of entries."""
    entries = iter(entries)
    while part := list(itertools.islice(entries, _PART)):
        yield part


def add_segments(cache: JudgmentCache, address: str) -> None:
    """Takes over all that hosts have written to an address.

    Raises:
      UserError: it cannot be read, or there are no segments.
    """
    try:
        names = list_segments(address)
        for name in names:
            cache.add(read_segment(address, name) or [], source=address)
    except UserError:
        raise
    except Exception as error:  # whatever the storage's library raises
        raise UserError(f"{address} cannot be read ({type(error).__name__}: {error})") from error
    if not names:
        raise UserError(f"{address} holds no segments of judgments")


def export(entries: Iterable[Entry], path: pathlib.Path) -> int:
    """Writes entries to a .jsonl, .jsonl.gz or .parquet file, in one step, and returns how many.

    Raises:
      UserError: another ending, or pyarrow is not installed.
    """
    write = next((w for ending, w in _WRITERS.items() if path.name.endswith(ending)), None)
    if write is None:
        raise UserError(f"--export {path}: the name ends in one of {', '.join(_WRITERS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        count = write(entries, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return count


def _write_jsonl(entries: Iterable[Entry], path: pathlib.Path, opened=open) -> int:
    count = 0
    with opened(path, "wt", encoding="utf-8") as file:
        for count, entry in enumerate(entries, 1):  # noqa: B007
            file.write(to_line(entry) + "\n")
    return count


def _write_zipped(entries: Iterable[Entry], path: pathlib.Path) -> int:
    return _write_jsonl(entries, path, gzip.open)


def _write_parquet(entries: Iterable[Entry], path: pathlib.Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet needs pyarrow, which is in the extra `vlm`: pip install -e '.[vlm]'") from error
    names = list(flat(Entry("", 0.0, "", 0.0)))
    schema = pa.schema([(name, pa.float64() if name in _NUMBERS else pa.string()) for name in names])
    count = 0
    with contextlib.closing(pyarrow.parquet.ParquetWriter(str(path), schema)) as writer:
        for part in parts(entries):
            writer.write_table(pa.Table.from_pylist([flat(entry) for entry in part], schema=schema))
            count += len(part)
    return count


_WRITERS = {".jsonl": _write_jsonl, ".jsonl.gz": _write_zipped, ".parquet": _write_parquet}
