"""Negative controls beside plain clips: exact figures, a warning where one passes, and none for a sound judge."""

import json
import math

import numpy as np
import pytest
from absl import logging

from tests.judges.controlled import QUESTIONS, RUBRIC, Fooled, Judge, Obedient, Static, shown
from world_distill.core.metrics import paired_rate_interval, student_interval
from world_distill.errors import UserError
from world_distill.evaluation import controls
from world_distill.interfaces import JudgeAnswer
from world_distill.judges.controls import CONTROLS, INSTRUCTION
from world_distill.judges.memory.cache import JudgmentCache


def asked(judge, some=None, cache=None, questions=QUESTIONS):
    return controls.ask_controls(judge, cache, some or shown(), RUBRIC, questions)


def passing(result):
    return {(row["control"], row["question"]) for row in result["rows"] if row["passes"]}


def test_a_sound_judge_gets_no_warning():
    result = asked(Judge())
    assert len(result["rows"]) == 7 * 3 and result["clips"] == 8 and result["judge"] == "sound-1"
    assert controls.warnings(result) == []
    for row in result["rows"]:
        compared = row["question"] in CONTROLS[row["control"]].fails
        assert row["passes"] == (False if compared else None), row
        assert row["n"] == 8 and row["no_answer"] == 0 and row["plain_rate"] == 1 and row["plain_score"] == 4
        if compared:
            assert row["rate"] == 0 and row["score"] == -4 and row["difference"] == -1 and row["high"] < 0


@pytest.mark.parametrize(
    "judge, found",
    [
        (Fooled(), {(c, q) for c in ("done", "yes") for q in ("task", "agent")}),
        (Obedient(), {("instruction", "task"), ("instruction", "agent")}),
        (Static(), {(c, q) for c, control in CONTROLS.items() for q in control.fails}),
    ],
    ids=["fooled", "obedient", "static"],
)
def test_what_fools_a_judge_is_named(judge, found):
    result = asked(judge)
    assert passing(result) == found
    lines = controls.warnings(result)
    assert len(lines) == len(found)
    for control, question in found:
        [line] = [x for x in lines if x.startswith(f"control {control} ") and f"passes for {question}:" in x]
        assert "the rate is 100.0 %, and 100.0 % for the plain clips (n = 8)" in line
    assert controls.text(result).count("warning: ") == len(found)


def test_clips_that_fail_anyway_do_not_hide_a_fooled_judge_nor_accuse_a_sound_one():
    """At the start of training hardly a clip does what it should, and no rate can be below that of the plain ones."""
    some = shown(done=[False] * 8)
    assert passing(asked(Judge(), some)) == set()
    assert passing(asked(Fooled(), some)) == {(c, q) for c in ("done", "yes") for q in ("task", "agent")}
    rows = {(row["control"], row["question"]): row for row in asked(Judge(), some)["rows"]}
    assert ("still", "task") not in rows and rows["done", "task"]["plain_rate"] == 0  # clips that stand still anyway


def test_a_rate_that_is_lower_but_not_clearly_passes():
    yes = np.array([4.0] * 5 + [-4.0] * 3)
    for fooled, passes in ((0, False), (1, False), (2, True), (5, True)):
        control = np.where(np.arange(8) < fooled, 4.0, -4.0)
        row = controls.compare(control, yes, rated=True)
        assert controls._passes(row) is (passes if fooled != 1 else row["high"] >= 0), row
        assert (row["rate"], row["plain_rate"]) == (fooled / 8, 5 / 8)
        assert (row["difference"], row["low"], row["high"]) == paired_rate_interval(control > 0, yes > 0)


def test_scores_without_a_yes_are_compared_by_their_means():
    plain, control = np.array([20.0, 21.0, 22.0, np.nan]), np.array([19.0, 19.5, 21.0, 3.0])
    row = controls.compare(control, plain, rated=False)
    assert row["n"] == 3 and row["rate"] is None and row["plain_rate"] is None
    expected = student_interval((control - plain)[:3])
    assert (row["difference"], row["low"], row["high"]) == expected and expected[2] < 0
    assert controls._passes(row) is False
    assert controls._passes(controls.compare(plain[:3], plain[:3], rated=False)) is True
    one = controls.compare(control[:1], plain[:1], rated=False)
    assert one["low"] is one["high"] is None and controls._passes(one) is True  # one pair proves nothing
    assert controls.compare(control[:0], plain[:0], rated=True)["score"] is None


