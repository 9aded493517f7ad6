"""The oracle: sure about clean clips and about faults, graded in between, and blind to all but pixels and words."""

import dataclasses
import inspect

import numpy as np
import pytest

from tests.sandbox.acting import (
    FAULTS,
    QUESTIONS,
    RUBRIC,
    WORLD,
    act,
    ask,
    deeds_by_kind,
    some_deeds,
    spoilt,
)
from world_distill.interfaces import JudgeRequest
from world_distill.sandbox.oracle import CERTAIN, Oracle, Tolerance
from world_distill.sandbox.tasks import deeds
from world_distill.sandbox.world import Scene, Thing, World, render, trajectories

ORACLE = Oracle(WORLD)


# ---- Right answers


@pytest.mark.parametrize("kind", ["go", "beside", "push", "sequence"])
def test_clean_deeds_pass_all_questions(kind):
    for scene, deed in deeds_by_kind(40, 0)[kind]:
        answers = ask(ORACLE, deed, act(scene, deed).clip)
        assert min(answers.values()) > 1, (answers, deed, scene)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_caught_by_its_question(fault):
    no, yes = FAULTS[fault]
    for it in spoilt(fault, 25, 0):
        answers = ask(ORACLE, it.deed, it.clip)
        assert all(answers[q] < 0 for q in no), (answers, it.deed, it.scene)
        assert all(answers[q] > 0 for q in yes), (answers, it.deed, it.scene)


def test_brown_upon_cyan_is_not_green():
    """The rim of a crate on a cyan ring once made a green agent seem to have moved, or not to be where it was."""
    scene = Scene(
        (
            Thing("ring", "cyan", (2, 1)),
            Thing("ring", "red", (4, 2)),
            Thing("crate", "brown", (2, 2)),
            Thing("diamond", "blue", (2, 3)),
            Thing("triangle", "green", (0, 1)),
        )
    )
    deed = next(d for d in deeds(WORLD, scene) if d.kind == "push")
    assert min(ask(ORACLE, deed, act(scene, deed).clip).values()) > 1


def test_the_other_way_round_is_wrong():
    """The clip of one task is no answer to another with another goal."""
    wrong = 0
    for scene, deed in some_deeds(5, 6):
        clip = act(scene, deed).clip
        for other in deeds(WORLD, scene):
            if np.linalg.norm(np.subtract(other.goal[1], deed.goal[1])) >= 1 and other.goal[0] == deed.goal[0]:
                answers = ask(ORACLE, other, clip)
                assert answers["task"] < 0 < answers["agent"], (deed, other)
                wrong += 1
            elif other.agent != deed.agent:
                assert ask(ORACLE, other, clip)["agent"] < 0
    assert wrong > 20


# ---- Graded and bounded


def test_task_odds_fall_with_the_distance_to_the_goal():
    for scene, deed in some_deeds(4, 7):
        length = np.linalg.norm(np.subtract(*deed.motion.way[-2:]))
        odds = [ask(ORACLE, deed, act(scene, deed, travel=1 - d / length).clip)["task"] for d in np.arange(0, 1, 0.06)]
        assert np.all(np.diff(odds) < 0.35), (odds, deed)  # falls, but for a pixel's rounding
        assert odds[0] > 3 and odds[-1] < -3
        assert len({round(o, 2) for o in odds}) > len(odds) * 0.6  # and does not jump from yes to no
        assert np.abs(np.diff(odds)).max() < 2.5


def test_a_goal_that_is_passed_is_not_reached():
    for scene, deed in deeds_by_kind(4, 8)["go"]:
        there = act(scene, deed)
        there.track = there.track[[0, 2, 4, 6, 8, 6, 4, 2, 0]]  # and back
        assert ask(ORACLE, deed, act(scene, deed).clip)["task"] > 3 > -3 > ask(ORACLE, deed, there.clip)["task"]


