"""Frames of a clip: the whole of it is seen, and equal clips are equal bytes."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from world_distill.vlm.frames import chosen_frames, data_urls


def pixels(url):
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))))


@pytest.mark.parametrize("count, wanted", [(1, 4), (4, 4), (5, 2), (49, 16), (121, 16), (1000, 7), (17, 16)])
def test_frames_are_even_with_both_ends(count, wanted):
    numbers = chosen_frames(count, wanted)
    assert len(numbers) == min(count, wanted) and numbers[0] == 0 and numbers[-1] == count - 1
    gaps = np.diff(numbers)
    assert (gaps > 0).all() and (not len(gaps) or gaps.max() - gaps.min() <= 1)


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
