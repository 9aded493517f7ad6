"""Learned rewards of this process as judges: which numbers reach whom, and what is no number."""

import numpy as np
import pytest

from tests.judges.controlled import shown
from tests.judges.scorers import Several, brightness
from world_distill.errors import UserError
from world_distill.evaluation import controls
from world_distill.evaluation.held_out import HeldOut
from world_distill.interfaces import JudgeRequest
from world_distill.judges import ScorerJudge
from world_distill.judges.ask import has_rate, judge_clips, refuse_clip
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import load_rubric, rubric_for
from world_distill.programs import notebook
from world_distill.settings.rollout import RolloutSettings
from world_distill.training.collect import check_reward

PLACE = "tests.judges.scorers"
TWO = {"measures": ("VQ", "TA")}


def clips(count=5, frames=3):
    return np.random.default_rng(0).integers(0, 256, (count, frames, 4, 6, 3), np.uint8)


def judged(judge, made, tasks, cache=None):
    rubric = rubric_for(judge)
    return judge_clips(judge, cache, made, tasks, [""] * len(made), rubric, rubric.names).scores


def test_numbers_of_a_function_reach_their_clips():
    made, tasks = clips(), [f"task {'x' * i}" for i in range(5)]
    judge = ScorerJudge(f"{PLACE}:brightness", options={"scale": 2.0}, batch=2)
    [line] = judge.check()
    assert "score" in line and "about red pictures" in line
    assert judged(judge, made, tasks) == {"score": pytest.approx(brightness(made, tasks, scale=2.0), abs=0)}
    direct = ScorerJudge(brightness)
    assert judged(direct, made, tasks)["score"].tolist() == brightness(made, tasks)


def test_numbers_by_name_come_from_one_look_a_clip():
    made, tasks = clips(), [f"task {'x' * i}" for i in range(5)]
    scorer = Several()
    judge = ScorerJudge(scorer, **TWO, batch=3)
    scores = judged(judge, made, tasks)
    assert scorer.calls == [3, 2] and scores.keys() == {"VQ", "TA"}
    assert scores["VQ"].tolist() == [clip.mean() for clip in made]
    assert scores["TA"].tolist() == [len(task) for task in tasks]
    made = list(made)
    asked = [JudgeRequest(made[i], "", "TA", task) for i, task in ((0, "a"), (0, "bcd"), (1, "a"), (0, "a"))]
    scorer.calls.clear()
    assert [answer.log_odds for answer in judge.ask(asked)] == [1, 3, 1, 1]
    assert scorer.calls == [3]  # one clip with two tasks is two looks


def test_other_names_and_thresholds():
    judge = ScorerJudge(
        f"{PLACE}:Several", measures={"task": "TA", "quality": "VQ"}, thresholds={"task": 6.5}, options={"offset": 1.0}
    )
    made = clips(2)
    scores = judged(judge, made, ["123456", "1234567"])
    assert scores["task"].tolist() == [-0.5, 0.5] and scores["quality"].tolist() == [c.mean() + 1 for c in made]
    assert has_rate(judge, "task") and not has_rate(judge, "quality") and has_rate(None, "quality")


def test_what_is_no_finite_number_is_no_answer():
    judge = ScorerJudge(f"{PLACE}:odd", batch=9)
    requests = [JudgeRequest(clip, "", "score", "t") for clip in clips(9)]
    answers = judge.ask(requests)
    assert [a.log_odds for a in answers] == [1.5, None, None, None, None, None, 2.5, 0.25, None]
    assert "no finite number: '2.0'" in answers[4].error and all(a.error for a in answers if a.log_odds is None)
    judgment = judge_clips(judge, None, clips(9), ["t"] * 9, [""] * 9, rubric_for(judge), ["score"])
    assert judgment.valid.tolist() == [a.error is None for a in answers]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"scorer": f"{PLACE}:one_too_few"}, "gives 1 numbers 'score' for 2 clips"),
        ({"scorer": f"{PLACE}:broken"}, "failed on 2 clips: RuntimeError.*out of memory"),
        ({"scorer": f"{PLACE}:brightness", **TWO}, "one list of numbers, for measures VQ, TA"),
        ({"scorer": f"{PLACE}:nothing"}, "cannot be imported"),
        ({"scorer": "nothing"}, "named by its address"),
        ({"scorer": f"{PLACE}:Several", "options": {"x": 1}}, "do not fit the scorer"),
        ({"scorer": f"{PLACE}:brightness", "batch": 0}, "batch is at least 1"),
        ({"scorer": f"{PLACE}:brightness", "measures": ()}, "measures names"),
        ({"scorer": f"{PLACE}:brightness", "measures": ("a{b}",)}, "measures names"),
        ({"scorer": f"{PLACE}:brightness", "thresholds": {"x": 1}}, "thresholds has x, and measures score"),
        ({"scorer": f"{PLACE}:brightness", "thresholds": {"score": "a"}}, "threshold of score is a finite number"),
    ],
)
def test_a_scorer_that_cannot_be_used_says_why(options, text):
    with pytest.raises(UserError, match=text):
        judged(ScorerJudge(**options), clips(2), ["a", "b"])


