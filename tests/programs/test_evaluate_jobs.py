"""Evaluations in processes of their own: killed and called again, and two that are one job.

`WORLD_DISTILL_KILLS=60 pytest tests/programs/test_evaluate_jobs.py` kills oftener.
"""

import json
import random
import re
import shutil
import signal
import sqlite3
import time

import jobs
import numpy as np
import pytest
from small import HASH, SMALL, VARIANTS, make_inputs, small_config

from tests.effort import KILLS
from tests.programs.test_worldtasks import asked
from tests.vlm.fake_server import FakeServer
from world_distill import cli
from world_distill.programs import train
from world_distill.storage.video_files import load_strip

pytestmark = pytest.mark.once

CASES, BATCH = 8, 4
ROLES = ("base", "demonstrator", "executor")
SIZES = VARIANTS["distill"] | {
    "steps": 1, "save_every": 1, "scenes.test": CASES, "evaluate_batch": BATCH, "host_devices": 4, "model.depth": 1,
}  # fmt: skip
BENCH = "--config.benchmark.factory=world_distill.evaluation:WorldTasksBench"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    train.train(small_config(inputs, **SIZES), folder)
    return folder


def judged_by(server):
    """Flags of a benchmark that this server answers."""
    return [BENCH, f"--config.benchmark.options.servers={server.url}", "--config.benchmark.options.model=judge"]


def stored(folder):
    """Answers in the benchmark's memory of a run, which another process may be writing."""
    path = folder / "benchmark.sqlite"
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as db:
            return db.execute("SELECT count(*) FROM judgments").fetchone()[0]
    except sqlite3.OperationalError:  # it is being made
        return 0


def kill_at(count, folder, server, flags, rest=0.0):
    """Kills a verb `rest` seconds after the benchmark's memory of a run holds so many answers."""
    [job] = jobs.start_verb(*flags)
    jobs.wait_for(lambda: stored(folder) >= count, [job])
    time.sleep(rest)
    job.send_signal(signal.SIGKILL)
    [code], said = jobs.finish([job])
    jobs.wait_for(lambda: not server.in_flight, [])  # what it does not know to be gone, it still answers
    return code, said


def clips_of(folder):
    """The clips that an evaluation kept, by role and task."""
    listed = json.loads((folder / "evaluation_clips/clips.json").read_text())
    found = {}
    for role in ROLES:
        paths = {path.stem: path for path in (folder / "evaluation_clips" / role).iterdir()}
        assert paths.keys() == {entry["id"] for entry in listed}
        found |= {(role, name): load_strip(path) for name, path in sorted(paths.items())}
    return found


