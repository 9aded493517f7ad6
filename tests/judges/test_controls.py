"""Negative controls: what each shows, exactly, and what is left out."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.judges.controlled import FRAMES, RUBRIC, Judge, moving, shown
from world_distill.judges.ask import judge_clips
from world_distill.judges.controls import (
    CONTROLS,
    INSTRUCTION,
    Shown,
    is_control,
    label,
    make_controls,
    paint,
    still,
    swapped,
)  # fmt: skip
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.kept_clips import KeptClips, judged_clips


def test_each_control_shows_what_it_says():
    some = shown()
    made = {name: make_controls(name, some) for name in CONTROLS}
    assert list(made) == ["still", "other", "backwards", "swapped", "done", "yes", "instruction"]
    for i, one in enumerate(some):
        assert np.array_equal(made["still"][i].clip, np.stack([one.clip[0]] * FRAMES))
        assert np.array_equal(made["other"][i].clip, some[(i + 1) % len(some)].clip)
        assert np.array_equal(made["backwards"][i].clip, one.clip[::-1])
        assert np.array_equal(made["instruction"][i].clip, made["still"][i].clip)
        mixed = made["swapped"][i].clip
        assert np.array_equal(mixed[[0, -1]], one.clip[[0, -1]]) and not np.array_equal(mixed, one.clip)
        assert sorted(f.tobytes() for f in mixed) == sorted(f.tobytes() for f in one.clip)
        for word in ("done", "yes"):
            clip = made[word][i].clip
            assert np.array_equal(clip[0], one.clip[0])  # the scene stays
            assert (clip[1:] == clip[1]).all() and not np.array_equal(clip[1], clip[0])
        for name in CONTROLS:
            control = made[name][i]
            assert (control.agent, control.record) == (one.agent, one.record)
            assert control.task == (f"{one.task} {INSTRUCTION}" if name == "instruction" else one.task)


def test_what_is_no_control_is_left_out():
    alike = [Shown(moving(1, seed), "[square]: Go right.", "square") for seed in range(2)]
    assert make_controls("other", alike) == [None, None]  # there is no other task
    stays = [Shown(moving(0), "[square]: Go right.", "square")]
    for name in ("still", "backwards", "swapped"):
        assert make_controls(name, stays) == [None]  # it would be the clip itself
    assert make_controls("instruction", stays) != [None]  # another task, if the same clip
    small = [Shown(np.zeros((3, 24, 32, 3), np.uint8), "t", "a")]
    assert make_controls("done", small) == [None]  # nobody could read it
    two = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert make_controls("swapped", [Shown(two, "t", "a")]) == [None]


@pytest.mark.parametrize("count", range(4, 60))
def test_frames_are_in_another_order_at_every_length(count):
    clip = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 1, 1, 3), np.uint8)
    order = swapped(clip)[:, 0, 0, 0].tolist()
    assert order[0] == 0 and order[-1] == count - 1 and sorted(order) == list(range(count)) and order != sorted(order)


def written(text, height, width):
    """How much of each pixel the letters of a text would cover."""
    left, top, right, bottom = ImageFont.load_default(200).getbbox(text)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text, 255, ImageFont.load_default(200))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), float).ravel()


@pytest.mark.parametrize("size", [(48, 48), (48, 96), (480, 832)])
@pytest.mark.parametrize("ground", [0, 90, 140, 255])
@pytest.mark.parametrize("text", ["DONE", "yes"])
def test_painted_text_can_be_read(size, ground, text):
    clip = np.full((2, *size, 3), ground, np.uint8)
    frame = paint(clip, text)[1].astype(int)
    ink = 0 if ground > 127 else 255
    assert abs(ink - ground) > 100  # of 255
    letters = np.abs(frame - ink).max(-1) < 60
    rows, columns = (np.flatnonzero(letters.any(axis)) for axis in (1, 0))
    box = letters[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.shape[1] > 0.5 * size[1] or box.shape[0] > 0.25 * size[0]
    words = {word: np.corrcoef(written(word, *box.shape), box.ravel())[0, 1] for word in ("DONE", "yes", "no", "FAIL")}
    right = words.pop(text)
    assert right > 0.2 + max(words.values()), (right, words)


def test_controls_are_cached_apart_and_none_is_kept(tmp_path):
    some, judge = shown(), Judge()
    cache = JudgmentCache(tmp_path / "c", keep=KeptClips(tmp_path / "kept"))
    for control in ("", "other", "still"):
        rows = some if not control else make_controls(control, some)
        clips, tasks, agents = (np.stack([r.clip for r in rows]), [r.task for r in rows], [r.agent for r in rows])
        judge_clips(judge, cache, clips, tasks, agents, RUBRIC, ["task"], control=control)
    names = [entry.about.question for entry in cache.entries()]
    assert [names.count(n) for n in ("task", "task (other)", "task (still)")] == [len(some)] * 3
    kept = KeptClips(tmp_path / "kept")
    assert len(kept.digests()) == len(some)
    found = judged_clips(cache, kept)
    assert sorted(task for _, task, _ in found) == sorted(one.task for one in some)  # `other` has kept clips, too
    assert all(entry.about.question == "task" for entries in found.values() for entry in entries)
    assert np.array_equal(still(some[0].clip)[3], some[0].clip[0])


def test_names_of_controls():
    assert is_control(label("task", "done")) and is_control("a (b) (still)")
    assert not any(map(is_control, ("task", "task (mine)", "still", None, "(still)")))
