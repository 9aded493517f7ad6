"""Tasks: complete, feasible, told apart by their words; narrations say what the motion is and nothing of the task."""

import numpy as np
import pytest

from tests.sandbox.acting import WORLD, act, deeds_by_kind, image_of, read_narration, scenes, some_deeds
from world_distill.sandbox import checker
from world_distill.sandbox.narration import narrate, words
from world_distill.sandbox.oracle import Oracle
from world_distill.sandbox.tasks import KINDS, deeds
from world_distill.sandbox.world import Scene, Thing, World, leg_is_clear

# ---- Deeds


def test_every_kind_occurs_and_can_be_asked_for():
    counts = dict.fromkeys(KINDS, 0)
    for scene in scenes(60, 0):
        every = deeds(WORLD, scene)
        for deed in every:
            counts[deed.kind] += 1
        for kind in KINDS:
            assert deeds(WORLD, scene, (kind,)) == tuple(d for d in every if d.kind == kind)
    assert min(counts.values()) > 10, counts


def test_tasks_of_a_scene_differ():
    for scene in scenes(60, 1):
        tasks = [d.task for d in deeds(WORLD, scene)]
        assert len(set(tasks)) == len(tasks)


def test_the_checker_reads_the_same_goal_from_the_words():
    """The words are parsed by a file of its own, which knows the layout only."""
    for scene, deed in some_deeds(30, 0):
        goal = checker.parse_task(scene, deed.task)
        assert (goal.agent, goal.thing, goal.place, goal.via) == (deed.agent, *deed.goal, deed.via)


def test_deeds_need_a_clear_way_and_no_more():
    for scene in scenes(60, 2):
        for kind in ("go", "beside"):
            found = {(d.agent, d.goal[1]): d for d in deeds(WORLD, scene, (kind,))}
            for (name, place), deed in found.items():
                ignored = (name, *(r.name for r in scene.rings)) if kind == "beside" else (name,)
                assert leg_is_clear(scene, deed.motion.way[0], place, ignored)
        gone = {(d.agent, d.goal[1]) for d in deeds(WORLD, scene, ("go",))}
        for agent in scene.agents:
            for ring in scene.rings:
                assert ((agent.name, ring.place) in gone) == leg_is_clear(scene, agent.place, ring.place, (agent.name,))


def test_no_deed_is_done_before_it_begins():
    """The goal is somewhere else at first: standing still does nothing."""
    for scene, deed in some_deeds(30, 1):
        it = act(scene, deed)
        assert np.linalg.norm(it.track[0, it.goal] - np.add(deed.goal[1], 0.5)) >= 1
        assert np.linalg.norm(np.subtract(*deed.motion.way[:2])) >= 1


def test_a_push_needs_agent_crate_and_ring_in_line():
    ring, disc = Thing("ring", "red", (4, 2)), Thing("disc", "blue", (0, 2))

    def pushes(*things):
        return [d.task for d in deeds(WORLD, Scene(things), ("push",))]

    assert pushes(ring, Thing("crate", "brown", (2, 2)), disc) == [
        "[blue disc]: Push the brown crate onto the red ring."
    ]
    assert not pushes(ring, Thing("crate", "brown", (2, 1)), disc)  # beside the line
    assert not pushes(Thing("ring", "red", (1, 2)), Thing("crate", "brown", (2, 2)), disc)  # between the two
    assert not pushes(ring, Thing("crate", "brown", (2, 2)), disc, Thing("square", "green", (3, 2)))  # in the way
    assert not pushes(ring, Thing("crate", "brown", (2, 2)), Thing("disc", "blue", (1, 1)))  # on the diagonal
    assert not pushes(ring, disc)


def test_beside_names_the_side_as_it_is_seen():
    things = Thing("ring", "red", (2, 2)), Thing("disc", "blue", (0, 0)), Thing("square", "green", (4, 4))
    goals = {d.task: d.goal[1] for d in deeds(WORLD, Scene(things), ("beside",))}
    assert goals == {
        "[blue disc]: Stop just left of the red ring.": (1, 2),
        "[green square]: Stop just right of the red ring.": (3, 2),
        "[blue disc]: Stop just above the red ring.": (2, 1),
        "[green square]: Stop just below the red ring.": (2, 3),
    }
    # Nobody goes where somebody stands, out of the world, or over the ring to its other side.
    corner = Scene((Thing("ring", "red", (4, 2)), Thing("disc", "blue", (0, 2)), Thing("square", "green", (4, 1))))
    assert {d.goal for d in deeds(WORLD, corner, ("beside",)) if d.agent == "blue disc"} == {
        ("blue disc", (3, 2)),
        ("blue disc", (4, 3)),
    }