def test_a_missing_measure_is_found_before_training():
    judge = ScorerJudge(f"{PLACE}:Several", measures={"task": "alignment"})
    with pytest.raises(UserError, match="gives VQ, TA, other, and no alignment"):
        judge.check()
    [answer] = judge.ask([JudgeRequest(clips(1)[0], "", "task", "t")])
    assert answer.log_odds is None and "gave no alignment, but VQ" in answer.error


def test_the_cache_asks_nothing_twice_and_knows_what_a_number_is(tmp_path):
    made, tasks = clips(), ["t"] * 5

    def asked(**options):
        scorer = Several()
        judge = ScorerJudge(scorer, **{"version": "1"} | options)
        with JudgmentCache(tmp_path / "c") as cache:
            scores = judged(judge, made, tasks, cache)
        return sum(scorer.calls), scores

    first = asked(measures=("VQ",))
    assert first[0] == 5 and asked(measures=("VQ",))[0] == 0 and asked(measures=("VQ",), batch=1)[0] == 0
    assert asked(measures=("VQ", "TA"))[0] == 5  # for the other one
    assert asked(measures=("VQ", "TA"))[0] == asked(measures=("TA",))[0] == 0
    renamed, scores = asked(measures={"VQ": "TA"})
    assert renamed == 0 and scores["VQ"].tolist() == [1.0] * 5  # a name is not what the number is
    assert asked(measures=("VQ",), version="2")[0] == 5
    other, scores = asked(measures=("VQ",), thresholds={"VQ": 100.0})
    assert other == 5 and np.allclose(scores["VQ"], first[1]["VQ"] - 100)
    names = {ScorerJudge(f"{PLACE}:Several", options={"offset": x}, measures=("VQ",)).name for x in (0.0, 1.0)}
    assert len(names) == 2


def test_it_takes_the_place_of_a_rubric():
    judge = ScorerJudge(Several(), **TWO)
    assert rubric_for(judge).names == ("TA", "VQ")
    assert rubric_for(judge).render("VQ", "[a]: Do {it}.", "a") == "VQ: [a]: Do {it}."
    with pytest.raises(UserError, match="has no effect with a learned reward"):
        rubric_for(judge, "1")
    assert rubric_for(None, "1").version == load_rubric("1").version
    assert rubric_for(None).names == load_rubric().names


def test_in_a_notebook():
    told = [notebook.Told("task", task, "a", {}, {}) for task in ("abc", "abcd")]
    scores = notebook.judge(ScorerJudge(Several(), **TWO), clips(2), told).scores
    assert scores["TA"].tolist() == [3, 4] and scores.keys() == {"VQ", "TA"}


def test_settings_in_log_odds_are_refused():
    judge = ScorerJudge(Several(), **TWO)
    check_reward(judge, rubric_for(judge), RolloutSettings(weights={"VQ": 1.0, "TA": 0.5, "distill": 0.0}))
    with pytest.raises(UserError, match=r"has task, agent, consistency, and the judge .* is asked for TA, VQ"):
        check_reward(judge, rubric_for(judge), RolloutSettings())
    with pytest.raises(UserError, match="rollout.clip = 3 is in log-odds.*set the clip to 0"):
        check_reward(judge, rubric_for(judge), RolloutSettings(weights={"VQ": 1.0}, clip=3.0))
    refuse_clip(judge, 0.0)


def test_as_a_held_out_judge_it_has_a_rate_where_it_has_a_threshold():
    judge = ScorerJudge(Several(), measures={"task": "TA", "quality": "VQ"}, thresholds={"task": 6.5})
    reward = ScorerJudge(Several(offset=2.0), measures={"task": "TA", "quality": "VQ"})
    held_out = HeldOut(judge, rubric_for(judge), reward, rubric_for(reward), ["task", "quality"], None)
    tasks = ["123456", "1234567", "12345678", "1"]
    held_out.watch(clips(4), np.arange(4), {"ids": list("abcd"), "task": tasks, "agent": [""] * 4})
    found = held_out.take()
    assert found["task"] == 0.5 and np.isnan(found["quality"])
    assert found["quality/log_odds"] == pytest.approx(np.mean([clip.mean() for clip in clips(4)]))
    assert found["quality/reward"] == pytest.approx(found["quality/log_odds"] + 2)
    assert found["task/correlation"] == pytest.approx(1) and found["invalid"] == 0


def motion(made, tasks):
    """How much moves, whoever does it."""
    return [float(np.abs(np.diff(clip.astype(int), axis=0)).mean()) for clip in made]


def test_controls_of_a_scorer_are_compared_by_their_scores():
    judge = ScorerJudge(motion, measures={"task": "score"})
    result = controls.ask_controls(judge, None, shown(), rubric_for(judge), ["task"])
    rows = {row["control"]: row for row in result["rows"]}
    assert rows["still"]["passes"] is False and rows["still"]["rate"] is None and rows["still"]["score"] == 0
    assert rows["backwards"]["passes"] is True and rows["done"]["passes"] is True
    assert "the mean score is" in controls.warnings(result)[0]
