"""The SQLite file of a judgment cache: its tables, how it is opened, and how older formats become this one.

texts       every text once: questions, tasks, names; found by its digest
judgments   one row an answer, in the order in which they came; texts by their number
segments    files of other caches that were read, or that were written for them (`segments`)
sent        up to which row of `judgments` such files have been written, by address
"""

import os
import sqlite3
import time

VERSION = 2
BUSY_SECONDS = 60.0
MAP_BYTES = 2**31

# The numbers in `judgments` rise as transactions end, so that what is new since a number can be told. The key's index
# is the one part that is written at random places.
_TABLES = (
    "CREATE TABLE texts (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, text TEXT NOT NULL)",
    """CREATE TABLE judgments (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, log_odds REAL NOT NULL,
        created REAL NOT NULL, judge INTEGER NOT NULL, clip BLOB, question INTEGER, text INTEGER, task INTEGER,
        agent INTEGER, record INTEGER, rubric INTEGER, source INTEGER)""",
    "CREATE TABLE segments (address TEXT, name TEXT, PRIMARY KEY (address, name)) WITHOUT ROWID",
    "CREATE TABLE sent (address TEXT PRIMARY KEY, id INTEGER NOT NULL) WITHOUT ROWID",
)
# sha256 as SQL: `prepare` defines it.
_FROM_VERSION_1 = (
    "ALTER TABLE judgments RENAME TO judgments_1",
    *_TABLES,
    "INSERT INTO texts (digest, text) SELECT sha256(judge), judge FROM (SELECT DISTINCT judge FROM judgments_1)",
    """INSERT INTO judgments (key, log_odds, created, judge)
        SELECT key, log_odds, created, texts.id FROM judgments_1 JOIN texts ON text = judge ORDER BY created""",
    "DROP TABLE judgments_1",
)


def prepare(db: sqlite3.Connection, sha256) -> int | None:
    """Makes a new or older file one of this version, in one transaction. Returns the version that it has if not.

    A file of version 1 keeps its answers, since somebody paid for them, and its keys, since they are made as before;
    what was asked is not known of them.
    """
    db.create_function("sha256", 1, sha256, deterministic=True)
    db.execute("BEGIN IMMEDIATE")
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for statement in {0: _TABLES, 1: _FROM_VERSION_1}.get(version, ()):
            db.execute(statement)
        if version in (0, 1, VERSION):  # always, which shows at once whether the file can be written
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return None if version in (0, 1, VERSION) else version


def connect(path: str | os.PathLike) -> sqlite3.Connection:
    """A connection for any thread; transactions are begun by hand."""
    # NORMAL may lose the last transactions when the power fails, never the file; killing a process loses none that was
    # committed.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            # Keys are looked up all over the file: without a map, each is a call of the system once the file is large.
            connection.execute(f"PRAGMA mmap_size = {MAP_BYTES}")
            return connection
        except sqlite3.OperationalError as error:
            # Changing to WAL does not wait for other processes that are doing the same, whatever the timeout.
            if "locked" not in str(error) or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.02)