def test_agent_odds_rise_with_the_way_it_makes():
    for scene, deed in deeds_by_kind(6, 8)["go"]:
        length = np.linalg.norm(np.subtract(*deed.motion.way))
        odds = [ask(ORACLE, deed, act(scene, deed, travel=d / length).clip)["agent"] for d in np.arange(0, 1, 0.06)]
        assert np.all(np.diff(odds) > -0.35) and odds[0] < -3 < 3 < odds[-1]


def test_consistency_odds_fall_as_a_thing_fades():
    for scene, deed in deeds_by_kind(6, 9)["go"]:
        odds = []
        for opacity in np.linspace(1, 0, 8):
            it = act(scene, deed)
            it.opacity[4, it.agent] = opacity
            odds.append(ask(ORACLE, deed, it.clip)["consistency"])
        assert np.all(np.diff(np.clip(odds, -3, 3)) < 0.3) and odds[0] > 1 and odds[-1] < -1, odds
        assert any(abs(o) < 2.5 for o in odds), odds  # and does not jump from yes to no


def test_odds_are_bounded_and_finite():
    rng = np.random.default_rng(0)
    for scene, deed in some_deeds(3, 10):
        start = act(scene, deed).clip
        for clip in (start, rng.integers(0, 256, start.shape, np.uint8), np.zeros_like(start), 255 - start):
            clip[0] = start[0]
            for value in ask(ORACLE, deed, clip).values():
                assert -CERTAIN <= value <= CERTAIN


def test_noise_that_a_viewer_would_not_see_changes_nothing():
    rng = np.random.default_rng(0)
    for scene, deed in some_deeds(6, 11):
        clip = act(scene, deed).clip
        noisy = np.clip(clip + rng.normal(0, 4, clip.shape), 0, 255).astype(np.uint8)
        assert min(ask(ORACLE, deed, noisy).values()) > 0


# ---- What it looks at


def test_answers_follow_from_pixels_and_words_alone():
    """No layout is handed in; equal arrays get equal answers, alone or among others, in any order, from any oracle."""
    assert {f.name for f in dataclasses.fields(JudgeRequest)} == {"clip", "question", "name", "task"}
    assert set(inspect.signature(ORACLE.ask).parameters) == {"requests"}
    requests = []
    for it in [act(s, d) for s, d in some_deeds(3, 12)] + spoilt(next(iter(FAULTS)), 3, 1):
        requests += [JudgeRequest(it.clip, RUBRIC.render(q, it.deed.task, it.deed.agent)) for q in QUESTIONS]
    together = ORACLE.ask(requests)
    order = np.random.default_rng(0).permutation(len(requests))
    shuffled = Oracle(WORLD).ask([JudgeRequest(requests[i].clip.copy(), requests[i].question) for i in order])
    for place, i in enumerate(order):
        named = dataclasses.replace(requests[i], name="task", task="[red disc]: Go to the blue ring.")
        assert shuffled[place] == together[i] == ORACLE.ask([requests[i]])[0] == ORACLE.ask([named])[0]
    assert len({a.log_odds for a in together}) > 10


def test_the_same_words_about_another_picture_are_judged_by_the_picture():
    """Things swap their places: what was right is wrong now."""
    checked = 0
    for scene, deed in deeds_by_kind(12, 13)["go"]:
        a, b = scene.rings
        swapped = Scene(
            (dataclasses.replace(a, place=b.place), dataclasses.replace(b, place=a.place), *scene.things[2:])
        )
        if any(d.task == deed.task for d in deeds(WORLD, swapped)):
            clip = render(
                WORLD,
                [swapped.things],
                [trajectories(WORLD, scene, deed.motion)[:, [1, 0, *range(2, len(scene.things))]]],
            )[0]
            assert ask(ORACLE, deed, clip)["task"] < 0 < ask(ORACLE, deed, clip)["agent"]
            checked += 1
    assert checked > 3


# ---- No answer is no number