def test_an_evaluation_that_is_killed_goes_on_and_asks_nothing_again(trained, tmp_path):
    need, rng = CASES * 3 * len(ROLES), random.Random(0)
    whole = tmp_path / "whole"
    shutil.copytree(trained, whole)
    with FakeServer() as server:
        assert cli.main(["evaluate", "--workdir", str(whole), *judged_by(server)]) == 0
        assert len(asked(server)) == need == stored(whole)
    wanted = max(KILLS // 6, 1)
    for number in range(wanted):
        killed = tmp_path / f"killed {number}"
        shutil.copytree(trained, killed)
        with FakeServer(latency=0.1) as server:
            flags = ["evaluate", "--workdir", str(killed), *judged_by(server)]
            # The first is killed while the third of six batches is judged, later ones anywhere.
            count, rest = (2 * 3 * BATCH, 0.1) if not number else (rng.randint(0, need - 1), rng.uniform(0, 1))
            code, said = kill_at(count, killed, server, [*flags, "--export-clips", tmp_path / f"clips {number}"], rest)
            assert code == -signal.SIGKILL or (number and not code), said
            before, known = len(asked(server)), stored(killed)
            assert count <= known <= need and (number or known < need)
            assert number or not (killed / "evaluation.json").exists()
            server.latency = 0
            assert cli.main([*flags, "--export-clips", str(tmp_path / f"clips {number}")]) == 0
            questions = asked(server)
            assert len(questions) - before == need - known == len(set(questions[before:]))
            lost = len(questions) - len(set(questions))
            assert lost == before - known <= 3 * BATCH  # of the batch that was being judged, at most
        for name in ("evaluation.json", "evaluation.md"):
            assert (killed / name).read_bytes() == (whole / name).read_bytes()
        assert not (killed / ".evaluation_clips.new").exists()
        for key, clip in clips_of(whole).items():
            np.testing.assert_array_equal(clips_of(killed)[key], clip)
        for role in ROLES:
            root = tmp_path / f"clips {number}" / role
            files = {entry["file"] for entry in json.loads((root / "manifest.json").read_text())}
            assert files == {path.relative_to(root).as_posix() for path in root.rglob("*.mp4")} and len(files) == CASES


ROWS = ("base", "off_policy", "wmsd")


def test_a_reproduction_that_is_killed_goes_on_to_the_same_table(inputs, tmp_path):
    flags = ["reproduce", "--config", "sandbox", "--seeds", "0", "--rows", ",".join(ROWS)]
    tiny = {k: v for k, v in SMALL.items() if not k.startswith("objective.")} | {
        "steps": 2, "save_every": 1, "judge.factory": HASH, "objective.rl_weight": 1, "objective.updates": 1,
        "base": inputs / "base.safetensors", "evaluate_batch": 2, "model.depth": 1,
    }  # fmt: skip
    flags += [f"--config.{key}={value}" for key, value in tiny.items()]
    whole, killed, need = tmp_path / "whole", tmp_path / "killed", 3 * 4 * len(ROWS)
    with FakeServer() as server:
        assert cli.main([*flags, "--workdir", str(whole), *judged_by(server)]) == 0
        assert len(set(asked(server))) == len(asked(server)) == need
    with FakeServer(latency=0.1) as server:
        call, known = [*flags, "--workdir", str(killed), *judged_by(server)], 0
        rng, wanted = random.Random(0), max(KILLS // 6, 1)
        for number in range(wanted):
            row = ROWS[1] if not number else rng.choice(ROWS[1:])
            code, said = kill_at(rng.randint(1, 6), killed / "runs" / row / "0", server, call)
            assert code in (0, -signal.SIGKILL), said
            assert not number or code == -signal.SIGKILL
            assert code == 0 or not (killed / "reproduce.json").exists()
        finished = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*/*/evaluation.json")}
        before = len(asked(server))
        known = sum(stored(path) for path in killed.glob("runs/*/*"))
        assert known or wanted > 1
        server.latency = 0
        assert cli.main(call) == 0
        assert len(asked(server)) - before == need - known
        assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    one, other = (json.loads((folder / "reproduce.json").read_text()) for folder in (whole, killed))
    for result in (one, other):
        del result["commands"]  # which name the folder
    assert one == other and [row["name"] for row in one["rows"]] == list(ROWS)


# Says which clips each process writes, and how many questions its judge is asked.
COUNTING = """
import hash_judge
from world_distill.evaluation.dreamgen import ClipFolder
from world_distill.reports.kept_clips import KeptClips
for owner, name in ((KeptClips, "keep"), (ClipFolder, "write")):
    def noting(self, role, record, *rest, plain=getattr(owner, name), name=name):
        print(name, role, record, flush=True)
        return plain(self, role, record, *rest)
    setattr(owner, name, noting)
ask = hash_judge.PatternJudge.ask
hash_judge.PatternJudge.ask = lambda self, requests: [print("asked", len(requests), flush=True), ask(self, requests)][1]
"""


def test_two_processes_evaluate_as_one_and_keep_each_clip_once(trained, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    flags = [BENCH, "--config.benchmark.options.judge=hash_judge:PatternJudge", "--noises", "2", "--limit", "7"]
    found = []
    for count, folder in ((1, alone), (2, together)):
        shutil.copytree(trained, folder)
        call = ["evaluate", "--workdir", str(folder), *flags, "--export-clips", str(tmp_path / f"clips {count}")]
        if count == 1:
            assert cli.main(call) == 0
        else:
            codes, said = jobs.finish(jobs.start_verb(*call, count=2, before=COUNTING))
            assert codes == [0, 0], said
        found.append(json.loads((folder / "evaluation.json").read_text()))
    # Each clip of the first noise is written by one process, and each is judged by one.
    for word in ("keep", "write"):
        written = [re.findall(rf"^{word} (\S+ \S+)$", text, re.MULTILINE) for text in said]
        assert not written[1] and len(written[0]) == len(set(written[0])) == 7 * len(ROLES)
    asks = [sum(map(int, re.findall(r"^asked (\d+)$", text, re.MULTILINE))) for text in said]
    assert asks == [24 * len(ROLES), 18 * len(ROLES)]  # of the last batch, which lacks one, the second has one clip
    assert "scored base, demonstrator, executor" in said[0] and "scored" not in said[1]
    ones, twos = clips_of(alone), clips_of(together)
    assert ones.keys() == twos.keys() and len(ones) == 7 * len(ROLES)
    for key, clip in ones.items():  # processes may round a pixel in another way
        assert np.abs(clip.astype(int) - twos[key]).max() <= 1, key
    assert len({clip.tobytes() for clip in twos.values()}) > len(twos) // 2  # not one clip for all
    one, two = found
    assert one["verdicts"].keys() == two["verdicts"].keys() == set(ROLES)
    for role in ROLES:
        for a, b in zip(one["verdicts"][role], two["verdicts"][role], strict=True):
            assert {k: a[k] for k in a if k not in ("scores", "details")} == {
                k: b[k] for k in b if k not in ("scores", "details")
            }
            assert a["details"] == pytest.approx(b["details"], abs=0.05)
        manifests = [
            [entry | {"scores": 0} for entry in json.loads((tmp_path / f"clips {n}/{role}/manifest.json").read_text())]
            for n in (1, 2)
        ]
        assert manifests[0] == manifests[1] and len(manifests[0]) == 7
        assert all((tmp_path / f"clips 2/{role}" / entry["file"]).is_file() for entry in manifests[1])
