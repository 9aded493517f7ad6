"""The checker: verdicts from the true layout, near the oracle's in what they say and apart from them in how."""

import ast
import dataclasses
import pathlib

import numpy as np
import pytest

from tests.sandbox.acting import (
    FAULTS,
    QUESTIONS,
    WORLD,
    act,
    ask,
    check,
    deeds_by_kind,
    frozen,
    some_deeds,
    spoilt,
    stop_short,
)
from world_distill.interfaces import Cases
from world_distill.sandbox import checker
from world_distill.sandbox.checker import Goal, parse_task
from world_distill.sandbox.factories import make_benchmark
from world_distill.sandbox.oracle import Oracle
from world_distill.sandbox.scenes import to_png
from world_distill.sandbox.tasks import deeds
from world_distill.sandbox.world import Scene, Thing, World, sample_scene

SCENE = Scene(
    (
        Thing("ring", "red", (1, 1)),
        Thing("ring", "blue", (3, 3)),
        Thing("crate", "brown", (3, 1)),
        Thing("disc", "green", (0, 4)),
        Thing("square", "yellow", (4, 4)),
    )
)


# ---- What is asked for


@pytest.mark.parametrize(
    "task, goal",
    [
        ("[green disc]: Go to the red ring.", Goal("green disc", "green disc", (1, 1))),
        (
            "[yellow square]: Go to the red ring, then to the blue ring.",
            Goal("yellow square", "yellow square", (3, 3), (1, 1)),
        ),
        ("[green disc]: Push the brown crate onto the blue ring.", Goal("green disc", "brown crate", (3, 3))),
        ("[green disc]: Stop just left of the blue ring.", Goal("green disc", "green disc", (2, 3))),
        ("[green disc]: Stop just right of the blue ring.", Goal("green disc", "green disc", (4, 3))),
        ("[green disc]: Stop just above the blue ring.", Goal("green disc", "green disc", (3, 2))),
        ("[green disc]: Stop just below the blue ring.", Goal("green disc", "green disc", (3, 4))),
    ],
)
def test_tasks_are_read(task, goal):
    assert parse_task(SCENE, task) == goal


@pytest.mark.parametrize(
    "task, message",
    [
        ("Go to the red ring.", "not a sandbox task"),
        ("[green disc]: Go to the red ring", "not a sandbox task"),
        ("[green disc]: Dance.", "not a sandbox task: .*Dance"),
        ("[green disc]: Stop just inside the red ring.", "not a sandbox task"),
        ("[cyan disc]: Go to the red ring.", "names 'cyan disc'; the scene has red ring, blue ring"),
        ("[green disc]: Go to the cyan ring.", "names 'cyan ring'"),
        ("[green disc]: Go to the red ring, then to the cyan ring.", "names 'cyan ring'"),
        ("[green disc]: Push the pink crate onto the red ring.", "names 'pink crate'"),
    ],
)
def test_what_is_no_task_here_is_an_error(task, message):
    with pytest.raises(ValueError, match=message):
        parse_task(SCENE, task)


# ---- Verdicts


@pytest.mark.parametrize("kind", ["go", "beside", "push", "sequence"])
def test_clean_deeds_pass(kind):
    for scene, deed in deeds_by_kind(40, 20)[kind]:
        verdicts = check(scene, deed, act(scene, deed).clip)
        assert all(verdicts.values()), (verdicts, deed, scene)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_caught_by_its_question(fault):
    no, yes = FAULTS[fault]
    for it in spoilt(fault, 25, 2):
        verdicts = check(it.scene, it.deed, it.clip)
        assert not any(verdicts[q] for q in no), (verdicts, it.deed, it.scene)
        assert all(verdicts[q] for q in yes), (verdicts, it.deed, it.scene)


def test_crowded_worlds_are_judged_too():
    world = World(agents=(3, 3), rings=(3, 3))
    rng = np.random.default_rng(3)
    for _ in range(40):
        scene = sample_scene(world, rng)
        for deed in deeds(world, scene)[:1]:
            assert all(check(scene, deed, act(scene, deed).clip).values()), (deed, scene)


def test_a_way_point_that_is_left_out_fails_the_task():
    """The end is right, the way is not."""
    missed = 0
    for scene, deed in deeds_by_kind(40, 21)["sequence"]:
        it = act(scene, deed)
        start, end = it.track[0, it.agent], it.track[-1, it.agent]
        along = np.linspace(0, 1, WORLD.frames)[:, None]
        it.track[:, it.agent] = start + along * (end - start)
        if np.linalg.norm(it.track[:, it.agent] - np.add(deed.via, 0.5), axis=-1).min() > 0.7:
            assert not check(scene, deed, it.clip)["task"]
            assert ask(Oracle(WORLD), deed, it.clip)["task"] < 0
            missed += 1
    assert missed > 10


