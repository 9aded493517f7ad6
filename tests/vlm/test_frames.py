"""Frames of a clip: the whole of it is seen, and equal clips are equal bytes."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from world_distill.vlm.frames import chosen_frames, data_urls, frame_labels, spread_frames


def pixels(url):
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))))


@pytest.mark.parametrize("count, wanted", [(1, 4), (4, 4), (5, 2), (49, 16), (121, 16), (1000, 7), (17, 16)])
def test_frames_are_even_with_both_ends(count, wanted):
    numbers = spread_frames(count, wanted)
    assert chosen_frames(np.zeros((count, 4, 4, 3), np.uint8), wanted) == numbers
    assert len(numbers) == min(count, wanted) and numbers[0] == 0 and numbers[-1] == count - 1
    gaps = np.diff(numbers)
    assert (gaps > 0).all() and (not len(gaps) or gaps.max() - gaps.min() <= 1)


def moving(frames=81, size=64):
    """A square that goes slowly from left to right, over noise of the codec."""
    clip = np.random.default_rng(0).integers(100, 104, (frames, size, size, 3), np.uint8)
    for i, frame in enumerate(clip):
        left = 4 + i * (size - 16) // frames
        frame[20:30, left : left + 10] = (220, 30, 30)
    return clip


@pytest.mark.parametrize("start, length", [(7, 2), (40, 1), (63, 4), (77, 3)])
def test_what_lasts_for_a_few_frames_only_is_shown(start, length):
    clip = moving()
    clip[start : start + length, 50:58, 50:58] = 255  # something flashes in a corner
    shown = chosen_frames(clip, 16)
    assert any(start <= number < start + length for number in shown)
    assert len(shown) == 16 == len(set(shown)) and shown == sorted(shown) and shown[0] == 0 and shown[-1] == 80
    assert max(np.diff(shown)) <= 9  # and what is steady is still seen all along
    assert shown == chosen_frames(np.asfortranarray(clip), 16)


def test_what_hardly_differs_is_spread_evenly():
    clip = np.random.default_rng(0).integers(100, 104, (81, 64, 64, 3), np.uint8)
    assert chosen_frames(clip, 16) == spread_frames(81, 16)
    assert frame_labels(clip, [0, 5]) == ["Frame 1 of 81:", "Frame 6 of 81:"]


def test_png_is_exact_and_jpeg_is_close():
    clip = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), np.uint8)
    exact = data_urls(clip, frames=2, max_side=12, quality=0)
    assert all(url.startswith("data:image/png;base64,") for url in exact)
    np.testing.assert_array_equal([pixels(url) for url in exact], clip[[0, 2]])
    smooth = np.broadcast_to(np.linspace(40, 200, 12)[None, None, :, None], (2, 8, 12, 3)).astype(np.uint8)
    for url, frame in zip(data_urls(smooth, frames=2, max_side=12, quality=95), smooth, strict=True):
        assert url.startswith("data:image/jpeg;base64,")
        np.testing.assert_allclose(pixels(url).astype(int), frame, atol=4)


def test_large_frames_are_shrunk_and_small_ones_are_not_enlarged():
    clip = np.full((1, 60, 200, 3), 90, np.uint8)
    (url,) = data_urls(clip, frames=2, max_side=100, quality=0)
    np.testing.assert_array_equal(pixels(url), np.full((30, 100, 3), 90))
    assert pixels(data_urls(clip[:, :, :50], frames=2, max_side=100, quality=0)[0]).shape == (60, 50, 3)


def test_equal_clips_give_equal_bytes():
    clip = np.random.default_rng(1).integers(0, 256, (3, 40, 40, 3), np.uint8)
    for quality in (0, 90):
        first = data_urls(clip, frames=3, max_side=20, quality=quality)
        assert first == data_urls(np.asfortranarray(clip), frames=3, max_side=20, quality=quality)
