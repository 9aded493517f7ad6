"""The world: what is sampled, what is drawn, and how things move."""

import numpy as np
import pytest

from tests.sandbox.acting import WORLD, image_of, scenes, some_deeds
from world_distill.sandbox.tasks import deeds
from world_distill.sandbox.world import (
    AGENT_SHAPES,
    COLOURS,
    FLOOR,
    SHAPES,
    Motion,
    Scene,
    Thing,
    World,
    distance_to_leg,
    floor,
    leg_is_clear,
    render,
    trajectories,
)

# ---- Scenes


@pytest.mark.parametrize(
    "sizes",
    [
        {"cells": 3},
        {"size": 19},
        {"frames": 3},
        {"frames": 8},
        {"shapes": ("disc", "star")},
        {"shapes": ("disc", "disc")},
        {"agents": (2, 4), "rings": (2, 3)},
    ],
    ids=str,
)
def test_worlds_that_cannot_be_are_refused(sizes):
    with pytest.raises(ValueError, match=r"World (needs|has)"):
        World(**sizes)


@pytest.mark.parametrize("world", [WORLD, World(agents=(1, 3), rings=(1, 3), crate=1.0), World(cells=4, crate=0.0)])
def test_scenes_are_what_the_world_says(world):
    counts = set()
    for scene in scenes(150, 0, world):
        assert len({t.place for t in scene.things}) == len({t.colour for t in scene.things}) == len(scene.things)
        assert all(
            0 <= v < world.cells and type(v) is int for t in scene.things for v in t.place if world.crate < 1
        ) or (all(0 <= v < world.cells for t in scene.things for v in t.place))
        assert len({a.shape for a in scene.agents}) == len(scene.agents)
        shapes = [("ring", "crate").index(t.shape) if t.shape in ("ring", "crate") else 2 for t in scene.things]
        assert shapes == sorted(shapes)  # drawing order: agents stand on rings, not under them
        counts.add((len(scene.agents), len(scene.rings), scene.crate is not None))
    sizes = [range(low, high + 1) for low, high in (world.agents, world.rings)]
    crates = {0.0: [False], 1.0: [True]}.get(world.crate, [False, True])
    assert counts == {(a, r, c) for a in sizes[0] for r in sizes[1] for c in crates}


def test_crates_can_be_pushed_onto_a_ring():
    found = [any(d.kind == "push" for d in deeds(WORLD, s)) for s in scenes(200, 1) if s.crate is not None]
    assert np.mean(found) > 0.9
    assert 0.25 < len(found) / 200 < 0.45  # World.crate = 0.35


def test_scenes_follow_their_seed():
    assert scenes(5, 3) == scenes(5, 3) != scenes(5, 4)
    first = scenes(1, 3)[0]
    assert first.things[first.index(first.agents[0].name)] == first.agents[0]


# ---- Geometry


def test_distance_to_leg_against_many_points():
    rng = np.random.default_rng(0)
    for _ in range(50):
        start, end, point = rng.integers(0, 6, (3, 2)).tolist()
        along = np.linspace(0, 1, 2001)[:, None]
        expected = np.linalg.norm(np.array(start) + along * np.subtract(end, start) - point, axis=-1).min()
        assert distance_to_leg(start, end, point) == pytest.approx(expected, abs=1e-3)


def test_a_leg_is_clear_of_all_but_rings_at_its_ends():
    scene = Scene((Thing("ring", "red", (2, 0)), Thing("disc", "blue", (0, 0)), Thing("square", "green", (4, 4))))
    assert leg_is_clear(scene, (0, 0), (2, 0), ignore=("blue disc",))
    assert not leg_is_clear(scene, (0, 0), (4, 0), ignore=("blue disc",))  # over the ring
    assert not leg_is_clear(scene, (0, 0), (4, 4), ignore=("blue disc",))  # into the square
    assert not leg_is_clear(scene, (0, 0), (2, 0), ignore=())  # who moves has to be named
    assert leg_is_clear(scene, (0, 1), (4, 1), ignore=("blue disc",))  # a whole place beside the ring


# ---- Motions


def test_motions_end_where_the_task_wants_them():
    for scene, deed in some_deeds(25, 0):
        track = trajectories(WORLD, scene, deed.motion)
        assert track.shape == (WORLD.frames, len(scene.things), 2)
        np.testing.assert_allclose(track[0], [np.add(t.place, 0.5) for t in scene.things])
        np.testing.assert_allclose(track[-1, scene.index(deed.goal[0])], np.add(deed.goal[1], 0.5))
        agent = scene.index(deed.agent)
        if deed.via is not None:
            np.testing.assert_allclose(track[WORLD.frames // 2, agent], np.add(deed.via, 0.5))
        # Nothing moves but the agent and, when pushed, the crate.
        moving = {agent, scene.index(deed.goal[0])}
        for n in set(range(len(scene.things))) - moving:
            assert np.ptp(track[:, n], axis=0).max() == 0
        # Straight legs at constant speed.
        legs = len(deed.motion.way) - 1
        steps = np.diff(track[:, agent], axis=0).reshape(legs, -1, 2)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], steps.shape), atol=1e-9)


