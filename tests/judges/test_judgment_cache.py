"""The memory of judgments: exact, shared, never holding a failure; and the judging that goes through it."""

import math
import pathlib
import signal
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest

from world_distill.interfaces import JudgeAnswer
from world_distill.judges import cache as cache_module
from world_distill.judges.cache import CacheError, JudgmentCache, judge_clips
from world_distill.judges.rubric import Rubric

ROOT = pathlib.Path(__file__).resolve().parents[2]


def clip(seed=0, frames=2):
    return np.random.default_rng(seed).integers(0, 256, (frames, 4, 6, 3), np.uint8)


def test_key_depends_on_everything_that_was_judged():
    base = clip()
    keys = [
        JudgmentCache.key(base, "ab", "c"),
        JudgmentCache.key(base, "a", "bc"),
        JudgmentCache.key(base, "ab", "d"),
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
        db.execute("PRAGMA max_page_count = 8")  # the disk is full
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
    with pytest.raises(CacheError, match="new: format version 9, this program has 1"):
        JudgmentCache(tmp_path / "new")


def test_read_only_file_is_named(tmp_path, monkeypatch):
    JudgmentCache(tmp_path / "c").close()
    real = sqlite3.connect
    # Root may write to read-only files, so SQLite is told instead.
    monkeypatch.setattr(
        cache_module.sqlite3, "connect", lambda path, **keywords: real(f"file:{path}?mode=ro", uri=True, **keywords)
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
from world_distill.judges.cache import JudgmentCache
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
from world_distill.judges.cache import JudgmentCache
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


# ---- Judging


RUBRIC = Rubric({"task": "Is {task} done?", "agent": "Did {agent} do it?", "real": "Is it real?"})


class FakeJudge:
    """Answers the mean of the clip plus the length of the question, or as it is told."""

    name = "fake-1"

    def __init__(self, answer=None):
        self.requests, self.calls, self.answer = [], 0, answer

    def ask(self, requests):
        self.calls += 1
        self.requests += requests
        return [self.answer(r) if self.answer else JudgeAnswer(self.value(r.clip, r.question)) for r in requests]

    @staticmethod
    def value(clip, question):
        return float(clip.mean()) + len(question)


def batch(n):
    return np.stack([clip(i) for i in range(n)]), [f"t{i}" * (i + 1) for i in range(n)], [f"a{i}" for i in range(n)]


def test_scores_and_order_of_requests(tmp_path):
    judge, (clips, tasks, agents) = FakeJudge(), batch(3)
    judgment = judge_clips(judge, JudgmentCache(tmp_path / "c"), clips, tasks, agents, RUBRIC, ["task", "real"])
    assert judgment.scores.keys() == {"task", "real"} and judgment.valid.tolist() == [True] * 3
    for name in ("task", "real"):
        expected = [FakeJudge.value(c, RUBRIC.render(name, t, a)) for c, t, a in zip(clips, tasks, agents, strict=True)]
        assert judgment.scores[name].dtype == np.float64
        np.testing.assert_array_equal(judgment.scores[name], expected)
    assert [r.question for r in judge.requests] == [RUBRIC.render(q, t, "") for t in tasks for q in ("task", "real")]
    for i, request in enumerate(judge.requests):
        np.testing.assert_array_equal(request.clip, clips[i // 2])


def test_only_what_is_new_is_asked(tmp_path):
    judge, cache, (clips, tasks, agents) = FakeJudge(), JudgmentCache(tmp_path / "c"), batch(4)
    first = judge_clips(judge, cache, clips[:3], tasks[:3], agents[:3], RUBRIC, ["task", "agent"])
    asked = len(judge.requests)
    judge_clips(judge, cache, clips[:3], tasks[:3], agents[:3], RUBRIC, ["task", "agent"])
    assert (asked, len(judge.requests), judge.calls) == (6, 6, 1)
    again = judge_clips(judge, cache, clips, tasks, agents, RUBRIC, ["agent", "task", "real"])
    assert len(judge.requests) == 6 + 4 + 2
    np.testing.assert_array_equal(again.scores["task"][:3], first.scores["task"])
    other = FakeJudge()
    other.name = "fake-2"
    judge_clips(other, cache, clips[:1], tasks[:1], agents[:1], RUBRIC, ["task"])
    assert len(other.requests) == 1


@pytest.mark.parametrize("cached", [True, False])
def test_equal_requests_are_asked_once(tmp_path, cached):
    judge, (clips, _, _) = FakeJudge(), batch(2)
    clips = clips[[0, 1, 0, 0]]
    cache = JudgmentCache(tmp_path / "c") if cached else None
    judgment = judge_clips(judge, cache, clips, ["x"] * 4, list("abca"), RUBRIC, ["real", "agent"])
    assert len(judge.requests) == 2 + 3
    assert judgment.scores["real"][0] == judgment.scores["real"][2] == judgment.scores["real"][3]
    assert judgment.valid.all()


FAILURES = [
    JudgeAnswer(None, "timed out"),
    JudgeAnswer(None),
    JudgeAnswer(math.nan),
    JudgeAnswer(math.inf),
    JudgeAnswer(2.0, "but unsure"),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_invalid_logged_and_asked_again(tmp_path, monkeypatch, failure):
    logged = []
    monkeypatch.setattr(cache_module.logging, "warning", lambda message, *args: logged.append(message % args))
    cache, (clips, tasks, agents) = JudgmentCache(tmp_path / "c"), batch(3)
    judge = FakeJudge(lambda r: failure if "t1t1" in r.question else JudgeAnswer(0.5))
    judgment = judge_clips(judge, cache, clips, tasks, agents, RUBRIC, ["task", "real"])
    assert judgment.valid.tolist() == [True, False, True]
    np.testing.assert_array_equal(judgment.scores["task"], [0.5, np.nan, 0.5])
    np.testing.assert_array_equal(judgment.scores["real"], [0.5] * 3)
    assert len(logged) == 1 and "failed on 1 of 6; first: " in logged[0]
    assert (failure.error or "log-odds") in logged[0]
    assert len(cache) == 5
    better = FakeJudge()
    assert judge_clips(better, cache, clips, tasks, agents, RUBRIC, ["task", "real"]).valid.all()
    assert len(better.requests) == 1 and len(logged) == 1


def test_another_process_was_first(tmp_path):
    cache, (clips, tasks, agents) = JudgmentCache(tmp_path / "c"), batch(1)

    class Slow(FakeJudge):
        def ask(self, requests):
            meanwhile = {cache.key(r.clip, r.question, self.name): -7.0 for r in requests}
            JudgmentCache(cache.path).put_many(meanwhile, judge_name=self.name)
            return super().ask(requests)

    judgment = judge_clips(Slow(), cache, clips, tasks, agents, RUBRIC, ["task"])
    assert judgment.scores["task"].tolist() == [-7.0]  # what every later reader will see


def test_misuse_is_an_error(tmp_path):
    clips, tasks, agents = batch(2)

    def run(judge=None, clips=clips, tasks=tasks, questions=("task",)):
        return judge_clips(judge or FakeJudge(), None, clips, tasks, agents, RUBRIC, questions)

    class Short(FakeJudge):
        def ask(self, requests):
            return super().ask(requests)[1:]

    with pytest.raises(ValueError, match="fake-1 returned 1 answers to 2 requests"):
        run(Short())
    with pytest.raises(ValueError, match="2 clips, 1 tasks"):
        run(tasks=tasks[:1])
    with pytest.raises(ValueError, match="0 questions"):
        run(questions=())
    with pytest.raises(ValueError, match="uint8"):
        run(clips=clips / 255)
    with pytest.raises(KeyError, match="no question 'style'"):
        run(questions=["style"])
