"""A memory of judgments on disk.

A judgment is looked up by what was judged: the clip's pixels, the full question (so the task and the rubric too) and
the judge's name. A resumed or replayed run makes the same clips, asks nobody, and gets the same rewards. The first
answer to be stored stays, for whoever asks: judges that sample may answer twice differently. Beside each answer lies
what an audit needs: which clip, question, task and judge it belongs to (`entries.About`).
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from world_distill.errors import UserError
from world_distill.judges.memory import schema
from world_distill.judges.memory.entries import NOTHING, About, Entry

_PART = 500  # SQLite has a limit on variables
_INSERT = """INSERT INTO judgments
    (key, log_odds, created, judge, clip, question, text, task, agent, record, rubric, source)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"""
_TEXT_FIELDS = ("question", "text", "task", "agent", "record", "rubric")
_SELECT = (
    "SELECT judgments.id, key, log_odds, (SELECT texts.text FROM texts WHERE texts.id = judge), created, clip, "
    + ", ".join(f"(SELECT texts.text FROM texts WHERE texts.id = judgments.{name})" for name in _TEXT_FIELDS)
    + " FROM judgments"
)


class CacheError(UserError):
    """The cache's file cannot be used. The message names it and says what to do."""


class Conflict(NamedTuple):
    """A second answer to a stored question, which did not stay."""

    entry: Entry
    kept: float


class Added(NamedTuple):
    """What became of entries from elsewhere."""

    new: int
    known: int
    conflicts: list[Conflict]


class JudgmentCache:
    """log p(yes) - log p(no) by key, in one SQLite file. Failures are never stored.

    Several processes of one machine, and threads of one process, may share a file, and being killed at any instant
    loses at most what was not yet put. The file does not belong on a network file system, where SQLite's write-ahead
    log does not work: there, every host takes its own, and `segments.SyncedCache` brings them together.
    """

    def __init__(self, path: str | os.PathLike, *, keep: Callable[[str, np.ndarray], None] | None = None):
        """Opens or creates the file; one of format 1 is brought to this one, with all its answers.

        Args:
          path: the file.
          keep: is given every judged clip, and its digest in hex, and may put it where it can be judged again.

        Raises:
          CacheError: it cannot be written, or is not a cache, or one of a later version.
        """
        self.path, self.keep = pathlib.Path(path).absolute(), keep
        self.hits = self.misses = 0  # keys that `get_many` found and did not find
        self._lock = threading.RLock()
        self._connection, self._pid = None, None
        self._numbers: dict[str, int] = {}  # of texts that are surely in the file
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{self.path}: the folder cannot be made ({error})") from error
        with self._open() as db:
            other = schema.prepare(db, lambda text: _digest(text))
        if other is not None:
            raise CacheError(
                f"{self.path}: format version {other}, this program has {schema.VERSION}: name another file"
            )

    @staticmethod
    def key(clip: np.ndarray, question: str, judge_name: str) -> str:
        """Hex sha256 of a clip [F H W 3] uint8, a question and a judge's name. Raises ValueError for other clips."""
        return make_key(clip_digest(clip), question, judge_name)

    def get_many(self, keys: Sequence[str]) -> dict[str, float]:
        """The stored answers among `keys`."""
        unique = list(dict.fromkeys(keys))
        with self._open() as db:
            found = _stored(db, unique)
        with self._lock:
            self.hits += len(found)
            self.misses += len(unique) - len(found)
        return found

    def put_many(
        self, log_odds: Mapping[str, float], *, judge_name: str, about: Mapping[str, About] | None = None
    ) -> dict[str, float]:
        """Stores answers, all or none, and returns what the cache now holds for them.

        That differs from `log_odds` where another process was first. `about` says what was asked, by key. Raises
        ValueError for values that are not finite.
        """
        bad = {k: v for k, v in log_odds.items() if not np.isfinite(v)}
        if bad:
            raise ValueError(f"only finite log-odds are stored, not {bad}")
        now, about = time.time(), about or {}
        entries = [Entry(k, float(v), judge_name, now, about.get(k, NOTHING)) for k, v in log_odds.items()]
        with self._writing() as db:
            self._insert(db, entries, None)
            stored = _stored(db, list(log_odds))
        return {key: stored[key] for key in log_odds}

    def add(self, entries: Sequence[Entry], *, source: str, segment: str | None = None) -> Added:
        """Takes over entries of other caches, all or none; what is stored stays.

        Args:
          entries: in the order in which they count.
          source: where they come from: they are not sent back there.
          segment: a file at `source` that need not be read again.
        """
        first = {}
        repeated = [e for e in entries if first.setdefault(e.key, e) is not e]  # within `entries`
        with self._writing() as db:
            before = _stored(db, list(first))
            self._insert(db, list(first.values()), source)
            if segment is not None:
                db.execute("INSERT OR IGNORE INTO segments VALUES (?, ?)", (source, segment))
        kept = {k: e.log_odds for k, e in first.items()} | before
        second = [first[key] for key in before] + repeated
        conflicts = [Conflict(e, kept[e.key]) for e in second if e.log_odds != kept[e.key]]
        return Added(len(first) - len(before), len(second) - len(conflicts), conflicts)

    def entries(self, *, after: int = 0, where: str = "", values: Sequence = (), part: int = 10_000) -> Iterator[Entry]:
        """All entries in the order in which they came, read in parts: others may write meanwhile."""
        while rows := self._rows(after, where, values, part):
            after = rows[-1][0]
            yield from (as_entry(row) for row in rows)

    def rubrics(self) -> set[str]:
        """Versions of the rubrics whose questions were answered, as far as they are known."""
        with self._open() as db:
            query = "SELECT texts.text FROM texts WHERE texts.id IN (SELECT DISTINCT rubric FROM judgments)"
            return {text for (text,) in db.execute(query)}

    def sync(self) -> None:
        """Brings this cache together with others, where it has any (`segments.SyncedCache`)."""

    def __len__(self) -> int:
        with self._open() as db:
            return db.execute("SELECT count(*) FROM judgments").fetchone()[0]

    def close(self) -> None:
        """Closes the file; a later call opens it again."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def __enter__(self) -> "JudgmentCache":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _rows(self, after: int, where: str, values: Sequence, part: int) -> list[tuple]:
        condition = f" AND ({where})" if where else ""
        query = f"{_SELECT} WHERE judgments.id > ?{condition} ORDER BY judgments.id LIMIT ?"
        with self._open() as db:
            return db.execute(query, (after, *values, part)).fetchall()

    def _insert(self, db: sqlite3.Connection, entries: Sequence[Entry], source: str | None) -> None:
        rows = [(e, *(getattr(e.about, name) for name in _TEXT_FIELDS)) for e in entries]
        texts = {text for e, *about in rows for text in (e.judge, *about) if text is not None}
        number = _numbers(db, texts | ({source} if source else set()), self._numbers)
        number[None] = None
        db.executemany(
            _INSERT,
            (
                (e.key, e.log_odds, e.created, number[e.judge], e.about.clip and bytes.fromhex(e.about.clip))
                + (*(number[text] for text in about), number[source or None])
                for e, *about in rows
            ),
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that other writers wait for, undone by an error."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                self._numbers.clear()  # of texts whose rows are undone
                if db.in_transaction:  # a full disk has rolled it back already
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The connection, to this thread alone, with SQLite's errors given the path."""
        with self._lock:
            try:
                if self._connection is None or self._pid != os.getpid():  # connections do not survive a fork
                    self._connection, self._pid = schema.connect(self.path), os.getpid()
                    self._numbers.clear()
                yield self._connection
            except sqlite3.Error as error:
                raise CacheError(
                    f"{self.path}: {error}: check that it is a judgment cache on a local, writable disk with space left"
                ) from error