def test_things_keep_their_distance_while_they_move():
    for scene, deed in some_deeds(25, 0):
        track = trajectories(WORLD, scene, deed.motion)
        solid = [n for n, t in enumerate(scene.things) if t.shape != "ring"]
        for i in solid:
            for j in solid:
                if i < j:
                    gap = np.linalg.norm(track[:, i] - track[:, j], axis=-1).min()
                    assert gap >= 0.95 - 1e-9, (deed, scene)


def test_the_crate_moves_only_when_it_is_touched():
    for scene, deed in some_deeds(25, 0):
        if deed.kind != "push":
            continue
        track = trajectories(WORLD, scene, deed.motion)
        agent, crate = track[:, scene.index(deed.agent)], track[:, scene.index(scene.crate.name)]
        gap = np.linalg.norm(agent - crate, axis=-1)
        moves = np.linalg.norm(np.diff(crate, axis=0), axis=-1) > 1e-9
        assert moves.any()
        np.testing.assert_allclose(gap[1:][moves], 1.0)
        assert gap.min() >= 1 - 1e-9
        assert not (~moves & (gap[1:] < 1 + 1e-9) & (gap[:-1] < 1 + 1e-9)).any()


def test_stopping_short_shortens_the_last_leg():
    for scene, deed in some_deeds(10, 1):
        agent = scene.index(deed.agent)
        for travel in (0.0, 0.4, 1.0):
            end = trajectories(WORLD, scene, deed.motion, travel=travel)[-1, agent]
            before, last = (np.add(p, 0.5) for p in deed.motion.way[-2:])
            np.testing.assert_allclose(end, before + travel * (last - before))


def test_without_a_motion_nothing_moves():
    scene = scenes(1, 5)[0]
    track = trajectories(WORLD, scene, None)
    assert np.ptp(track, axis=0).max() == 0 and len(track) == WORLD.frames


# ---- Drawing


def inside(shape, x, y):
    """Whether a point is in the thing: the definition, without distances."""
    if shape == "disc":
        return x**2 + y**2 <= 0.40**2
    if shape == "ring":
        return (0.36**2 <= x**2 + y**2) & (x**2 + y**2 <= 0.56**2)
    if shape in ("square", "crate"):
        half = {"square": 0.34, "crate": 0.42}[shape]
        return (abs(x) <= half) & (abs(y) <= half)
    if shape == "diamond":
        return abs(x) + abs(y) <= 0.56
    # Triangle: base at the bottom, tip at the top.
    return (y <= 0.32) & (0.87 * abs(x) <= 0.5 * (y - 0.30) + 0.365)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centre", [(2.5, 2.5), (1.27, 3.64)])
def test_drawing_covers_what_the_shape_covers(shape, centre):
    world = World(size=60)
    image = render(world, [(Thing(shape, "blue", (0, 0)),)], [np.array([[centre]])])[0, 0].astype(float)
    ground = floor(world).astype(float)
    line = np.array(COLOURS["blue"]) - ground
    cover = ((image - ground) * line).sum(-1) / np.square(line).sum(-1)
    fine = (np.arange(60 * 16) + 0.5) / 16 / 12
    x, y = np.meshgrid(fine - centre[0], fine - centre[1])
    expected = inside(shape, x, y).reshape(60, 16, 60, 16).mean((1, 3))
    assert np.abs(cover - expected).max() < 0.3  # at a sharp corner
    assert np.abs(cover - expected).mean() < 0.002
    assert cover.sum() == pytest.approx(expected.sum(), rel=0.05)


def test_drawing_is_smooth_in_the_position():
    """A step of a tenth of a pixel moves the centre of mass by a tenth of a pixel, and keeps the mass."""
    x = np.linspace(1.5, 2.5, 61)
    for shape in AGENT_SHAPES:
        track = np.stack([x, np.full_like(x, 2.2)], axis=-1)[:, None]
        clip = render(WORLD, [(Thing(shape, "red", (0, 0)),)], [track])[0].astype(float)
        line = np.array(COLOURS["red"]) - floor(WORLD)
        mass = ((clip - floor(WORLD)) * line).sum(-1) / np.square(line).sum(-1)
        seen = (mass.sum(1) * (np.arange(30) + 0.5)).sum(-1) / mass.sum((1, 2)) / 6
        np.testing.assert_allclose(seen, x, atol=0.02)
        assert np.ptp(mass.sum((1, 2))) < 0.08 * mass.sum((1, 2)).mean()


