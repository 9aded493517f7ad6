"""A judgment cache that is shared with other hosts through a bucket or a folder.

SQLite needs a local disk. So every host has a file of its own, and writes what is new in it to the shared address as
files that never change, *segments*: gzipped lines of JSON (`entries`), each named by time, host and content. Hosts
cannot overwrite each other, a segment that is not whole is told by its name, and reading one twice does no harm. When
the cache is opened and at every checkpoint, segments of others are read.
"""

import contextlib
import gzip
import hashlib
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec
import numpy as np
from absl import logging

from world_distill.judges.memory.cache import CacheError, JudgmentCache, as_entry
from world_distill.judges.memory.entries import Entry, from_line, to_line

T = TypeVar("T")
FOLDER, SUFFIX = "segments", ".jsonl.gz"
_ENTRIES = 20_000  # in a segment, at most
_UNSENT = "source IS NULL OR source != (SELECT id FROM texts WHERE text = ?)"


def is_shared(address: str) -> bool:
    """Whether an address is that of a shared cache and not of a file: a URL, or a folder that ends in a slash."""
    return "://" in address or address.endswith("/")


class SyncedCache(JudgmentCache):
    """`JudgmentCache` of one host. What cannot be sent now stays in the local file and is sent the next time."""

    def __init__(
        self,
        path: str | os.PathLike,
        address: str,
        *,
        tries: int = 4,
        wait: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
        keep: Callable[[str, np.ndarray], None] | None = None,
    ):
        """Opens the local file and reads what others have written.

        Args:
          path: the local file.
          address: gs://bucket/folder or another URL of fsspec, or a folder.
          tries: of whatever is done at the address.
          wait: seconds before the second try; doubles with each.
          sleep: waits.
          keep: see `JudgmentCache`.

        Raises:
          CacheError: see `JudgmentCache`; or the address cannot be read: judgments that were paid for would be asked
            again.
        """
        self.address = _checked(address)
        super().__init__(path, keep=keep)
        self._tries, self._wait, self._sleep = tries, wait, sleep
        try:
            self._retried(self._pull)
        except Exception as error:  # whatever the storage's library raises
            self.close()
            raise CacheError(f"config.judge.cache = {address!r} cannot be read ({_said(error)})") from error
        self.sync()

    def sync(self) -> None:
        """Sends what is new here, and reads what is new there. A failure is a warning: the next call goes on."""
        for action, what in ((self._push, "sent to"), (self._pull, "read from")):
            try:
                self._retried(action)
            except CacheError:
                raise  # the local file
            except Exception as error:
                safe = f"they are safe in {self.path}"
                logging.warning("judgments cannot be %s %s now (%s); %s", what, self.address, _said(error), safe)

    def close(self) -> None:
        """Sends what is new, if that works at once, and closes the local file."""
        if self._connection is not None and hasattr(self, "_tries"):
            try:
                self._push()
            except Exception as error:
                logging.warning("judgments were not sent to %s (%s)", self.address, _said(error))
        super().close()

    def _push(self) -> None:
        while True:
            with self._open() as db:
                mark = db.execute("SELECT id FROM sent WHERE address = ?", (self.address,)).fetchone()
            rows = self._rows(mark[0] if mark else 0, _UNSENT, (self.address,), _ENTRIES)
            if not rows:
                return
            name = write_segment(self.address, [as_entry(row) for row in rows])
            with self._writing() as db:
                db.execute("INSERT OR IGNORE INTO segments VALUES (?, ?)", (self.address, name))
                db.execute(
                    "INSERT INTO sent VALUES (?, ?) ON CONFLICT (address) DO UPDATE SET id = max(id, excluded.id)",
                    (self.address, rows[-1][0]),
                )

    def _pull(self) -> None:
        with self._open() as db:
            known = {name for (name,) in db.execute("SELECT name FROM segments WHERE address = ?", (self.address,))}
        for name in list_segments(self.address):
            if name in known:
                continue
            entries = read_segment(self.address, name)
            if entries is None:
                continue
            conflicts = self.add(entries, source=self.address, segment=name).conflicts
            if conflicts:
                logging.warning("%d judgments of %s differ from those of this host, which stay", len(conflicts), name)

    def _retried(self, action: Callable[[], T]) -> T:
        for attempt in range(self._tries - 1):
            try:
                return action()
            except CacheError:
                raise  # the local file
            except Exception as error:
                logging.warning("%s: %s; trying again", self.address, _said(error))
                self._sleep(self._wait * 2**attempt)
        return action()


def write_segment(address: str, entries: Sequence[Entry], *, host: str | None = None) -> str:
    """Writes entries to a new segment and returns its name. The same entries make the same segment."""
    data = gzip.compress("".join(to_line(e) + "\n" for e in entries).encode(), mtime=0)
    host = re.sub("[^A-Za-z0-9]+", "-", host or socket.gethostname())[:40]
    name = f"{int(entries[0].created * 1000):013d}-{host}-{hashlib.sha256(data).hexdigest()[:16]}{SUFFIX}"
    files, folder = _folder(address)
    files.makedirs(folder, exist_ok=True)
    # A bucket shows an object once it is whole, but a folder shows a file while it is being written.
    aside = f"{folder}/.{name}.{secrets.token_hex(4)}"
    try:
        files.pipe_file(aside, data)
        files.mv(aside, f"{folder}/{name}")
    except BaseException:
        with contextlib.suppress(Exception):  # the first error counts
            files.rm(aside)
        raise
    return name


def list_segments(address: str) -> list[str]:
    """Names of the segments at an address, oldest first. Raises what the storage raises."""
    files, folder = _folder(address)
    files.invalidate_cache()  # of listings, which know nothing of what other hosts do
    if not files.exists(folder):
        return []
    names = (path.rsplit("/", 1)[-1] for path in files.ls(folder, detail=False))
    return sorted(name for name in names if name.endswith(SUFFIX) and name[0] != ".")


def read_segment(address: str, name: str) -> list[Entry] | None:
    """A segment's entries; None, and a warning, if it is not what its name says. Raises what the storage raises."""
    files, folder = _folder(address)
    data: Any = files.cat_file(f"{folder}/{name}")  # bytes
    try:
        if hashlib.sha256(data).hexdigest()[:16] != name.removesuffix(SUFFIX)[-16:]:
            raise ValueError("its content is not the one that its name says")
        return read_lines(gzip.decompress(data))
    except (ValueError, EOFError, OSError, zlib.error) as error:
        logging.warning("%s/%s is left out: %s", folder, name, error)
        return None


def _folder(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    files, path = fsspec.core.url_to_fs(address)
    return files, f"{path.rstrip('/')}/{FOLDER}"


def read_lines(data: bytes) -> list[Entry]:
    """Entries from lines of JSON in UTF-8. Raises ValueError naming the line."""
    entries = []
    for number, line in enumerate(data.decode().split("\n"), 1):
        try:
            if line.strip():
                entries.append(from_line(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return entries


def _checked(address: str) -> str:
    scheme, separator, rest = address.partition("://")
    if not separator:
        return os.path.abspath(address)
    if "@" in rest.split("/")[0]:
        raise CacheError(f"config.judge.cache = {scheme}://…: credentials do not belong into a config")
    if scheme not in fsspec.available_protocols():
        raise CacheError(
            f"config.judge.cache = {address!r}: there is no storage {scheme}://; a bucket begins with gs://"
        )
    return address.rstrip("/")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
