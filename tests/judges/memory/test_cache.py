"""The memory of judgments: exact, shared, never holding a failure."""

import hashlib
import math
import pathlib
import signal
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest

from world_distill.judges.memory import schema
from world_distill.judges.memory.cache import CacheError, JudgmentCache, clip_digests
from world_distill.judges.memory.entries import About, Entry

ROOT = pathlib.Path(__file__).resolve().parents[3]


def clip(seed=0, frames=2):
    return np.random.default_rng(seed).integers(0, 256, (frames, 4, 6, 3), np.uint8)


def test_key_depends_on_everything_that_was_judged():
    base = clip()
    keys = [
        JudgmentCache.key(base, "ab", "c"),
        JudgmentCache.key(base, "a", "bc"),
        JudgmentCache.key(base, "ab", "d"),
        JudgmentCache.key(base, "xy", "c"),
        JudgmentCache.key(base.reshape(2, 6, 4, 3), "ab", "c"),
        JudgmentCache.key(base[:1], "ab", "c"),
        JudgmentCache.key(np.where(np.arange(base.size).reshape(base.shape) == 77, base ^ 1, base), "ab", "c"),
    ]
    assert len(set(keys)) == len(keys)
    stored_otherwise = np.asfortranarray(base)
    assert JudgmentCache.key(stored_otherwise, "ab", "c") == keys[0] == JudgmentCache.key(base.copy(), "ab", "c")


@pytest.mark.parametrize("bad", [clip().astype(np.float32), clip()[0], clip()[..., :2]])
def test_key_of_something_else(bad):
    with pytest.raises(ValueError, match=r"a clip is \[F H W 3\] uint8"):
        JudgmentCache.key(bad, "q", "j")


def test_values_come_back_exactly_and_are_counted(tmp_path):
    values = {f"k{i}": math.sin(i) * 10.0 ** (i % 40 - 20) for i in range(1500)}
    with JudgmentCache(tmp_path / "sub/cache.sqlite") as cache:
        assert cache.put_many(values, judge_name="j") == values
        assert cache.get_many(["k3", "none", "k3", "k4"]) == {"k3": values["k3"], "k4": values["k4"]}
        assert (cache.hits, cache.misses) == (2, 1)
    again = JudgmentCache(tmp_path / "sub/cache.sqlite")
    assert again.get_many(list(values)) == values and len(again) == 1500
    assert again.get_many([]) == {} and again.put_many({}, judge_name="j") == {}


def test_first_answer_stays(tmp_path):
    cache, other = JudgmentCache(tmp_path / "c"), JudgmentCache(tmp_path / "c")
    cache.put_many({"a": 1.0}, judge_name="j")
    assert other.put_many({"a": 2.0, "b": 3.0}, judge_name="j") == {"a": 1.0, "b": 3.0}
    assert cache.get_many(["a", "b"]) == {"a": 1.0, "b": 3.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_failures_are_not_stored(tmp_path, bad):
    cache = JudgmentCache(tmp_path / "c")
    with pytest.raises(ValueError, match="only finite"):
        cache.put_many({"good": 1.0, "bad": bad}, judge_name="j")
    assert len(cache) == 0


def test_a_put_is_all_or_nothing(tmp_path):
    cache = JudgmentCache(tmp_path / "c")
    cache.put_many({"old": 1.0}, judge_name="j")
    with cache._open() as db:
        db.execute("PRAGMA max_page_count = 20")  # the disk is full
    with pytest.raises(CacheError, match=f"{tmp_path / 'c'}: database or disk is full"):
        cache.put_many({f"k{i}": 1.0 for i in range(5000)}, judge_name="j" * 50)
    assert len(cache) == 1
    with cache._open() as db:
        db.execute("PRAGMA max_page_count = 1000000")
    assert len(cache.put_many({f"k{i}": 1.0 for i in range(5000)}, judge_name="j")) == 5000


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "text").write_text("this is no data base, but long enough to be read as one" * 100)
    with pytest.raises(CacheError, match=f"{tmp_path / 'text'}: file is not a database"):
        JudgmentCache(tmp_path / "text")
    with pytest.raises(CacheError, match="text/c: the folder cannot be made"):
        JudgmentCache(tmp_path / "text/c")
    with pytest.raises(CacheError, match="unable to open database file"):
        JudgmentCache(tmp_path)
    with sqlite3.connect(tmp_path / "new") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(CacheError, match="new: format version 9, this program has 2"):
        JudgmentCache(tmp_path / "new")


