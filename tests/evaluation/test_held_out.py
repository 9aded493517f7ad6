"""A judge that has no part in the reward, beside the one that has."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from small import random_weights, small_config

from world_distill import build
from world_distill.cli.command import main
from world_distill.core.metrics import rank_correlation
from world_distill.errors import UserError
from world_distill.evaluation import held_out
from world_distill.interfaces import JudgeAnswer
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.kept_clips import KeptClips
from world_distill.judges.rubric import Rubric
from world_distill.programs import prepare, train
from world_distill.reports import report
from world_distill.storage.weight_files import save_weights
from world_distill.training import run_folder

RUBRIC = Rubric({"task": "Is {task} done?", "real": "Is it real?"})


class Judge:
    """Answers `scale` times the clip's mean, and nothing about clips that are black."""

    def __init__(self, name, scale):
        self.name, self.scale = name, scale

    def ask(self, requests):
        return [
            JudgeAnswer(self.scale * (r.clip.mean() - 100)) if r.clip.any() else JudgeAnswer(None, "dark")
            for r in requests
        ]


def clips(*levels):
    return np.stack([np.full((2, 4, 4, 3), level, np.uint8) for level in levels])


def watched(audit, *levels):
    names = [f"r{level}" for level in levels]
    audit.watch(clips(*levels), np.arange(len(names)), {"ids": names, "task": names, "agent": names})


def test_figures_are_those_of_the_clips_that_both_judged(tmp_path):
    cache = JudgmentCache(tmp_path / "c")
    audit = held_out.HeldOut(Judge("held", -1.0), RUBRIC, Judge("reward", 2.0), RUBRIC, ("task",), cache)
    watched(audit, 90, 110, 0)
    watched(audit, 150)
    first = audit.take()
    assert first["task"] == pytest.approx(1 / 3) and first["invalid"] == 0.25
    assert first["task/log_odds"] == pytest.approx(-np.mean([-10, 10, 50]))
    assert first["task/reward"] == pytest.approx(2 * np.mean([-10, 10, 50]))
    assert first["task/correlation"] == pytest.approx(-1) and first["task/gap"] == 0
    assert "real/gap" not in first and first["real/log_odds"] == first["task/log_odds"]
    # Both means move by 20 / std: the reward up, the held-out judge down.
    watched(audit, 110, 130, 170)
    second = audit.take(first)
    assert second["task/gap"] == pytest.approx(2 * 20 / np.std([-10, 10, 50]))
    assert len(cache) == 5 * (2 + 1)  # clips that differ and are not black
    assert np.isnan(audit.take(first)["task"])  # nothing was watched


def test_what_cannot_be_measured_is_not_a_number():
    audit = held_out.HeldOut(Judge("held", 1.0), RUBRIC, Judge("reward", 2.0), RUBRIC, ("task",), None)
    watched(audit, 90, 90)
    found = audit.take()
    assert np.isnan(found["task/gap"]) and np.isnan(found["task/correlation"]) and found["task"] == 0
    alone = held_out.HeldOut(Judge("held", 1.0), RUBRIC, None, RUBRIC, ("task",), None)
    watched(alone, 90, 120)
    assert alone.take() == {
        "task": 0.5, "task/log_odds": 5.0, "task/std": 15.0, "real": 0.5, "real/log_odds": 5.0, "real/std": 15.0,
        "invalid": 0.0,
    }  # fmt: skip


def test_each_clip_is_judged_about_its_own_task(tmp_path, monkeypatch):
    """A process looks after some rows of a batch, not the first ones."""
    cache = JudgmentCache(tmp_path / "c")
    audit = held_out.HeldOut(Judge("held", 1.0), RUBRIC, None, RUBRIC, (), cache)
    monkeypatch.setattr(held_out.hosts, "join_rows", lambda own, values, count: values)
    names = ["w", "x", "y", "z"]
    audit.watch(clips(90, 110), np.array([1, 3]), {"ids": names, "task": names, "agent": names})
    asked = {(e.about.record, e.about.task, e.about.agent, e.log_odds) for e in cache.entries()}
    assert asked == {("x", "x", "x", -10.0), ("z", "z", "z", 10.0)}


def test_judges_are_asked_in_their_own_words(tmp_path):
    other = Rubric({"task": "Done, {task}?"})
    cache = JudgmentCache(tmp_path / "c")
    watched(held_out.HeldOut(Judge("held", 1.0), other, Judge("reward", 1.0), RUBRIC, ("task",), cache), 90)
    assert {(e.judge, e.about.text) for e in cache.entries()} == {
        ("held", "Done, r90?"), ("reward", "Is r90 done?"),
    }  # fmt: skip


