"""Pretraining clips: what the caption says is what is shown, but for the faults that are asked for."""

import dataclasses
import re

import numpy as np
import pytest

from tests.sandbox.acting import WORLD, read_narration, scenes
from world_distill.sandbox import captions
from world_distill.sandbox.captions import Faults, sample_clips, sample_motion
from world_distill.sandbox.factories import make_clips
from world_distill.sandbox.narration import BESIDE, GO, PUSH, STYLES, TWO, narrate, words
from world_distill.sandbox.tasks import deeds
from world_distill.sandbox.vision import read_scene, watch
from world_distill.sandbox.world import World, leg_is_clear

NONE = Faults(short=0, other=0, blink=0, jump=0, vanish=0)
COUNT = 60


def made(**faults):
    """Clips with one kind of fault: (scene, sight, agent, displacement of each leg) of each."""
    clips = sample_clips(
        WORLD, Faults(**{"short": 0, "other": 0, "blink": 0, "jump": 0, "vanish": 0, **faults}), COUNT, rng()
    )
    for clip, caption in zip(clips.clips, clips.captions, strict=True):
        scene = read_scene(WORLD, clip[0])
        agent, legs, pushed = read_narration(caption, scene)
        yield scene, watch(WORLD, scene, clip), scene.index(agent), np.array(legs), pushed


def rng(seed=0):
    return np.random.default_rng(seed)


def way_of(sight):
    """How far each thing gets from its start, in cells."""
    return np.linalg.norm(sight.centre - sight.centre[:1], axis=-1).max(0)


# ---- Without faults


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_motions_turn_once_as_often_as_asked_for(share):
    world = {f.name: getattr(WORLD, f.name) for f in dataclasses.fields(WORLD)}
    source = make_clips(world=world, faults=dataclasses.asdict(NONE), two_legs=share)
    clips, told = source.batch(0, 0, 80)
    acts = [read_narration(text, read_scene(WORLD, clip[0])) for clip, text in zip(clips, told, strict=True)]
    turns = [len(legs) == 2 for _, legs, pushed in acts if not pushed]
    assert abs(np.mean(turns) - share) < (0.2 if 0 < share < 1 else 1e-9)


def test_clips_show_what_their_captions_say():
    lengths = set()
    for scene, sight, agent, legs, pushed in made():
        np.testing.assert_allclose(sight.centre[-1, agent] - sight.centre[0, agent], legs.sum(0), atol=0.25)
        if len(legs) == 2:
            np.testing.assert_allclose(sight.centre[4, agent] - sight.centre[0, agent], legs[0], atol=0.25)
        if pushed:
            crate = scene.index(pushed[0])
            np.testing.assert_allclose(sight.centre[-1, crate] - sight.centre[0, crate], pushed[1], atol=0.25)
        for n, thing in enumerate(scene.things):
            if n != agent and thing.shape != "ring" and not (pushed and thing.shape == "crate"):
                assert way_of(sight)[n] < 0.2
        assert sight.seen[:, agent].all()
        lengths.add((len(legs), bool(pushed)))
    assert lengths == {(1, False), (2, False), (1, True)}


def test_random_motions_are_feasible():
    generator = rng(1)
    for scene in scenes(100, 1):
        motion = sample_motion(WORLD, scene, generator)
        ignore = (motion.agent, scene.crate.name) if motion.pushes else (motion.agent,)
        assert motion.way[0] == scene.things[scene.index(motion.agent)].place
        for start, end in zip(motion.way, motion.way[1:], strict=False):
            assert start != end and leg_is_clear(scene, start, end, ignore)
            assert all(0 <= v < WORLD.cells for v in end)


def test_no_caption_holds_a_task():
    clips = sample_clips(WORLD, Faults(), 150, rng(2))
    told = " ".join(clips.captions).lower()
    orders = {words(phrase)[0] for phrase in (GO, BESIDE, PUSH, TWO)}
    assert orders == {"go", "stop", "push"}
    assert not orders & set(words(told))
    tasks = {d.instruction for s in scenes(40, 2) for d in deeds(WORLD, s)}
    assert not any(re.sub(r"\.$", "", t).lower() in told for t in tasks)


def test_motions_of_tasks_are_captions_too():
    """The base knows how to do every deed, it only does not know what it is called."""
    generator = rng(3)
    kinds = set()
    for scene in scenes(150, 3):
        told = {narrate(scene, sample_motion(WORLD, scene, generator)) for _ in range(12)}
        kinds |= {d.kind for d in deeds(WORLD, scene) if narrate(scene, d.motion) in told}
    assert {"go", "beside", "push"} <= kinds