def test_read_only_file_is_named(tmp_path, monkeypatch):
    JudgmentCache(tmp_path / "c").close()
    real = sqlite3.connect
    # Root may write to read-only files, so SQLite is told instead.
    monkeypatch.setattr(
        schema.sqlite3, "connect", lambda path, **keywords: real(f"file:{path}?mode=ro", uri=True, **keywords)
    )
    with pytest.raises(CacheError, match=f"{tmp_path / 'c'}: attempt to write a readonly database"):
        JudgmentCache(tmp_path / "c")


def test_threads_share_one_cache(tmp_path):
    cache, wrong = JudgmentCache(tmp_path / "c"), []

    def work(n):
        for i in range(30):
            stored = cache.put_many({f"{i}": float(n), f"{n}-{i}": float(i)}, judge_name="j")
            if cache.get_many([f"{i}", f"{n}-{i}"]) != stored or stored[f"{n}-{i}"] != i:
                wrong.append((n, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(cache) == 30 * 7


WRITER = """
import sys
from world_distill.judges.memory.cache import JudgmentCache
n = int(sys.argv[2])
cache = JudgmentCache(sys.argv[1])
i = 0
while i < int(sys.argv[3]):
    stored = cache.put_many({f"shared-{i}": float(n), f"{n}-{i}": float(i), f"{n}-{i}-twin": float(i)}, judge_name="j")
    print(i, int(stored[f"shared-{i}"]), flush=True)
    i += 1
"""


def writer(path, n, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(n), str(count)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_processes_share_one_file_and_may_be_killed(tmp_path):
    path, count = tmp_path / "c", 150
    steady = [writer(path, n, count) for n in (0, 1)]
    killed = writer(path, 2, 10**9)  # the file is made by whoever comes first
    reported = [killed.stdout.readline() for _ in range(40)]
    killed.send_signal(signal.SIGKILL)
    reported += killed.stdout.read().splitlines()
    killed.wait()
    answers = []
    for process in steady:
        output = process.communicate()[0].splitlines()
        assert process.returncode == 0 and len(output) == count
        answers.append([int(line.split()[1]) for line in output])
    cache = JudgmentCache(path)
    with cache._open() as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        of_killed = {row[0] for row in db.execute("SELECT key FROM judgments WHERE key LIKE '2-%'")}
    # Whatever it reported as stored is there, and each put is there whole or not at all.
    finished = {line.split()[0] for line in reported if len(line.split()) == 2}
    assert len(finished) >= 40 and {f"2-{i}" for i in finished} <= of_killed
    assert {k for k in of_killed if not k.endswith("-twin")} == {k.removesuffix("-twin") for k in of_killed}
    # All were told the same answer to the same question.
    shared = cache.get_many([f"shared-{i}" for i in range(count)])
    assert answers[0] == answers[1] == [int(shared[f"shared-{i}"]) for i in range(count)]


FORK = """
import os, sys
from world_distill.judges.memory.cache import JudgmentCache
cache = JudgmentCache(sys.argv[1])
cache.put_many({"a": 1.0}, judge_name="j")
parents = cache._connection
child = os.fork()
if child == 0:
    ok = cache.get_many(["a"]) == {"a": 1.0} and cache.put_many({"b": 2.0}, judge_name="j") == {"b": 2.0}
    ok = ok and cache._connection is not parents  # SQLite forbids carrying a connection over
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert cache.get_many(["a", "b"]) == {"a": 1.0, "b": 2.0}
"""


def test_cache_works_after_a_fork(tmp_path):
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path / "c")], cwd=ROOT, check=True)


# ---- What an audit needs


def about(i, text="Is it done?"):
    return About(f"{i:064x}", "task", text, f"[a]: Do {i}.", "a", f"r{i}", "v1")


