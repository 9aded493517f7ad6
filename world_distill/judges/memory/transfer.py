"""Judgments in other files than a cache: JSONL and Parquet to look at, segments to read."""

import contextlib
import glob
import gzip
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from world_distill.errors import UserError
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.entries import Entry, flat, to_line
from world_distill.judges.memory.segments import is_shared, list_segments, read_segment
from world_distill.settings.loading import ConfigDict, from_json

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


def merge(cache: JudgmentCache, other: str) -> dict[str, Any]:
    """Takes over the answers of the cache `other`; returns how many are new, known, and in conflict with what stays."""
    new = known = 0
    conflicts = []
    with open_caches(other) as source:
        for part in parts(source.entries()):
            added = cache.add(part, source=other)
            new, known, conflicts = new + added.new, known + added.known, conflicts + added.conflicts
    rows = [
        {
            "key": c.entry.key, "kept": c.kept, "other": c.entry.log_odds, "judge": c.entry.judge,
            "question": c.entry.about.question, "task": c.entry.about.task,
        }
        for c in conflicts
    ]  # fmt: skip
    return {"path": other, "new": new, "known": known, "conflicts": rows}


@contextlib.contextmanager
def open_caches(path: str, *, writes: bool = False, creates: bool = False) -> Iterator[JudgmentCache]:
    """The cache that a file, a run's folder or a shared address holds; a copy in a temporary folder of several.

    So is a file in a folder that cannot be written to, where SQLite opens none.

    Raises:
      UserError: there is none, or it should be written to and is not one file.
    """
    found = _files(path, creates)
    if len(found) == 1 and not writes and not all(os.access(x, os.W_OK) for x in (found[0], found[0].parent)):
        with tempfile.TemporaryDirectory() as folder:
            for file in found[0].parent.glob(f"{glob.escape(found[0].name)}*"):  # with its write-ahead log
                shutil.copyfile(file, pathlib.Path(folder) / file.name)
            with JudgmentCache(pathlib.Path(folder) / found[0].name) as cache:
                yield cache
        return
    if len(found) == 1:
        with JudgmentCache(found[0]) as cache:
            yield cache
        return
    if writes:
        raise UserError(f"{path} is not one cache file: merge it into one first (judgments all.sqlite --merge {path})")
    with tempfile.TemporaryDirectory() as folder, JudgmentCache(pathlib.Path(folder) / "all.sqlite") as cache:
        for file in found:
            with JudgmentCache(file) as source:
                for part in parts(source.entries()):
                    cache.add(part, source=str(file))
        if not found:
            add_segments(cache, path)
        yield cache


def _files(path: str, creates: bool) -> Sequence[pathlib.Path]:
    """The cache files at `path`; none for a shared address."""
    local = pathlib.Path(path)
    if "://" in path or (local / "segments").is_dir():
        return ()
    if local.is_dir():
        config = config_of(local)
        named = config.judge.cache if config is not None else ""
        if named and not is_shared(named):
            local = pathlib.Path(named)
        elif found := sorted(local.glob("judgments*.sqlite")):
            return found
        else:
            raise UserError(f"{path} holds no judgments.sqlite: nothing was judged there yet")
    if not local.exists() and not creates:
        raise UserError(f"{local}: no such file")
    return (local,)


def config_of(folder: pathlib.Path) -> ConfigDict | None:
    """The config of a run's folder; None where there is none."""
    path = folder / "config.json"
    return from_json(path.read_text()) if path.exists() else None
