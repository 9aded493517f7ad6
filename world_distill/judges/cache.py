"""A memory of judgments on disk, and the way from clips to a `Judgment` through it.

A judgment is looked up by what was judged: the clip's pixels, the full question (so the task and the rubric too) and
the judge's name. A resumed or replayed run makes the same clips, asks nobody, and gets the same rewards. The first
answer to be stored stays, for whoever asks: judges that sample may answer twice differently.
"""

import contextlib
import hashlib
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from world_distill.config import UserError
from world_distill.interfaces import Judge, JudgeRequest
from world_distill.judges.rubric import Rubric
from world_distill.structs import Judgment

_VERSION = 1
_BUSY_SECONDS = 60.0
_TABLE = """CREATE TABLE IF NOT EXISTS judgments (
    key TEXT PRIMARY KEY, log_odds REAL NOT NULL, judge TEXT NOT NULL, created REAL NOT NULL) WITHOUT ROWID"""


class CacheError(UserError):
    """The cache's file cannot be used. The message names it and says what to do."""


class JudgmentCache:
    """log p(yes) - log p(no) by key, in one SQLite file. Failures are never stored.

    Several processes of one machine, and threads of one process, may share a file, and being killed at any instant
    loses at most what was not yet put. The file does not belong on a network file system, where SQLite's write-ahead
    log does not work: there, every host takes its own.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens or creates the file. Raises CacheError if it cannot be written, or is not a cache of this version."""
        self.path = pathlib.Path(path).absolute()
        self.hits = self.misses = 0  # keys that `get_many` found and did not find
        self._lock = threading.RLock()
        self._connection, self._pid = None, None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{self.path}: the folder cannot be made ({error})") from error
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                db.execute("ROLLBACK")
                raise CacheError(
                    f"{self.path}: format version {version}, this program has {_VERSION}: name another file"
                )
            db.execute(_TABLE)
            db.execute(f"PRAGMA user_version = {_VERSION}")
            db.execute("COMMIT")

    @staticmethod
    def key(clip: np.ndarray, question: str, judge_name: str) -> str:
        """Hex sha256 of a clip [F H W 3] uint8, a question and a judge's name. Raises ValueError for other clips."""
        return _key(_clip_digest(clip), question, judge_name)

    def get_many(self, keys: Sequence[str]) -> dict[str, float]:
        """The stored answers among `keys`."""
        found: dict[str, float] = {}
        unique = list(dict.fromkeys(keys))
        with self._open() as db:
            for start in range(0, len(unique), 500):  # SQLite has a limit on variables
                part = unique[start : start + 500]
                marks = ",".join("?" * len(part))
                found.update(db.execute(f"SELECT key, log_odds FROM judgments WHERE key IN ({marks})", part))
        with self._lock:
            self.hits += len(found)
            self.misses += len(unique) - len(found)
        return found

    def put_many(self, log_odds: Mapping[str, float], *, judge_name: str) -> dict[str, float]:
        """Stores answers, all or none, and returns what the cache now holds for them.

        That differs from `log_odds` where another process was first. Raises ValueError for values that are not finite.
        """
        bad = {k: v for k, v in log_odds.items() if not np.isfinite(v)}
        if bad:
            raise ValueError(f"only finite log-odds are stored, not {bad}")
        rows = [(key, float(value), judge_name, time.time()) for key, value in log_odds.items()]
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                db.executemany("INSERT OR IGNORE INTO judgments VALUES (?, ?, ?, ?)", rows)
                query = "SELECT log_odds FROM judgments WHERE key = ?"
                stored = {key: db.execute(query, (key,)).fetchone()[0] for key in log_odds}
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk has rolled it back already
                    db.execute("ROLLBACK")
                raise
        return stored

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

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The connection, to this thread alone, with SQLite's errors given the path."""
        with self._lock:
            try:
                if self._connection is None or self._pid != os.getpid():  # connections do not survive a fork
                    self._connection, self._pid = _connect(self.path), os.getpid()
                yield self._connection
            except sqlite3.Error as error:
                raise CacheError(
                    f"{self.path}: {error}: check that it is a judgment cache on a local, writable disk with space left"
                ) from error