def test_what_was_asked_comes_back_and_texts_are_stored_once(tmp_path):
    cache = JudgmentCache(tmp_path / "c")
    long = "Is it done? é🎬" * 2000
    for part in range(10):
        keys = {f"k{i}": float(i) for i in range(100 * part, 100 * part + 100)}
        cache.put_many(keys, judge_name="j", about={k: about(int(v), long) for k, v in keys.items()})
    cache.put_many({"bare": 0.5}, judge_name="other")
    found = list(cache.entries(part=64))
    assert [e.key for e in found] == [f"k{i}" for i in range(1000)] + ["bare"]
    assert found[77].about == about(77, long) and found[77].judge == "j" and found[77].log_odds == 77
    assert found[-1].about == About() and found[-1].judge == "other"
    assert found[0].created <= found[-1].created
    cache.close()
    assert (tmp_path / "c").stat().st_size < 1e6
    assert [e.key for e in cache.entries(where="judge = (SELECT id FROM texts WHERE text = ?)", values=["other"])] == [
        "bare"
    ]


def test_a_text_of_an_undone_put_is_not_remembered(tmp_path):
    cache = JudgmentCache(tmp_path / "c")
    with pytest.raises(CacheError):
        cache.put_many({"k": 1.0, None: 2.0}, judge_name="a judge")  # the second row is refused by SQLite
    cache.put_many({"k": 1.0}, judge_name="a judge")
    assert [e.judge for e in cache.entries()] == ["a judge"]


def test_entries_from_elsewhere_do_not_replace_what_is_there(tmp_path):
    cache = JudgmentCache(tmp_path / "c")
    cache.put_many({"a": 1.0, "b": 2.0}, judge_name="j")
    others = [Entry(k, v, "j", 5.0, about(3)) for k, v in [("a", 1.0), ("b", -2.0), ("c", 3.0), ("c", 4.0), ("d", 5.0)]]
    added = cache.add(others, source="there")
    assert (added.new, added.known) == (2, 1)
    assert [(c.entry.key, c.entry.log_odds, c.kept) for c in added.conflicts] == [("b", -2.0, 2.0), ("c", 4.0, 3.0)]
    assert cache.get_many(list("abcd")) == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 5.0}
    assert [e for e in cache.entries() if e.key == "c"] == [others[2]]


FORMAT_1 = """CREATE TABLE judgments (
    key TEXT PRIMARY KEY, log_odds REAL NOT NULL, judge TEXT NOT NULL, created REAL NOT NULL) WITHOUT ROWID"""


def test_a_file_of_format_1_keeps_its_answers(tmp_path):
    rows = [(f"k{i}", math.sin(i), f"judge {i % 3}", 1000.0 - i) for i in range(500)]
    with sqlite3.connect(tmp_path / "old") as db:
        db.execute(FORMAT_1)
        db.executemany("INSERT INTO judgments VALUES (?, ?, ?, ?)", rows)
        db.execute("PRAGMA user_version = 1")
    db.close()
    caches = [JudgmentCache(tmp_path / "old") for _ in range(2)]  # the second finds it done
    for cache in caches:
        assert cache.get_many([row[0] for row in rows]) == {row[0]: row[1] for row in rows}
        assert [(e.key, e.log_odds, e.judge, e.created) for e in cache.entries()] == rows[::-1]
    caches[0].put_many({"new": 1.0}, judge_name="judge 1", about={"new": about(1)})
    assert len(caches[1]) == 501


def test_bringing_an_old_file_up_is_all_or_nothing(tmp_path, monkeypatch):
    with sqlite3.connect(tmp_path / "old") as db:
        db.execute(FORMAT_1)
        db.execute("INSERT INTO judgments VALUES ('k', 1.0, 'j', 2.0)")
        db.execute("PRAGMA user_version = 1")
    db.close()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_FROM_VERSION_1", (*schema._FROM_VERSION_1[:-1], "an error"))
        with pytest.raises(CacheError, match="syntax error"):
            JudgmentCache(tmp_path / "old")
    assert JudgmentCache(tmp_path / "old").get_many(["k"]) == {"k": 1.0}


def test_digests_are_those_of_shape_and_pixels_however_a_clip_lies_in_memory():
    clips = np.random.default_rng(3).integers(0, 256, (5, 2, 4, 6, 3), np.uint8)
    expected = [hashlib.sha256(b"(2, 4, 6, 3)\0" + clip.tobytes()).digest() for clip in clips]
    assert clip_digests(clips) == expected
    turned = np.moveaxis(np.ascontiguousarray(np.moveaxis(clips, 1, 3)), 3, 1)
    assert not turned[0].flags.c_contiguous and clip_digests(turned) == expected
    assert clip_digests(clips[:0]) == []
