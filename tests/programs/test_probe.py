"""The probe: its figures against plain counting, what it says and keeps, and its two calls on one cache."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from small import SMALL, make_inputs

from world_distill import cli
from world_distill.data.records.negative import read_negative
from world_distill.data.records.reader import EncodedRecord, RecordReader, write_records
from world_distill.errors import UserError
from world_distill.evaluation.probe_figures import Probed, figures, standing, table, words
from world_distill.interfaces import JudgeAnswer
from world_distill.judges.controls import is_control
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.programs import probe

N = 20


def probed(gains, *, noise=0.5, clip=3.0, kinds=None):
    """Two questions, two clips a task; the Demonstrator is `gains` above on each."""
    rng = np.random.default_rng(0)
    told = {q: rng.normal(size=(N, 2)) * noise for q in gains}
    shown = {q: told[q] + gain + rng.normal(size=(N, 2)) * noise for q, gain in gains.items()}
    ids = [f"r{i}" for i in range(N)]
    return Probed(ids, ids, kinds or ["go"] * N, {"demonstrator": shown, "executor": told}, clip)


def row_of(found, question, group="all"):
    return next(row for row in found["rows"] if (row["group"], row["question"]) == (group, question))


def test_figures_are_those_of_plain_counting():
    pairs = probed({"task": 1.0, "agent": 4.0}, kinds=["go", "push"] * (N // 2))
    row = row_of(figures(pairs), "agent", "push")
    shown, told = (np.clip(pairs.scores[role]["agent"][1::2], -3, 3) for role in ("demonstrator", "executor"))
    assert row["tasks"] == N // 2
    assert row["demonstrator"]["log_odds"] == pytest.approx(shown.mean())
    assert row["executor"]["rate"] == pytest.approx((told > 0).mean())
    middle, low, high = row["difference"]["log_odds"]
    assert middle == pytest.approx((shown - told).mean())
    error = (shown - told).mean(axis=1).std(ddof=1) / np.sqrt(N // 2)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.25)


def test_a_pair_without_one_answer_counts_for_neither():
    pairs = probed({"task": 1.0, "agent": 1.0})
    pairs.scores["executor"]["agent"][0, 0] = np.nan
    pairs.scores["demonstrator"]["task"][1] = np.nan
    found = figures(pairs)
    assert (found["tasks"], found["judged"], found["invalid"]) == (N, N - 1, 3)
    assert pairs.by_task("demonstrator", "task", "log_odds")[0] == np.clip(
        pairs.scores["demonstrator"]["task"][0, 1], -3, 3
    )
    assert np.isnan(pairs.advantage()[1]) and np.isfinite(np.delete(pairs.advantage(), 1)).all()


@pytest.mark.parametrize(
    "gains, whole, says",
    [
        ({"task": 2.0, "agent": 2.0}, "better", "So it is on every question."),
        ({"task": 2.0, "agent": -1.0}, "better", "On the question 'agent' it is worse"),
        ({"task": -2.0, "agent": 0.0}, "worse", "WORSE"),
        ({"task": 0.0, "agent": 0.0}, "equal", "NOT seen to be better"),
    ],
)
def test_words(gains, whole, says):
    noise = 0.5 if whole != "equal" else 0.0
    found = figures(probed(gains, noise=noise))
    assert standing(row_of(found, "average")) == whole and says in words(found)
    assert f"{row_of(found, 'task')['difference']['log_odds'][0]:+.2f} [" in table(found["rows"])


def test_kinds_on_which_it_is_not_better_are_named():
    pairs = probed({"task": 2.0}, kinds=["go"] * 10 + ["push"] * 8 + ["rare"] * 2)
    pairs.scores["demonstrator"]["task"][10:18] = pairs.scores["executor"]["task"][10:18]
    said = words(figures(pairs))
    assert "not seen to be better for tasks of the kind push (+0.00" in said and "Too few" in said and "rare." in said


def test_many_kinds_and_what_a_model_wrote_leave_the_table_readable():
    kinds = ["a|\x1b[31m"] * 3 + [f"kind {i}" for i in range(N - 3)]
    found = figures(probed({"task": 2.0}, kinds=kinds))
    said = table(found["rows"])
    assert len(said.splitlines()) == 2 + 2 * 13 and "| a??[31m |" in said
    assert "and 6 others" in words(found) and "\x1b" not in said + words(found)
    assert len(found["rows"]) == 2 * 19


def test_of_few_tasks_nothing_is_said():
    pairs = probed({"task": 2.0})
    pairs.scores["executor"]["task"][5:] = np.nan
    assert words(figures(pairs)).startswith("Too few tasks to say")
    pairs.scores["executor"]["task"][:] = np.nan
    assert words(figures(pairs)).startswith("No task")


def test_noise_is_of_the_task_and_the_clip_alone():
    numbers = probe.noise_numbers(["a", "b", "c"], 0)
    assert list(numbers[::-1]) == list(probe.noise_numbers(["c", "b", "a"], 0))
    assert len({*numbers, *probe.noise_numbers(["a", "b", "c"], 1)}) == 6 and (numbers >= 0).all()


def test_a_larger_sample_has_the_smaller_ones_tasks():
    small, large = probe.sample_of(100, 10, 3), probe.sample_of(100, 30, 3)
    assert set(small) < set(large) and large == sorted(set(large)) and len(small) == 10
    assert small != probe.sample_of(100, 10, 4)
    assert probe.sample_of(5, 0, 0) == probe.sample_of(5, 9, 0) == [0, 1, 2, 3, 4]


# ---- The verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    make_inputs(folder)
    return folder


class Judge:
    """Answers at random, the same to the same, `most` times; then it is gone. With -1 it has no answers."""

    name = "probe-test"
    most = 10**6

    def __init__(self):
        self.left = self.most

    def ask(self, requests):
        if self.most < 0:
            return [JudgeAnswer(None, "no comment") for _ in requests]
        if len(requests) > self.left:
            raise ConnectionError("the judge is gone")
        self.left -= len(requests)
        digests = (hashlib.sha256(r.clip.tobytes() + r.question.encode()).digest() for r in requests)
        return [JudgeAnswer(digest[0] / 64 - 2) for digest in digests]


def make_judge(world):
    return Judge()


def call(folder, workdir, *flags):
    settings = {**SMALL, "base": str(folder / "base.safetensors"), "evaluate_batch": 4}
    settings |= {"judge.factory": "tests.programs.test_probe:make_judge"}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    flags = ["probe", "--data", str(folder / "data"), "--workdir", str(workdir), *overrides, *flags]
    return cli.main([*flags, "--json", str(workdir / "probe.json")])


def result(workdir):
    return json.loads((workdir / "probe.json").read_text())


def test_an_interrupted_probe_goes_on_and_says_the_same(folder, tmp_path, capsys, monkeypatch):
    flags = ("--limit", "6", "--clips", "2")
    assert call(folder, tmp_path / "whole", *flags) == 0
    whole = result(tmp_path / "whole")
    assert (whole["tasks"], whole["clips"], whole["hits"], whole["misses"]) == (6, 2, 0, 6 * 2 * 2 * 3)
    monkeypatch.setattr("tests.programs.test_probe.Judge.most", 30)
    assert call(folder, tmp_path / "cut", *flags) == 2 and "the judge is gone" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(folder, tmp_path / "cut", *flags) == 0
    again = result(tmp_path / "cut")
    assert again["hits"] == 24 and again["misses"] == whole["misses"] - 24
    assert {key for key in whole if whole[key] != again[key]} == {"hits", "misses"}


def test_controls_are_made_of_the_demonstrators_clips(folder, tmp_path, capsys):
    assert call(folder, tmp_path, "--limit", "5", "--controls", "3") == 0
    found = result(tmp_path)
    rows = {(row["control"], row["question"]): row for row in found["controls"]["rows"]}
    assert found["controls"]["clips"] == 3 and found["misses"] == 5 * 2 * 3
    assert rows["instruction", "task"]["n"] == 3
    with JudgmentCache(tmp_path / "judgments.sqlite") as cache:
        entries = list(cache.entries())
    plain = [entry for entry in entries if not is_control(entry.about.question)]
    assert len(plain) == 5 * 2 * 3  # those of the comparison, and no more
    told = [entry.about.task for entry in plain if entry.about.question == "task"]
    wanted = [entry for entry in plain if entry.about.question == "task" and entry.about.task in told[:3]]
    # The Demonstrator's come first.
    assert rows["instruction", "task"]["plain_score"] == pytest.approx(np.mean([e.log_odds for e in wanted[:3]]))
    assert "instruction" in capsys.readouterr().out


def test_keep_writes_the_tasks_on_which_it_is_better(folder, tmp_path, capsys):
    assert call(folder, tmp_path, "--keep", "better") == 0
    said, found = capsys.readouterr().out, result(tmp_path)
    reader, kept = RecordReader(folder / "data", "train"), RecordReader(folder / "data", "better", EncodedRecord)
    assert found["tasks"] == len(reader)
    better = [row["id"] for row in found["by_task"] if row["difference"] > 0]
    assert [record.id for record in kept] == better and 0 < len(better) < len(reader)
    assert found["kept"] == {
        "records": len(reader), "kept": len(kept), "dropped": len(reader) - len(kept), "unjudged": 0,
    }  # fmt: skip
    assert f"dropped: {len(reader) - len(kept)}" in said
    assert kept.metadata == {**reader.metadata, "kept_of": reader.fingerprint}
    by_id = {record.id: record.to_bytes() for record in reader}
    assert all(record.to_bytes() == by_id[record.id] for record in kept)


def test_kept_records_keep_their_clips(folder, tmp_path):
    clip = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
    records = [
        dataclasses.replace(r, clip={"video": clip + i}) for i, r in enumerate(RecordReader(folder / "data", "train"))
    ]
    write_records(tmp_path, "with", records)
    reader = RecordReader(tmp_path, "with")
    ids = [record.id for record in reader]
    better = np.where(np.arange(len(ids)) == 1, 1.0, -1.0)[:, None]
    pairs = Probed(ids, ids, ids, {"demonstrator": {"task": better}, "executor": {"task": 0 * better}}, 0.0)
    probe.keep_better(pairs, reader, tmp_path, "kept")
    [kept] = RecordReader(tmp_path, "kept", clips=True)
    np.testing.assert_array_equal(kept.clip["video"], clip + 1)


def test_tasks_without_an_answer_are_kept(folder, tmp_path):
    reader = RecordReader(folder / "data", "train")
    ids = [record.id for record in reader]
    values = np.where(np.arange(len(ids)) == 0, np.nan, -1.0)[:, None]
    pairs = Probed(ids, ids, ids, {"demonstrator": {"task": values}, "executor": {"task": 0 * values}}, 0.0)
    counts = probe.keep_better(pairs, reader, tmp_path, "kept")
    assert counts["unjudged"] == 1 and [r.id for r in RecordReader(tmp_path, "kept")] == ids[:1]
    negatives = [read_negative(*at) for at in ((folder / "data", "train"), (tmp_path, "kept"))]
    assert negatives[0].fingerprint == negatives[1].fingerprint
    pairs.scores["demonstrator"]["task"][:] = 0.0  # equal is not better
    pairs.scores["executor"]["task"][:] = 0.0
    with pytest.raises(UserError, match=f"on none of {len(ids)} tasks"):
        probe.keep_better(pairs, reader, tmp_path, "kept")


def test_a_judge_without_answers_stops_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tests.programs.test_probe.Judge.most", -1)
    assert call(folder, tmp_path, "--limit", "4") == 2
    assert "4 of 4 pairs of clips have no judgment" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--keep", "b", "--limit", "3"), "looks at all tasks"),
        (("--keep", "train"), "would replace the records"),
        (("--config.model.patch=3",), "scenes are {'video': (1, 5, 5, 432)}, and this model"),
    ],
)
def test_refusals(folder, tmp_path, capsys, flags, message):
    assert call(folder, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err
