"""The verb `judgments`: figures by hand, files, merging, and another judge's opinion."""

import gzip
import json
import sys

import numpy as np
import pytest

from world_distill.cli.command import main
from world_distill.errors import UserError
from world_distill.interfaces import JudgeAnswer
from world_distill.judges.ask import judge_clips
from world_distill.judges.memory import transfer
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.entries import from_line
from world_distill.judges.memory.kept_clips import KeptClips
from world_distill.judges.memory.segments import SyncedCache
from world_distill.judges.rubric import Rubric, load_rubric
from world_distill.programs import rejudge
from world_distill.settings.loading import load_config, to_json

RUBRIC = Rubric({"task": "Is {task} done?", "agent": "Was it {agent}?", "consistency": "Is it real?"})
LEVELS = (60, 90, 120, 150, 180)
TASKS = [f"[disc]: Go to <{level}>." for level in LEVELS]


class Judge:
    """Likes clips brighter than `above`."""

    def __init__(self, name="bright", above=100, sign=1):
        self.name, self.above, self.sign, self.asked = name, above, sign, 0

    def ask(self, requests):
        self.asked += len(requests)
        return [JudgeAnswer(self.sign * (float(r.clip.mean()) - self.above) / 10) for r in requests]


def strict_judge():
    return Judge("strict", above=130)


def clips():
    return np.stack([np.full((2, 4, 4, 3), level, np.uint8) for level in LEVELS])