def test_things_that_stand_still_are_drawn_like_things_that_move():
    """Drawing takes a short cut for them."""
    for scene, deed in some_deeds(2, 2):
        track = trajectories(WORLD, scene, deed.motion)
        clip = render(WORLD, [scene.things], [track])[0]
        for f in range(WORLD.frames):
            np.testing.assert_array_equal(render(WORLD, [scene.things], [track[f : f + 1]])[0, 0], clip[f])
        np.testing.assert_array_equal(clip[0], image_of(scene))


def test_clips_of_a_batch_do_not_mix():
    pairs = some_deeds(1, 3)
    tracks = [trajectories(WORLD, s, d.motion) for s, d in pairs]
    fading = [np.linspace(1, 0, WORLD.frames)[:, None] * np.ones((1, len(s.things))) for s, _ in pairs]
    together = render(WORLD, [s.things for s, _ in pairs], tracks, fading)
    assert together.dtype == np.uint8 and together.shape == (4, WORLD.frames, 30, 30, 3)
    for i, (scene, _) in enumerate(pairs):
        np.testing.assert_array_equal(render(WORLD, [scene.things], [tracks[i]], [fading[i]])[0], together[i])


def test_opacity_and_order():
    place = np.full((2, 2, 2), 2.5)
    things = (Thing("crate", "brown", (2, 2)), Thing("disc", "red", (2, 2)))
    clip = render(WORLD, [things], [place], [np.array([[1.0, 1.0], [0.0, 0.5]])])[0]
    np.testing.assert_array_equal(clip[0, 15, 15], COLOURS["red"])  # the later thing is on top
    np.testing.assert_allclose(clip[1, 15, 15], np.mean([COLOURS["red"], FLOOR[0]], axis=0), atol=1)
    empty = render(WORLD, [things], [place], [np.zeros((2, 2))])[0]
    np.testing.assert_array_equal(empty[0], np.round(floor(WORLD)))
    # Things may leave the picture.
    away = render(WORLD, [things], [np.full((1, 2, 2), -3.0)])[0, 0]
    np.testing.assert_array_equal(away, empty[0])


@pytest.mark.parametrize("world", [WORLD, World(cells=5, size=32), World(cells=4, size=18)])
def test_the_floor_is_a_checkerboard_of_places(world):
    image = floor(world)
    assert image.shape == (world.size, world.size, 3) and not image.flags.writeable
    cell = world.size / world.cells
    for i in range(world.cells):
        for j in range(world.cells):
            pixel = image[int((j + 0.5) * cell), int((i + 0.5) * cell)]
            np.testing.assert_allclose(pixel, FLOOR[(i + j) % 2], atol=1e-3)
    odd = sum((i + j) % 2 for i in range(world.cells) for j in range(world.cells)) / world.cells**2
    np.testing.assert_allclose(
        image.mean((0, 1)), np.add(np.multiply(odd, FLOOR[1]), np.multiply(1 - odd, FLOOR[0])), rtol=1e-5
    )


def test_colours_can_be_told_apart():
    """Each from each, and from the floor, also where it is mixed with the floor."""
    line = {c: np.array(v, float) - np.mean(FLOOR, axis=0) for c, v in COLOURS.items()}
    for a in line:
        assert np.linalg.norm(line[a]) > 150
        for b in line:
            if a != b:
                along = line[a] @ line[b] / (line[b] @ line[b])
                assert np.linalg.norm(line[a] - along * line[b]) > 60, (a, b)


def test_a_push_is_a_motion_of_agent_and_crate():
    scene = Scene((Thing("ring", "red", (4, 1)), Thing("crate", "brown", (2, 1)), Thing("disc", "blue", (0, 1))))
    track = trajectories(WORLD, scene, Motion("blue disc", ((0, 1), (3, 1)), pushes=True))
    np.testing.assert_allclose(track[:, 2, 0], 0.5 + np.arange(9) * 3 / 8)
    np.testing.assert_allclose(track[:, 1, 0], np.maximum(2.5, track[:, 2, 0] + 1))
    short = trajectories(WORLD, scene, Motion("blue disc", ((0, 1), (3, 1)), pushes=True), travel=1 / 3)
    np.testing.assert_allclose(short[:, 1], np.broadcast_to([2.5, 1.5], (9, 2)))  # the crate is not reached
