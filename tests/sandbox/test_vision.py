"""What is seen in an image or a clip is what was drawn there."""

import numpy as np
import pytest

from tests.sandbox.acting import WORLD, act, image_of, scenes, some_deeds
from world_distill.sandbox.tasks import deeds
from world_distill.sandbox.vision import coverage, read_scene, watch
from world_distill.sandbox.world import COLOURS, FLOOR, Scene, Thing, World, floor, render


@pytest.mark.parametrize(
    "world, count",
    [
        (WORLD, 400),
        (World(agents=(1, 3), rings=(1, 3), crate=1.0), 100),
        (World(cells=4, size=16, frames=5), 100),
        (World(cells=6, size=60, agents=(3, 3), rings=(3, 3)), 50),
    ],
    ids=["default", "crowded", "small", "large"],
)
def test_every_scene_is_read_as_it_is(world, count):
    for scene in scenes(count, 0, world):
        read = read_scene(world, image_of(scene, world))
        assert set(read.things) == set(scene.things)
        # In drawing order, so that drawing it again gives the same image.
        np.testing.assert_array_equal(image_of(read, world), image_of(scene, world))
        assert {d.task for d in deeds(world, read)} == {d.task for d in deeds(world, scene)}


def test_scenes_are_read_through_noise():
    rng = np.random.default_rng(0)
    for scene in scenes(60, 1):
        noisy = np.clip(image_of(scene) + rng.normal(0, 6, (30, 30, 3)), 0, 255).astype(np.uint8)
        assert set(read_scene(WORLD, noisy).things) == set(scene.things)


def test_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"shape \(20, 30, 3\), this world's is \(30, 30, 3\)"):
        read_scene(WORLD, np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(ValueError, match="shows no things"):
        read_scene(WORLD, np.round(floor(WORLD)).astype(np.uint8))


def test_coverage_is_the_share_of_a_pixel():
    colours = list(COLOURS)
    for n, colour in enumerate(colours):
        for share in (0.0, 0.3, 0.7, 1.0):
            frame = np.round(share * np.array(COLOURS[colour]) + (1 - share) * floor(WORLD)).astype(np.uint8)
            cover = coverage(WORLD, frame, colours)
            assert cover.shape == (7, 30, 30)
            np.testing.assert_allclose(cover[n], share, atol=0.04)
            assert not np.delete(cover, n, axis=0).any()


def test_every_thing_is_found_in_every_frame():
    """Also where the mix of two things has the colour of a third."""
    for scene, deed in some_deeds(25, 4):
        it = act(scene, deed)
        sight = watch(WORLD, scene, it.clip)
        assert sight.centre.shape == (WORLD.frames, len(scene.things), 2) and sight.mass.shape == sight.seen.shape
        solid = [n for n, t in enumerate(scene.things) if t.shape != "ring"]
        np.testing.assert_allclose(sight.centre[:, solid], it.track[:, solid], atol=0.2)
        assert sight.seen[:, solid].all()


def test_brown_upon_cyan_hardly_moves_green():
    """A crate on a cyan ring has a rim of greenish pixels; they move the green disc beside it by less than a pixel."""
    things = (Thing("ring", "cyan", (2, 2)), Thing("crate", "brown", (2, 2)), Thing("disc", "green", (1, 2)))
    scene = Scene((things[0], Thing("crate", "brown", (4, 4)), things[2]))
    track = np.repeat([[t.place for t in scene.things]], 3, axis=0) + 0.5
    track[1:, 1] = 2.5
    clip = render(WORLD, [scene.things], [track])[0]
    greenish = coverage(WORLD, clip, ["cyan", "brown", "green"])[:, 2].sum((1, 2))
    assert greenish[2] > 1.2 * greenish[0]  # the pixels are there
    sight = watch(WORLD, scene, clip)
    pixel = WORLD.cells / WORLD.size
    np.testing.assert_allclose(sight.centre[:, 2], track[:, 2], atol=pixel)


def test_what_is_gone_is_not_seen_and_stays_where_it_was():
    for scene, deed in some_deeds(5, 5):
        it = act(scene, deed)
        it.opacity[4:6, it.agent] = 0.0
        it.opacity[6, it.agent] = 0.15
        sight = watch(WORLD, scene, it.clip)
        assert sight.seen[:, it.agent].tolist() == [True] * 4 + [False] * 3 + [True] * 2
        np.testing.assert_allclose(sight.centre[4:7, it.agent], sight.centre[[3] * 3, it.agent])
        np.testing.assert_allclose(sight.centre[7, it.agent], it.track[7, it.agent], atol=0.2)


def test_scattered_pixels_move_nothing():
    scene = Scene((Thing("ring", "red", (0, 4)), Thing("square", "blue", (1, 1))))
    clip = np.repeat(image_of(scene)[None], 3, axis=0)
    ys, xs = np.random.default_rng(0).integers(15, 30, (2, 12))
    clip[1, ys, xs] = COLOURS["blue"]
    clip[2, 29, 15:] = COLOURS["blue"]  # a line
    sight = watch(WORLD, scene, clip)
    np.testing.assert_allclose(sight.centre[:, 1], [[1.5, 1.5]] * 3, atol=0.02)
    np.testing.assert_allclose(sight.mass[1:, 1], sight.mass[0, 1], rtol=0.02)


def test_an_empty_clip_shows_nothing():
    scene = scenes(1, 0)[0]
    clip = np.repeat(image_of(scene)[None], 4, axis=0)
    clip[1:] = np.round(floor(WORLD))
    sight = watch(WORLD, scene, clip)
    assert sight.seen[0].all() and not sight.seen[1:].any()
    np.testing.assert_array_equal(sight.centre[1:], np.repeat(sight.centre[:1], 3, axis=0))
    assert np.all(np.array(FLOOR) > 200)