def test_styles_tell_the_same_motion_in_other_words():
    generator = rng(6)
    shown = {style: 0 for style in STYLES}
    for scene in scenes(150, 6):
        motion = sample_motion(WORLD, scene, generator)
        told = {style: narrate(scene, motion, style) for style in STYLES}
        assert all(read_narration(text, scene) == read_narration(told["steps"], scene) for text in told.values())
        assert "ring" not in told["steps"]
        for style in STYLES:
            shown[style] += "ring" in told[style]
    assert shown["landmarks"] == shown["both"] > 40


def test_styles_are_as_frequent_as_asked_for():
    def share(styles, pattern):
        texts = sample_clips(WORLD, NONE, 200, rng(7), styles).captions
        return np.mean([bool(re.search(pattern, t)) for t in texts])

    assert share((1.0, 0.0, 0.0), "ring") == 0
    assert share((0.0, 1.0, 0.0), "ring") > 0.4  # half of all motions lead to a ring
    both = "step[^,]* to (the|just)"  # in one leg
    assert share((0.0, 1.0, 0.0), both) == 0 < share((0.0, 0.0, 1.0), both)


# ---- With faults


def test_short_clips_stop_on_the_way():
    shares = []
    for _, sight, agent, legs, _ in made(short=1, short_travel=(0.5, 0.6)):
        start = sight.centre[0, agent] + legs[:-1].sum(0)
        shares.append(np.linalg.norm(sight.centre[-1, agent] - start) / np.linalg.norm(legs[-1]))
    assert 0.4 < min(shares) and max(shares) < 0.72
    assert np.mean(shares) == pytest.approx(0.55, abs=0.03)


def test_in_other_clips_another_agent_moves():
    others = 0
    for scene, sight, agent, _, pushed in made(other=1):
        way = way_of(sight)
        if not pushed and way[agent] < 0.2:
            others += any(way[scene.index(a.name)] > 0.5 for a in scene.agents)
    assert others > COUNT / 5  # wherever the lattice has room for it; a quarter in the mean


@pytest.mark.parametrize("fault", ["blink", "vanish"])
def test_what_blinks_comes_back_and_what_vanishes_does_not(fault):
    agents = 0
    for scene, sight, agent, _, _ in made(**{fault: 1}):
        gone = ~sight.seen
        solid = [n for n, t in enumerate(scene.things) if t.shape != "ring"]
        assert not gone[:2].any()
        assert gone[:, solid].any(0).sum() <= 1
        if fault == "blink":
            frames = np.flatnonzero(gone[:, solid].any(1))
            assert len(frames) <= 2 and all(np.diff(frames) == 1)
        elif gone[:, solid].any():
            first = gone.any(1).argmax()
            assert gone[first:, solid].any(1).all()  # for good
        agents += gone[:, agent].any()
    assert COUNT / 3 < agents < COUNT


def test_jumps_have_no_way_between():
    for _, sight, agent, legs, _ in made(jump=1):
        steps = np.linalg.norm(np.diff(sight.centre[:, agent], axis=0), axis=-1)
        assert steps.max() == pytest.approx(np.linalg.norm(legs.sum(0)), abs=0.25)
        assert np.sum(steps > 0.1) <= 1
        np.testing.assert_allclose(sight.centre[-1, agent] - sight.centre[0, agent], legs.sum(0), atol=0.25)


def test_faults_are_as_frequent_as_asked_for(monkeypatch):
    """Counted where they are drawn: how much of the way is made, and whether it is the named agent's."""
    seen = []
    draw = captions.trajectories

    def count(world, scene, motion, *, travel):
        seen.append((travel < 1.0, 0.45 <= travel <= 1.0))
        return draw(world, scene, motion, travel=travel)

    monkeypatch.setattr(captions, "trajectories", count)
    monkeypatch.setattr(captions, "render", lambda *_: None)
    assert len(sample_clips(WORLD, Faults(), 1500, rng(4)).captions) == len(seen) == 1500
    short, inside = np.mean(seen, axis=0)
    assert short == pytest.approx(0.45, abs=0.05) and inside == 1.0


# ---- The stream


def test_batches_are_a_function_of_seed_and_step():
    source = make_clips(world={"cells": 4, "size": 20, "frames": 5}, faults={"short": 0.5})
    clips, texts = source.batch(0, 3, 4)
    assert clips.shape == (4, 5, 20, 20, 3) and clips.dtype == np.uint8 and len(texts) == 4
    source.batch(0, 4, 2)
    again = source.batch(0, 3, 4)
    np.testing.assert_array_equal(clips, again[0])
    assert texts == again[1]
    for seed, step in ((1, 3), (0, 4)):
        other = source.batch(seed, step, 4)
        assert texts != other[1] and not np.array_equal(clips, other[0])
    assert make_clips(world={"crate": 0.0}, faults={}).world == World(crate=0.0)