def _connect(path: pathlib.Path) -> sqlite3.Connection:
    # Transactions are begun by hand (isolation_level None). NORMAL may lose the last ones when the power fails, never
    # the file; killing a process loses none that was committed.
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            return connection
        except sqlite3.OperationalError as error:
            # Changing to WAL does not wait for other processes that are doing the same, whatever the timeout.
            if "locked" not in str(error) or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.02)


def _clip_digest(clip: np.ndarray) -> bytes:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"a clip is [F H W 3] uint8, not {clip.dtype} {clip.shape}")
    return hashlib.sha256(repr(clip.shape).encode() + b"\0" + np.ascontiguousarray(clip).tobytes()).digest()


def _key(clip_digest: bytes, question: str, judge_name: str) -> str:
    # The lengths keep ("a", "bc") and ("ab", "c") apart.
    parts = [clip_digest, question.encode(), judge_name.encode()]
    return hashlib.sha256(b"".join(len(p).to_bytes(8, "big") + p for p in parts)).hexdigest()


def judge_clips(
    judge: Judge,
    cache: JudgmentCache | None,
    clips: np.ndarray,
    tasks: Sequence[str],
    agents: Sequence[str],
    rubric: Rubric,
    questions: Sequence[str],
) -> Judgment:
    """Answers about every clip, from the cache where it has them.

    Args:
      judge: is asked once, for what is not cached, each clip's questions together; equal requests are asked as one.
      cache: None asks about everything.
      clips: [b F H W 3] uint8.
      tasks: [b] texts.
      agents: [b] names.
      rubric: has the templates.
      questions: names in `rubric`.

    Returns:
      Judgment with `scores[question]` [b] float64. An answer with an error, or that is not finite, is NaN there and
      makes the clip invalid; how many there were, and why the first, is logged.

    Raises:
      ValueError: lengths differ, no questions, clips are not uint8, or the judge returns another number of answers.
      KeyError: a question that the rubric does not have.
      CacheError: the cache's file fails.
    """
    clips = np.asarray(clips)
    if not len(clips) == len(tasks) == len(agents) or not questions:
        raise ValueError(f"{len(clips)} clips, {len(tasks)} tasks, {len(agents)} agents, {len(questions)} questions")
    requests: dict[str, JudgeRequest] = {}  # by key, clip by clip: a judge can then share the video's part of the work
    keys = np.empty((len(clips), len(questions)), object)
    for i, clip in enumerate(clips):
        digest = _clip_digest(clip)
        for j, name in enumerate(questions):
            text = rubric.render(name, tasks[i], agents[i])
            keys[i, j] = _key(digest, text, judge.name)
            requests.setdefault(keys[i, j], JudgeRequest(clip=clip, question=text))
    known = cache.get_many(list(requests)) if cache is not None else {}
    asked = [key for key in requests if key not in known]
    if asked:
        known |= _ask(judge, cache, {key: requests[key] for key in asked})
    scores = np.array([[known.get(key, np.nan) for key in row] for row in keys], np.float64)
    return Judgment(
        scores={name: scores[:, j] for j, name in enumerate(questions)}, valid=np.isfinite(scores).all(axis=1)
    )


def _ask(judge: Judge, cache: JudgmentCache | None, requests: dict[str, JudgeRequest]) -> dict[str, float]:
    """The judge's finite answers by key, stored."""
    answers = judge.ask(list(requests.values()))
    if len(answers) != len(requests):
        raise ValueError(f"judge {judge.name} returned {len(answers)} answers to {len(requests)} requests")
    good, reasons = {}, []
    for key, answer in zip(requests, answers, strict=True):
        if answer.error is None and answer.log_odds is not None and np.isfinite(answer.log_odds):
            good[key] = float(answer.log_odds)
        else:
            reasons.append(answer.error or f"log-odds {answer.log_odds}")
    if reasons:
        logging.warning("judge %s failed on %d of %d; first: %s", judge.name, len(reasons), len(requests), reasons[0])
    return cache.put_many(good, judge_name=judge.name) if cache is not None and good else good