def test_a_ring_may_be_covered_but_not_gone():
    """While an agent stands on it, a ring that has gone, or has a double, is still missed."""
    for scene, deed in deeds_by_kind(15, 22)["go"]:
        ring = next(n for n, t in enumerate(scene.things) if t.shape == "ring" and t.place == deed.goal[1])
        it = act(scene, deed)
        assert check(scene, deed, it.clip)["consistency"]
        it.opacity[-1, ring] = 0.0
        assert not check(scene, deed, it.clip)["consistency"]
        it.opacity[-1, ring] = 1.0
        corner = free_spot(it)
        it.add(scene.things[ring], np.repeat(corner[None], WORLD.frames, axis=0), 6)
        assert not check(scene, deed, it.clip)["consistency"]


def free_spot(it):
    """The place that is furthest from everything."""
    places = [np.array([i, j]) + 0.5 for i in range(WORLD.cells) for j in range(WORLD.cells)]
    return max(places, key=lambda p: np.linalg.norm(it.track - p, axis=-1).min())


def test_verdicts_stand_on_the_layout_and_not_on_the_first_frame():
    """A clip of another scene does not bring its own goal along."""
    moved = Scene((Thing("ring", "red", (1, 2)), *SCENE.things[1:]))
    task = "[green disc]: Go to the red ring."
    deed = next(d for d in deeds(WORLD, moved) if d.task == task)
    clip = act(moved, deed).clip
    assert checker.check(WORLD, moved, task, clip)["task"]
    assert not checker.check(WORLD, SCENE, task, clip)["task"]


# ---- The benchmark


def test_the_benchmark_checks_each_clip_against_its_own_png():
    pairs = some_deeds(2, 23)
    clips = np.stack([act(s, d).clip for s, d in pairs])
    clips[1] = clips[1, :1]  # frozen
    images = [to_png(WORLD, s) for s, _ in pairs]
    names = [str(i) for i in range(len(pairs))]
    cases = Cases(names, [d.task for _, d in pairs], [d.agent for _, d in pairs], images)
    verdicts = make_benchmark(world={}).check(clips, cases)
    assert verdicts.keys() == set(QUESTIONS)
    for name, values in verdicts.items():
        assert values.dtype == np.float64
        assert values.tolist() == [1, 1 if name == "consistency" else 0, *[1] * 6]
    with pytest.raises(ValueError):
        make_benchmark(world={}).check(clips, dataclasses.replace(cases, tasks=cases.tasks[:1]))
    assert make_benchmark(world={}).name != Oracle(WORLD).name


# ---- Oracle and checker


def faulty_clips(count, seed):
    """Deeds that stop anywhere on their way, half of them with a fault more, through some noise."""
    rng = np.random.default_rng(seed)
    faults = [fault for fault in FAULTS if fault not in (stop_short, frozen)]  # a travel of any length is both
    while count:
        scene = sample_scene(WORLD, rng)
        options = deeds(WORLD, scene)
        if not options:
            continue
        it = act(scene, options[rng.integers(len(options))], travel=rng.choice([1.0, rng.uniform(0, 1)]))
        if rng.random() < 0.5 and not faults[rng.integers(len(faults))](it, rng):
            continue
        clip = it.clip + rng.normal(0, 5, it.clip.shape)
        clip[0] = it.clip[0]
        yield it, np.clip(np.round(clip), 0, 255).astype(np.uint8)
        count -= 1


def test_oracle_and_checker_agree_and_are_not_the_same():
    agree = {q: [] for q in QUESTIONS}
    yes = {q: [] for q in QUESTIONS}
    oracle = Oracle(WORLD)
    for it, clip in faulty_clips(150, 0):
        odds, verdicts = ask(oracle, it.deed, clip), check(it.scene, it.deed, clip)
        for q in QUESTIONS:
            agree[q].append((odds[q] > 0) == verdicts[q])
            yes[q].append(verdicts[q])
    shares = {q: np.mean(v) for q, v in agree.items()}
    assert min(shares.values()) >= 0.9, shares
    assert not all(v == 1.0 for v in shares.values()), "a gap between the two could not be seen"
    assert all(0.1 < np.mean(v) < 0.9 for v in yes.values()), yes  # the clips are neither all good nor all bad


def test_oracle_and_checker_share_no_code():
    """The benchmark sees by itself: it imports the world's constants, and nothing that sees or judges."""
    tree = ast.parse(pathlib.Path(checker.__file__).read_text())
    ours = {n.module: [a.name for a in n.names] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert set(ours) == {"scipy", "world_distill.sandbox.world"}
    assert not {"render", "trajectories", "floor"} & set(ours["world_distill.sandbox.world"])