# ---- Narration


def test_narrations_say_what_moves_where():
    for scene, deed in some_deeds(30, 2):
        agent, legs, pushed = read_narration(narrate(scene, deed.motion), scene)
        way = [list(p) for p in deed.motion.way]
        assert agent == deed.agent
        assert legs == [np.subtract(b, a).tolist() for a, b in zip(way, way[1:], strict=False)]
        if deed.kind == "push":
            thing, steps = pushed
            assert thing == deed.goal[0]
            assert np.add(scene.crate.place, steps).tolist() == list(deed.goal[1])
        else:
            assert pushed is None


def test_numbers_suffice_for_larger_worlds():
    world = World(cells=9, size=54)
    longest = 0
    for scene in scenes(40, 3, world):
        for deed in deeds(world, scene, ("go",)):
            _, legs, _ = read_narration(narrate(scene, deed.motion), scene)
            assert np.add(deed.motion.way[0], legs[0]).tolist() == list(deed.goal[1])
            longest = max(longest, *np.abs(legs[0]))
    assert longest == 8


def test_narrations_never_give_orders():
    """The solution tells what is seen, and no order that only tasks give."""
    told, asked = set(), set()
    for pairs in deeds_by_kind(30, 3).values():
        for scene, deed in pairs:
            narration = narrate(scene, deed.motion)
            told |= set(words(narration))
            asked |= set(words(deed.instruction))
            assert deed.instruction.lower().rstrip(".") not in narration.lower()
    assert {"go", "stop", "push"} <= asked - told


# ---- The annotator


@pytest.fixture(scope="module")
def oracle():
    return Oracle(WORLD)


def test_pairs_are_feasible_different_and_no_more_than_asked_for(oracle):
    full = 0
    for seed, scene in enumerate(scenes(40, 4)):
        image = image_of(scene)
        known = {d.task: d for d in deeds(WORLD, scene)}
        for most in (0, 1, 5, 1000):
            pairs = oracle.annotate(image, max_pairs=most, seed=seed)
            assert len(pairs) == min(most, len(known))
            assert len({p.task for p in pairs}) == len(pairs)
            for pair in pairs:
                deed = known[pair.task]
                assert (pair.agent, pair.kind) == (deed.agent, deed.kind)
                assert pair.solution == narrate(scene, deed.motion)
                assert pair.task.startswith(f"[{pair.agent}]: ") and pair.task.endswith(".")
        full += len(pairs) == len(known) > 5
    assert full > 30


def test_annotation_follows_image_and_seed(oracle):
    images = [image_of(s) for s in scenes(6, 5)]
    first = [oracle.annotate(i, max_pairs=4, seed=0) for i in images]
    assert first == [Oracle(WORLD).annotate(i.copy(), max_pairs=4, seed=0) for i in images]
    assert first != [oracle.annotate(i, max_pairs=4, seed=1) for i in images]
    # Kinds take turns, so that no kind is drowned by one that has more tasks.
    for image in images:
        kinds = [p.kind for p in oracle.annotate(image, max_pairs=3, seed=0)]
        possible = {p.kind for p in oracle.annotate(image, max_pairs=1000, seed=0)}
        assert len(set(kinds)) == min(3, len(possible))


def test_kinds_may_be_restricted():
    images = [image_of(s) for s in scenes(20, 6)]
    for kinds in (("go",), ("push", "sequence")):
        oracle = Oracle(WORLD, kinds=kinds)
        seen = {p.kind for i in images for p in oracle.annotate(i, max_pairs=1000, seed=0)}
        assert seen == set(kinds)
    for wrong in (("fly",), ("go", "fly"), ()):
        with pytest.raises(ValueError, match="unknown kinds of task.*go, beside, push, sequence"):
            Oracle(WORLD, kinds=wrong)


def test_a_scene_with_nothing_to_do_has_no_pairs(oracle):
    alone = Scene((Thing("disc", "red", (1, 1)), Thing("square", "blue", (3, 3))))
    assert oracle.annotate(image_of(alone), max_pairs=5, seed=0) == []


def test_annotating_an_image_of_another_size_is_an_error(oracle):
    with pytest.raises(ValueError, match=r"\(40, 40, 3\)"):
        oracle.annotate(np.zeros((40, 40, 3), np.uint8), max_pairs=1, seed=0)