def judged(path, judge=None, questions=("task", "agent"), keep=None):
    with JudgmentCache(path, keep=keep) as cache:
        judge_clips(
            judge or Judge(), cache, clips(), TASKS, ["disc"] * 5, RUBRIC, list(questions),
            records=[f"r{i}" for i in range(5)],
        )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A run's folder with judgments, all their clips, a log and a config."""
    run = tmp_path / "run"
    judged(run / "judgments.sqlite", keep=KeptClips(run / "judged_clips"))
    lines = [{"step": i, "judge/hits": 2 * i, "judge/misses": 4} for i in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "judge": {"factory": "tests.programs.test_judgments:strict_judge", "options": {}, "rubric": "", "cache": ""},
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    return run


def called(*argv):
    assert main(["judgments", *map(str, argv)]) == 0


def figures(tmp_path, *argv):
    called(*argv, "--json", tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text())


def test_counts_spread_and_hit_rate(folder, tmp_path, capsys):
    found = figures(tmp_path, folder)
    assert found["judgments"] == 10 and found["hit_rate"] == {"hits": 6, "misses": 12, "rate": 1 / 3}
    assert [row["question"] for row in found["by_question"]] == ["agent", "task"]
    values = np.array([-4, -1, 2, 5, 8.0])
    for row in found["by_question"]:
        assert (row["judge"], row["count"], row["yes"], row["undecided"]) == ("bright", 5, 0.6, 0.0)
        assert row["mean"] == values.mean() and row["quartiles"] == [-1, 2, 5]
        assert row["std"] == pytest.approx(values.std())
    assert found["disagreements"] == []
    text = capsys.readouterr().out
    assert "10 judgments" in text and "6 of the run's 18 questions" in text


def test_judges_that_answered_the_same_are_compared(folder, tmp_path, capsys):
    judged(folder / "judgments.sqlite", strict_judge(), ["task"])
    [row] = figures(tmp_path, folder)["disagreements"]
    assert row["question"] == "task" and row["one"].startswith("bright") and row["other"].startswith("strict")
    assert (row["count"], row["same_sign"], row["yes"]) == (5, 0.8, [0.6, 0.4])
    assert row["correlation"] == pytest.approx(1) and row["mean_difference"] == pytest.approx(-3)
    assert [(f["task"], f["record"], f["one"], f["other"]) for f in row["flips"]] == [(TASKS[2], "r2", 2, -1)]
    assert TASKS[2] in capsys.readouterr().out


def test_the_run_of_somebody_else_is_counted_from_a_copy(folder, tmp_path, monkeypatch):
    known = figures(tmp_path, folder)["judgments"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(transfer.os, "access", lambda path, mode: False)  # whatever the user of the tests may do
    opened = []
    real = transfer.JudgmentCache
    monkeypatch.setattr(transfer, "JudgmentCache", lambda path: opened.append(path) or real(path))
    assert figures(tmp_path, folder)["judgments"] == known == 10
    assert [path.name for path in opened] == ["judgments.sqlite"] and opened[0].parent != folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_new_cache_and_one_of_format_1_have_figures(tmp_path):
    with JudgmentCache(tmp_path / "c") as cache:
        assert figures(tmp_path, tmp_path / "c")["judgments"] == 0
        cache.put_many({"k": 1.0}, judge_name="old")  # nothing noted
    assert figures(tmp_path, tmp_path / "c")["by_question"][0]["question"] == "(not noted)"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_export_holds_everything(folder, tmp_path, ending):
    path = tmp_path / f"new/all{ending}"
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    assert figures(tmp_path, folder, "--export", path)["exported"] == 10
    if ending == ".parquet":
        rows = [json.dumps(row) for row in parquet.read_table(path).to_pylist()]
    else:
        rows = (gzip.open if ending.endswith("gz") else open)(path, "rt").read().splitlines()
    with JudgmentCache(folder / "judgments.sqlite") as cache:
        assert [from_line(row) for row in rows] == list(cache.entries())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_export_says_what_it_needs(folder, tmp_path, capsys, monkeypatch):
    assert main(["judgments", str(folder), "--export", "all.csv"]) == 2
    assert "ends in one of .jsonl" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["judgments", str(folder), "--export", str(tmp_path / "a.parquet")]) == 2
    assert "pip install -e '.[vlm]'" in capsys.readouterr().err and not (tmp_path / "a.parquet").exists()


def test_merge_keeps_first_answers_and_lists_conflicts(folder, tmp_path, capsys):
    judged(tmp_path / "b.sqlite", Judge(sign=-1))  # the same name and keys, other answers
    judged(tmp_path / "c.sqlite", strict_judge(), ["task"])
    with SyncedCache(tmp_path / "d.sqlite", str(tmp_path / "shared")) as cache:
        cache.put_many({"only here": 2.0}, judge_name="x")
    found = figures(
        tmp_path, tmp_path / "all.sqlite", "--merge", folder, tmp_path / "b.sqlite", tmp_path / "c.sqlite",
        tmp_path / "shared",
    )  # fmt: skip
    assert [(m["new"], m["known"], len(m["conflicts"])) for m in found["merged"]] == [
        (10, 0, 0), (0, 0, 10), (5, 0, 0), (1, 0, 0),
    ]  # fmt: skip
    assert found["judgments"] == 16
    conflict = found["merged"][1]["conflicts"][0]
    assert (conflict["kept"], conflict["other"], conflict["task"]) == (-4, 4, TASKS[0])
    assert "kept -4.000, other +4.000" in capsys.readouterr().out
    with JudgmentCache(folder / "judgments.sqlite") as one, JudgmentCache(tmp_path / "all.sqlite") as merged:
        assert list(one.entries()) == list(merged.entries())[:10]


def test_several_hosts_files_of_one_folder_are_seen_together(tmp_path, capsys):
    judged(tmp_path / "run/judgments-0.sqlite")
    judged(tmp_path / "run/judgments-1.sqlite", strict_judge(), ["task"])
    assert figures(tmp_path, tmp_path / "run")["judgments"] == 15
    assert main(["judgments", str(tmp_path / "run"), "--merge", "x"]) == 2
    assert "merge it into one first" in capsys.readouterr().err


def test_another_judge_is_asked_once_and_compared(folder, tmp_path, capsys):
    found = figures(tmp_path, folder, "--rejudge")["rejudged"]
    assert (found["judge"], found["clips"], found["invalid"]) == ("strict", 5, 0)
    for row in found["by_question"]:
        assert (row["judge"], row["count"], row["same_sign"]) == ("bright", 5, 0.8)
        assert [flip["task"] for flip in row["flips"]] == [TASKS[2]]
    assert [row["question"] for row in found["by_question"]] == ["agent", "task"]  # only what was asked then
    assert TASKS[2] in capsys.readouterr().out
    with JudgmentCache(folder / "judgments.sqlite") as cache:
        assert len(cache) == 20
        judge = strict_judge()
        again = rejudge.rejudge(cache, KeptClips(folder / "judged_clips"), judge, load_rubric())
        assert judge.asked == 0 and again["by_question"] == [
            row | {"flips": again["by_question"][i]["flips"]} for i, row in enumerate(found["by_question"])
        ]


def test_other_wordings_are_compared_with_the_first_ones(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/task.txt").write_text("Other words for {task}?")
    found = figures(
        tmp_path, folder, "--rejudge", f"--config.judge.rubric={tmp_path / 'mine'}",
        "--config.judge.factory=tests.programs.test_judgments:Judge",
    )  # fmt: skip
    [row] = found["rejudged"]["by_question"]
    assert (row["question"], row["judge"], row["same_sign"]) == ("task", "bright", 1)


def test_rejudging_says_what_is_missing(folder, tmp_path, capsys):
    def fails(*argv):
        assert main(["judgments", *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "keep_clips=0.05" in fails(folder, "--rejudge", "--clips", tmp_path)
    judged(tmp_path / "alone.sqlite")
    assert "--config says which judge" in fails(tmp_path / "alone.sqlite", "--rejudge", "--clips", tmp_path)
    assert "is for --rejudge" in fails(folder, "--config.judge.rubric=x")
    assert "no such file" in fails(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "nothing was judged there yet" in fails(tmp_path / "empty")
    [first, *_] = KeptClips(folder / "judged_clips").digests()
    path = folder / "judged_clips" / first[:2] / f"{first}.png"
    other = folder / "judged_clips" / "00" / f"{'0' * 64}.png"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="not the clip that its name says"):
        KeptClips(folder / "judged_clips").load("0" * 64)
    path.write_bytes(path.read_bytes()[:50])
    assert "damaged" in fails(folder, "--rejudge")


def test_the_calls_that_come_next_fit_the_run(folder, tmp_path, capsys):
    config = load_config("wan22_5b:debug", {"judge.factory": "world_distill.judges:Brightness"})
    (folder / "config.json").write_text(to_json(config))
    assert main(["judgments", str(folder)]) == 0
    said = capsys.readouterr().out
    # A judge without a model is replaced by one that has one, and its options are known then.
    flags = ["--config.judge.factory=world_distill.judges:ServerJudge", "--config.judge.options.model=OTHER"]
    assert f"--rejudge {' '.join(flags)}\n" in said and "--controls" in said
    closed = "--config.judge.options.servers=http://127.0.0.1:9/v1", "--config.judge.options.give_up_after=0.1"
    assert main(["judgments", str(folder), "--rejudge", *flags, *closed]) == 2
    assert "unknown config key" not in capsys.readouterr().err
    judged(tmp_path / "alone.sqlite")
    assert main(["judgments", str(tmp_path / "alone.sqlite")]) == 0
    assert "next:" not in capsys.readouterr().out  # no clips are kept beside it


def test_a_share_of_the_clips_is_kept_by_their_digests(tmp_path):
    keep = KeptClips(tmp_path, share=0.3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        keep(rng.bytes(32).hex(), np.zeros((1, 2, 2, 3), np.uint8))
    assert 40 <= len(keep.digests()) <= 80 and all(int(d[:2], 16) <= 0.3 * 256 for d in keep.digests())


def test_an_interrupted_export_leaves_the_old_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("old")

    def breaking():
        yield from_line('{"key": "k", "log_odds": 1, "judge": "j", "created": 0}')
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        transfer.export(breaking(), tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
