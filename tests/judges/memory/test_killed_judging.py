"""Judging that is killed at any instant, and by several processes at once: no answer is lost, none is there twice.

`WORLD_DISTILL_KILLS=30 pytest tests/judges/memory/test_killed_judging.py -n 0` kills more often.
"""

import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.effort import KILLS
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.entries import flat

ROOT = pathlib.Path(__file__).resolve().parents[3]
CLIPS, BATCH = 160, 4

# Notes each question when it is asked, and when its answer is stored, in a file that outlives the process.
PROGRAM = """
import os, random, sys, time
import numpy as np
from world_distill.interfaces import JudgeAnswer
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.ask import judge_clips
from world_distill.judges.rubric import Rubric

path, log, seconds, seed = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT), *sys.argv[3:]
clips, batch = CLIPS, BATCH
rubric = Rubric({"task": "Is {task} done?", "agent": "Was it {agent}?", "real": "Is it real?"})

class Slow:
    name = "slow"
    def ask(self, requests):
        keys = [JudgmentCache.key(r.clip, r.question, self.name) for r in requests]
        os.write(log, "".join(f"asked {key}\\n" for key in keys).encode())
        time.sleep(float(seconds))
        return [JudgeAnswer(float(r.clip.mean()) - 100 + len(r.question)) for r in requests]

class Noting(JudgmentCache):
    def put_many(self, answers, **kwargs):
        stored = super().put_many(answers, **kwargs)
        os.write(log, "".join(f"stored {key}\\n" for key in stored).encode())
        return stored

starts = list(range(0, clips, batch))
random.Random(int(seed)).shuffle(starts)  # several at once do not walk in step
with Noting(path) as cache:
    for start in starts:
        made = np.stack([np.random.default_rng(i).integers(0, 256, (3, 8, 8, 3), np.uint8)
                         for i in range(start, start + batch)])
        tasks = [f"[disc]: Do {i}." for i in range(start, start + batch)]
        names = [f"r{i}" for i in range(start, start + batch)]
        judgment = judge_clips(Slow(), cache, made, tasks, ["disc"] * batch, rubric, rubric.names, records=names)
        assert judgment.valid.all()
""".replace("CLIPS", str(CLIPS)).replace("BATCH", str(BATCH))


def start(path, log, seconds, seed=0):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), str(log), str(seconds), str(seed)], cwd=ROOT)


def content(path):
    with JudgmentCache(path) as cache:
        with cache._open() as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = sorted((flat(e) | {"created": 0} for e in cache.entries()), key=lambda row: row["key"])
    assert len({row["key"] for row in rows}) == len(rows)
    return rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder / "c", folder / "log", 0).wait() == 0
    rows = content(folder / "c")
    assert len(rows) == 3 * CLIPS
    return rows


def test_killed_at_any_instant_it_ends_like_an_uninterrupted_run(tmp_path, uninterrupted):
    rng, killed, tries = random.Random(0), 0, 0
    while killed < KILLS:
        tries += 1
        path, log = tmp_path / f"{tries}", tmp_path / f"log {tries}"
        while killed < KILLS:
            process = start(path, log, 0.02)
            while not (log.exists() or process.poll() is not None):
                time.sleep(0.005)  # importing takes longer than judging, and is not what is tested
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                break
            killed += 1
        assert start(path, log, 0).wait() == 0
        assert content(path) == uninterrupted
        stored = set()
        for word, key in map(str.split, log.read_text().splitlines()):
            assert word == "stored" or key not in stored, "asked again, though its answer was stored"
            stored |= {key} if word == "stored" else set()


def test_processes_share_the_work_of_one_cache(tmp_path, uninterrupted):
    workers = [start(tmp_path / "c", tmp_path / "log", 0.001, seed) for seed in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert content(tmp_path / "c") == uninterrupted
