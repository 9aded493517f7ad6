"""`judgments --controls`, and controls at the start of training."""

import json

import numpy as np
import pytest
from absl import logging
from small import make_inputs, small_config

from tests.judges import controlled
from tests.judges.controlled import QUESTIONS, RUBRIC, Judge, shown
from world_distill.cli.command import main
from world_distill.errors import UserError
from world_distill.judges.ask import judge_clips
from world_distill.judges.controls import CONTROLS
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.kept_clips import KeptClips
from world_distill.programs import train
from world_distill.settings.loading import load_config


@pytest.fixture
def folder(tmp_path):
    """A run whose clips a sound judge has judged, and all of which are kept."""
    run, some = tmp_path / "run", shown()
    with JudgmentCache(run / "judgments.sqlite", keep=KeptClips(run / "judged_clips")) as cache:
        judge_clips(
            Judge(), cache, np.stack([one.clip for one in some]), [one.task for one in some], ["square"] * 8, RUBRIC,
            QUESTIONS, records=[one.record for one in some],
        )  # fmt: skip
    judge = {"factory": "tests.judges.controlled:Judge", "options": {}, "rubric": "", "cache": ""}
    (run / "config.json").write_text(json.dumps({"judge": judge}))
    return run


def figures(tmp_path, *argv):
    assert main(["judgments", *map(str, argv), "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def test_kept_clips_become_controls(folder, tmp_path, capsys, monkeypatch):
    found = figures(tmp_path, folder, "--controls")["controls"]
    assert (found["judge"], found["clips"]) == ("sound-1", 8) and len(found["rows"]) == 7 * 3
    out = capsys.readouterr().out
    assert "warning" not in out and "had negative controls judged" in out and "next: world-distill judgments" in out
    monkeypatch.setattr(Judge, "ask", None)  # nobody is asked again
    assert figures(tmp_path, folder, "--controls")["controls"] == found


def test_a_fooled_judge_is_warned_of(folder, tmp_path, capsys):
    fooled = "--config.judge.factory=tests.judges.controlled:Fooled"
    found = figures(tmp_path, folder, "--controls", "--limit", 4, fooled)["controls"]
    assert found["clips"] == 4 and all(row["n"] == 4 for row in found["rows"])
    passing = {(row["control"], row["question"]) for row in found["rows"] if row["passes"]}
    assert passing == {(c, q) for c in ("done", "yes") for q in ("task", "agent")}
    assert 'warning: control done ("DONE" painted into a still clip) passes for task' in capsys.readouterr().out


def test_other_figures_leave_controls_aside(folder, tmp_path):
    before = figures(tmp_path, folder)
    figures(tmp_path, folder, "--controls")
    after = {row["question"]: row for row in figures(tmp_path, folder)["by_question"]}
    assert [after[row["question"]] for row in before["by_question"]] == before["by_question"]
    assert after["task (done)"]["count"] == 8 and after["task (done)"]["yes"] == 0
    again = figures(tmp_path, folder, "--rejudge", "--config.judge.factory=tests.judges.controlled:Static")["rejudged"]
    assert again["clips"] == 8 and {row["question"]: row["count"] for row in again["by_question"]} == dict.fromkeys(
        QUESTIONS, 8
    )


def test_flags_that_do_not_go_together(folder, tmp_path, capsys):
    for flags, text in (
        (("--controls", "--rejudge"), "give one of them"),
        (("--controls", "--export", "x.jsonl"), "give one of them"),
        (("--limit", "3"), "--limit is for --controls"),
        (("--config.judge.rubric=1",), "is for --rejudge and --controls"),
        (("--controls", "--clips", str(tmp_path / "none")), "keep_clips=0.05"),
    ):
        assert main(["judgments", str(folder), *flags]) == 2
        assert text in capsys.readouterr().err


# ---- Training


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


class Watching(controlled.Static):
    """Says yes to everything, but not always as surely, and notes what it is shown."""

    name = "watching-1"
    seen: list = []  # noqa: RUF012  (of all of them)

    def ask(self, requests):
        Watching.seen += requests
        answers = super().ask(requests)
        return [type(a)(a.log_odds + r.clip.mean() % 1) for a, r in zip(answers, requests, strict=True)]


def test_the_first_judged_step_asks_about_controls(inputs, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    changes = {
        "judge.factory": f"{__name__}:Watching", "judge.controls": 3, "steps": 3, "objective.updates": 1,
        "objective.rl_weight": ((0, 0.0), (1, 1.0)), "objective.minibatches": 1,
    }  # fmt: skip
    config = small_config(inputs, **changes)
    train.train(config, tmp_path / "run")
    found = json.loads((tmp_path / "run/controls.json").read_text())
    assert found["clips"] == 3 and {row["control"] for row in found["rows"]} > {"still", "other", "instruction"}
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    noted = [{k: v for k, v in line.items() if k.startswith("controls/")} for line in log]
    assert noted[0] == noted[2] == {} and noted[1]["controls/instruction/task"] == 1.0
    assert any("control instruction" in line and "passes for agent" in line for line in lines)
    rows = config.rollout.tasks * config.rollout.group
    assert log[1]["judge/misses"] == rows * len(QUESTIONS)  # the controls' are not the step's
    plain = Watching.seen[: rows * len(QUESTIONS)]
    told = [r.task for r in Watching.seen if "Note to the judge" in r.question and r.name == "task"]
    tasks = list(dict.fromkeys(r.task for r in plain))
    assert [t.partition(" Note")[0] for t in told] == tasks[:3]  # the first clip of each task
    count = len(Watching.seen)
    train.train(config, tmp_path / "run")
    assert len(Watching.seen) == count


def test_controls_without_a_judge_are_refused(inputs, tmp_path):
    config = small_config(inputs, **{"objective.rl": "none", "judge.controls": 3, "objective.beta_d": ((0, 1.0),)})
    with pytest.raises(UserError, match="judge.controls = 3 has no effect"):
        train.train(config, tmp_path / "run")


def test_shipped_configs():
    assert load_config("wan22_5b:wmsd").judge.controls == load_config("ltx2:wmsd").judge.controls == 8
    for name in ("wan22_5b:distill", "wan22_5b:debug", "ltx2:distill", "ltx2:dev", "ltx2:debug", "sandbox"):
        assert load_config(name).judge.controls == 0, name
    assert len(CONTROLS) * len(QUESTIONS) * 8 == 168  # as the config says