def clip_digest(clip: np.ndarray) -> bytes:
    """sha256 of a clip [F H W 3] uint8: its shape and its pixels. Raises ValueError for other clips."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"a clip is [F H W 3] uint8, not {clip.dtype} {clip.shape}")
    digest = hashlib.sha256(repr(clip.shape).encode() + b"\0")
    digest.update(np.ascontiguousarray(clip).data)
    return digest.digest()


def clip_digests(clips: np.ndarray) -> list[bytes]:
    """`clip_digest` of each of clips [b F H W 3], on all cores."""
    # A large clip takes a twentieth of a second, during which Python's lock is free.
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as threads:
        return list(threads.map(clip_digest, clips))


def make_key(clip_digest: bytes, question: str, judge_name: str) -> str:
    """`JudgmentCache.key` of a clip whose digest is known."""
    # The lengths keep ("a", "bc") and ("ab", "c") apart.
    parts = [clip_digest, question.encode(), judge_name.encode()]
    return hashlib.sha256(b"".join(len(p).to_bytes(8, "big") + p for p in parts)).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _stored(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for start in range(0, len(keys), _PART):
        part = keys[start : start + _PART]
        marks = ",".join("?" * len(part))
        found.update(db.execute(f"SELECT key, log_odds FROM judgments WHERE key IN ({marks})", part))
    return found


def _numbers(db: sqlite3.Connection, texts: set[str], known: dict[str, int]) -> dict[str | None, int | None]:
    """The texts' numbers in the file, where they are put if need be; `known` remembers them."""
    if len(known) > 100_000:
        known.clear()
    new = {_digest(text): text for text in texts if text not in known}
    db.executemany("INSERT OR IGNORE INTO texts (digest, text) VALUES (?, ?)", new.items())
    digests = list(new)
    for start in range(0, len(digests), _PART):
        part = digests[start : start + _PART]
        marks = ",".join("?" * len(part))
        for number, digest in db.execute(f"SELECT id, digest FROM texts WHERE digest IN ({marks})", part):
            known[new[digest]] = number
    return {text: known[text] for text in texts}


def as_entry(row: tuple) -> Entry:
    _, key, log_odds, judge, created, clip, *texts = row
    return Entry(key, log_odds, judge, created, About(clip and clip.hex(), *texts))