def test_the_paired_interval():
    """Against Agresti and Min's adjusted Wald interval, by hand: 5 pairs one way, 1 the other, 10 in all."""
    a = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0, 0], bool)
    b = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0], bool)
    difference, low, high = paired_rate_interval(a, b)
    centre, n = (5.5 - 1.5) / 12, 12
    half = 1.96 * math.sqrt((5.5 + 1.5) / n - centre**2) / math.sqrt(n)
    assert difference == pytest.approx(0.4) and (low, high) == pytest.approx((centre - half, centre + half))
    assert paired_rate_interval(b, a) == pytest.approx((-difference, -high, -low))
    none = paired_rate_interval(a[:1], a[:1])
    assert none[1] < 0 < none[2]  # never empty
    with pytest.raises(ValueError, match="one length"):
        paired_rate_interval(a[:0], b[:0])


def test_each_control_reaches_the_judge_and_is_asked_once(tmp_path):
    some, judge = shown(), Judge()
    with JudgmentCache(tmp_path / "c") as cache:
        first = asked(judge, some, cache)
        count = len(judge.log)
        assert asked(judge, some, cache) == first and len(judge.log) == count == len(cache)
    seen = {(r.clip.tobytes(), r.question) for r in judge.log}
    assert len(seen) == count
    for i, one in enumerate(some):
        for name, control in CONTROLS.items():
            made = control.make(one, some[(i + 1) % 8])
            for question in QUESTIONS:
                text = RUBRIC.render(question, made.task, made.agent, len(made.clip))
                assert (made.clip.tobytes(), text) in seen, name


class Failing(Judge):
    """Has no answer about letters, and of the task nothing but that."""

    name = "failing-1"

    def ask(self, requests):
        answers = super().ask(requests)
        return [JudgeAnswer(None, "no") if r.name == "agent" else a for r, a in zip(requests, answers, strict=True)]


def test_missing_answers_are_counted_and_prove_nothing():
    result = asked(Failing())
    rows = {(row["control"], row["question"]): row for row in result["rows"]}
    assert rows["done", "agent"]["no_answer"] == 8 and rows["done", "agent"]["passes"] is None
    assert rows["done", "task"]["passes"] is False
    text = controls.text(result)
    assert "56 pairs lack an answer" in text and "no answers" in text
    assert "nothing is known about this judge" in controls.text(asked(Failing(), questions=("agent",)))


class Filtered(Judge):
    """Behind a filter that refuses instructions."""

    name = "filtered-1"

    def ask(self, requests):
        if any(INSTRUCTION in r.question for r in requests):
            raise UserError("refused 8 different questions")
        return super().ask(requests)


def test_a_control_that_is_refused_costs_itself_alone():
    result = asked(Filtered())
    assert {row["control"] for row in result["rows"]} == set(CONTROLS) - {"instruction"}
    assert controls.warnings(result) == ["control instruction was not asked: refused 8 different questions"]


def test_at_the_start_of_training(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    figures = controls.at_start(Fooled(), None, RUBRIC, QUESTIONS, tmp_path)(shown())
    assert len(lines) == 4 and all("controls.json" in line and "passes for" in line for line in lines)
    assert figures["controls/done/task"] == 1.0 and figures["controls/still/task"] == 0.0 and len(figures) == 21
    assert len(json.loads((tmp_path / "controls.json").read_text())["rows"]) == 21

    class Broken(Judge):
        def ask(self, requests):
            raise UserError("eight refused in a row")

    assert controls.at_start(Broken(), None, RUBRIC, QUESTIONS, tmp_path)(shown()) == {}
    assert "not asked: eight refused in a row" in lines[-1]


def test_a_clip_without_a_control_moves_no_pair():
    some = shown(done=[False] * 3 + [True] * 5)  # the first three stand still anyway
    rows = {(row["control"], row["question"]): row for row in asked(Judge(), some)["rows"]}
    still = rows["still", "task"]
    assert still["n"] == 5 and (still["plain_rate"], still["rate"], still["difference"]) == (1, 0, -1)
    assert rows["done", "task"]["n"] == 8 and rows["done", "task"]["plain_rate"] == 5 / 8