def test_questions_without_an_answer_are_errors():
    scene, deed = deeds_by_kind(1, 0)["go"][0]
    clip = act(scene, deed).clip
    colours = {t.colour for t in scene.things}
    absent = next(c for c in ("red", "green", "blue", "yellow", "purple", "cyan") if c not in colours)
    ring = scene.rings[0].name
    tasks = [
        f"[{absent} disc]: Go to the {ring}.",  # nobody of that name
        f"[{deed.agent}]: Go to the {absent} ring.",  # no such place
        f"[{deed.agent}]: Fly to the {ring}.",  # nothing of this world
        f"[{deed.agent}]: Go to the {ring}",  # no full stop: not the task that was given
        f"{deed.agent}: Go to the {ring}.",
        "[brown crate]: Push the blue ring onto the floor.",
        "",
    ]
    for task in tasks:
        for name in ("task", "agent"):
            (answer,) = ORACLE.ask([JudgeRequest(clip, RUBRIC.render(name, task, deed.agent))])
            assert answer.log_odds is None and "names no task" in answer.error, (task, answer)


@pytest.mark.parametrize(
    "question",
    [
        "Task: {task}\nIs it a pretty video? Answer yes or no.",
        "Task: {task}\nDoes the factory react? Answer yes or no.",
        "The one that was to act is named. Task: {task}\nIs the frame rate exact?",
        "Task: {task}\nIs it physically inconsistent?",
        "Was it fun?",
        "",
    ],
)
def test_questions_that_it_does_not_know_are_errors(question):
    scene, deed = deeds_by_kind(1, 0)["go"][0]
    (answer,) = ORACLE.ask([JudgeRequest(act(scene, deed).clip, question.format(task=deed.task))])
    assert answer.log_odds is None and answer.error


def test_a_known_task_that_the_scene_does_not_allow_is_an_error():
    """Its way is not clear: nobody may be rewarded for going through others."""
    scene = Scene((Thing("ring", "red", (4, 2)), Thing("disc", "blue", (0, 2)), Thing("square", "green", (2, 2))))
    clip = np.repeat(render(WORLD, [scene.things], [np.array([[t.place for t in scene.things]]) + 0.5])[0], 9, axis=0)
    question = RUBRIC.render("task", "[blue disc]: Go to the red ring.", "blue disc")
    (answer,) = ORACLE.ask([JudgeRequest(clip, question)])
    assert answer.log_odds is None and "this scene allows" in answer.error


def test_clips_that_show_no_scene_are_errors():
    scene, deed = deeds_by_kind(1, 0)["go"][0]
    clip = act(scene, deed).clip
    blank = clip.copy()
    blank[0] = render(WORLD, [()], [np.zeros((1, 0, 2))])[0, 0]
    large = np.zeros((9, 40, 40, 3), np.uint8)
    for wrong in (blank, large, clip.astype(np.float32) / 255):
        for answer in ORACLE.ask([JudgeRequest(wrong, RUBRIC.render(q, deed.task, deed.agent)) for q in QUESTIONS]):
            assert answer.log_odds is None and "no scene of this world" in answer.error
    # One clip that cannot be judged does not take the others with it.
    good = RUBRIC.render("task", deed.task, deed.agent)
    answers = ORACLE.ask([JudgeRequest(large, good), JudgeRequest(clip, good)])
    assert answers[0].error and answers[1].log_odds > 1
    assert ORACLE.ask([]) == []


def test_the_name_tells_answers_apart():
    """It is part of the key under which judgments are kept."""
    oracles = [
        Oracle(WORLD),
        Oracle(World(size=60)),
        Oracle(World(cells=4)),
        Oracle(World(frames=5)),
        *[
            Oracle(WORLD, tolerance=dataclasses.replace(Tolerance(), **{f.name: f.default + 0.01}))
            for f in dataclasses.fields(Tolerance)
        ],
    ]
    assert len({o.name for o in oracles}) == len(oracles)
    assert Oracle(World()).name == Oracle(WORLD, kinds=("go",)).name  # whose tasks they are changes no answer
