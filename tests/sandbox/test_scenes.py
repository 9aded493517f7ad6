"""Scene files: the same seed gives the same bytes, and no split ever sees a scene of another."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.sandbox.acting import WORLD, image_of, scenes
from world_distill.interfaces import Cases
from world_distill.sandbox import scenes as scene_files
from world_distill.sandbox.factories import make_benchmark
from world_distill.sandbox.scenes import STREAMS, draw_scenes, to_png, true_scene, write_scenes
from world_distill.sandbox.tasks import deeds
from world_distill.sandbox.vision import read_scene
from world_distill.sandbox.world import Scene, Thing, World


def picture(scene):
    """What identifies a scene: its things, in whatever order."""
    return frozenset(scene.things)


def test_splits_share_no_scene_whatever_the_seed():
    seen = {
        split: {picture(s) for seed in range(3) for s in draw_scenes(WORLD, 150, split=split, seed=seed)}
        for split in STREAMS
    }
    assert min(map(len, seen.values())) > 400
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_splits_share_no_scene_even_when_there_are_few():
    """In a small world the streams meet again and again, also with the things in another order."""
    world = World(cells=4, size=16, agents=(1, 1), rings=(1, 1), crate=0.0)
    seen = {s: {picture(scene) for scene in draw_scenes(world, 700, split=s, seed=0)} for s in STREAMS}
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    two = World(cells=4, size=16, agents=(2, 2), rings=(2, 2), crate=0.0)
    for scene in scenes(20, 0, two):
        turned = Scene((*scene.rings[::-1], *scene.agents[::-1]))
        owners = {split for split in STREAMS for s in (scene, turned) if belongs(s, split)}
        assert len(owners) == 1


def belongs(scene, split):
    return scene_files._owner(scene_files._to_json(scene)) == split


def test_scenes_differ_and_have_something_to_do():
    drawn = draw_scenes(WORLD, 200, split="train", seed=0)
    assert len({picture(s) for s in drawn}) == len(drawn) == 200
    assert all(deeds(WORLD, s) for s in drawn)


def test_scenes_follow_seed_and_split():
    first = draw_scenes(WORLD, 30, split="test", seed=1)
    assert draw_scenes(WORLD, 30, split="test", seed=1) == first
    assert draw_scenes(WORLD, 10, split="test", seed=1) == first[:10]  # more scenes are more of the same
    assert not set(map(picture, draw_scenes(WORLD, 30, split="test", seed=2))) & set(map(picture, first))


def test_what_cannot_be_drawn_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'dev'; there are train, validation, test"):
        draw_scenes(WORLD, 1, split="dev", seed=0)
    known = draw_scenes(WORLD, 2, split="train", seed=0)
    monkeypatch.setattr(scene_files, "sample_scene", lambda _, rng: known[rng.integers(2)])
    with pytest.raises(ValueError, match="found only 2 of 3 different scenes"):
        draw_scenes(WORLD, 3, split="train", seed=0)


# ---- Files


def test_files_are_the_same_bytes_each_time(tmp_path):
    paths = write_scenes(tmp_path / "a", 5, split="train", seed=0, world=WORLD)
    again = write_scenes(str(tmp_path / "b"), 5, split="train", seed=0, world={"cells": 5, "size": 30, "frames": 9})
    assert [p.name for p in paths] == [f"scene-0000{i}.png" for i in range(5)]
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [p.name for p in paths]  # nothing half-written
    assert [p.read_bytes() for p in write_scenes(tmp_path / "c", 5, split="train", seed=1, world=WORLD)] != [
        p.read_bytes() for p in paths
    ]


def test_scenes_of_another_seed_are_refused(tmp_path):
    before = [p.read_bytes() for p in write_scenes(tmp_path, 2, split="train", seed=0, world=WORLD)]
    with pytest.raises(ValueError, match=r"scene-00000\.png holds another scene"):
        write_scenes(tmp_path, 2, split="train", seed=1, world=WORLD)
    assert [p.read_bytes() for p in sorted(tmp_path.iterdir())] == before


def test_drawing_again_keeps_what_is_there(tmp_path):
    first = write_scenes(tmp_path, 3, split="train", seed=0, world=WORLD)
    before = [p.stat().st_mtime_ns for p in first]
    more = write_scenes(tmp_path, 5, split="train", seed=0, world=WORLD)
    assert more[:3] == first and [p.stat().st_mtime_ns for p in first] == before
    assert [true_scene(p.read_bytes()) for p in more] == draw_scenes(WORLD, 5, split="train", seed=0)


def test_a_png_carries_image_and_layout():
    for scene in scenes(20, 0):
        png = to_png(WORLD, scene)
        assert true_scene(png) == scene
        with Image.open(io.BytesIO(png)) as image:
            assert image.size == (30, 30) and image.mode == "RGB"
            pixels = np.array(image)
        np.testing.assert_array_equal(pixels, image_of(scene))
        assert picture(read_scene(WORLD, pixels)) == picture(scene)


def test_a_png_without_layout_says_how_to_get_one():
    buffer = io.BytesIO()
    Image.fromarray(image_of(scenes(1, 0)[0])).save(buffer, "PNG")
    with pytest.raises(ValueError, match="carries no sandbox layout.*draw scenes with `scenes`"):
        true_scene(buffer.getvalue())
    clip = np.zeros((1, 9, 30, 30, 3), np.uint8)
    with pytest.raises(ValueError, match="no sandbox layout"):
        make_benchmark(world={}).check(
            clip, Cases(["0"], ["[red disc]: Go to the blue ring."], ["red disc"], [buffer.getvalue()])
        )


def test_the_layout_is_plain_json():
    scene = Scene((Thing("ring", "red", (0, 1)), Thing("disc", "blue", (3, 4))))
    with Image.open(io.BytesIO(to_png(WORLD, scene))) as image:
        assert json.loads(image.text["scene"]) == [
            {"shape": "ring", "colour": "red", "place": [0, 1]},
            {"shape": "disc", "colour": "blue", "place": [3, 4]},
        ]