def test_gaps_are_against_the_first_evaluation_of_the_run(tmp_path):
    audit = held_out.HeldOut(Judge("held", 1.0), RUBRIC, Judge("reward", 2.0), RUBRIC, ("task",), None)
    gaps = []
    for levels in ((90, 110), (110, 130), (120, 140)):
        watched(audit, *levels)
        audit._scores[-1]["held/task"] -= np.mean(levels) - 100  # the held-out judge sees no progress
        found = held_out.audit(audit, tmp_path)
        gaps.append(found["held_out/task/gap"])
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": len(gaps)} | found) + "\n")
    assert gaps == pytest.approx([0, 2, 3])  # in standard deviations of the first, which are 10 and 20


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, 30).astype(float), rng.normal(size=30)
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0))) and np.isnan(rank_correlation(np.ones(1), np.ones(1)))
    with pytest.raises(ValueError, match="finite"):
        rank_correlation(np.array([0.0, np.nan]), np.arange(2.0))


# ---- In a run


ORACLE = "world_distill.sandbox:make_oracle"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("run")
    settings = {"evaluate_every": 1, "held_out.factory": ORACLE, "judge.cache": f"{inputs}/shared/"}
    config = small_config(inputs, steps=2, **settings, **{"judge.factory": ORACLE, "judge.keep_clips": 0.5})
    family = build.make_family(config)
    save_weights(inputs / "base.safetensors", random_weights(family, 7), {})
    prepare.make_records(config, inputs / "data")
    train.train(config, folder)
    return config, folder


def test_a_run_logs_the_held_out_judge_and_what_was_cached(run):
    config, folder = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "judge/hits" in line]
    questions = 3 * config.rollout.tasks * config.rollout.group
    assert len(steps) == 2 and all(line["judge/hits"] + line["judge/misses"] == questions for line in steps)
    audits = [line for line in lines if "held_out/task" in line]
    assert [line["step"] for line in audits] == [1, 2]
    for line in audits:
        assert {"held_out/agent/correlation", "held_out/consistency/gap", "held_out/task/reward"} <= line.keys()
    with JudgmentCache(folder / "judgments.sqlite") as cache:
        entries = list(cache.entries())
    records = {e.about.record for e in entries}
    assert len({e.judge for e in entries}) == 2 and all(records) and {e.about.question for e in entries} == {
        "task", "agent", "consistency",
    }  # fmt: skip
    kept = KeptClips(folder / "judged_clips")
    digests = {e.about.clip for e in entries}
    assert 0 < len(kept.digests()) < len(digests) and set(kept.digests()) <= digests
    assert kept.load(kept.digests()[0]).dtype == np.uint8
    # Another host finds all of it at the shared address.
    with run_folder.open_cache(config, folder.parent / "elsewhere") as other:
        assert len(other) == len(entries)
    assert "held-out judge" in report.build(folder).read_text()


def test_settings_of_the_audit_may_change_on_a_run_and_others_may_not(run):
    config, folder = run
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.judge.cache, other.held_out.factory = "", ""
    run_folder.check_folder(other, folder)
    assert run_folder.fixed_settings(other) == run_folder.fixed_settings(config)
    with other.unlocked():
        other.judge.rubric = "mine"
    with pytest.raises(UserError, match=r"judge\.rubric"):
        run_folder.check_folder(other, folder)
    with pytest.raises(UserError, match=r"judge\.rubric is part of what was trained"):
        run_folder.open_run(folder, {"judge.rubric": "mine"})


def test_evaluate_compares_the_judges_role_by_role(run, capsys):
    _, folder = run
    flags = ["--limit", "3", "--roles", "base,executor", f"--config.held_out.factory={ORACLE}"]
    assert main(["evaluate", "--workdir", str(folder), *flags]) == 0
    assert "| base | task |" in capsys.readouterr().out
    found = json.loads((folder / "evaluation.json").read_text())["held_out"]
    assert found["base"]["agent/gap"] in (0, None) and set(found) == {"base", "executor"}


def test_the_rewards_own_judge_is_no_audit(run, tmp_path):
    config, _ = run
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.held_out.options = config.judge.options
    with pytest.raises(UserError, match="only confirm itself"), run_folder.open_held_out(config, tmp_path):
        pass
