"""Clips as the image parts of a chat message: frames chosen over all of the clip, as pictures or data URLs.

Every server that takes images takes these; how servers cut up a video file differs between them and their versions.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def spread_frames(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` frames of `count`, evenly over time, with the first and the last; all if there are fewer."""
    if count <= wanted:
        return list(range(count))
    steps = wanted - 1
    return [(2 * i * (count - 1) + steps) // (2 * steps) for i in range(wanted)]  # rounded, without floats


def chosen_frames(clip: np.ndarray, wanted: int) -> list[int]:
    """Numbers of the frames of a clip [F H W 3] uint8 that are shown, at most `wanted`, with the first and the last.

    Two thirds of them lie evenly over time. Each of the others is the one that differs most from the shown ones before
    and after it: what lasts for a few frames only would else be hidden between two of an even choice. Where nothing
    differs, all lie evenly.
    """
    count, even = len(clip), max(2, wanted - wanted // 3)
    if count <= wanted or even == wanted:
        return spread_frames(count, wanted)
    looks = np.stack([_look(frame) for frame in clip])
    shown = spread_frames(count, even)
    while len(shown) < wanted:
        hidden = [number for number in range(count) if number not in shown]
        after = np.searchsorted(shown, hidden)
        before_of, after_of = (np.array(shown)[after + shift] for shift in (-1, 0))
        gaps = [_difference(looks[hidden], looks[others]) for others in (before_of, after_of)]
        apart = np.minimum(*gaps)
        if apart.max() == 0:
            return spread_frames(count, wanted)
        shown = sorted([*shown, hidden[int(apart.argmax())]])
    return shown


_CELLS = 16  # a side, of what frames are compared by
_PIXELS = 128  # of the shorter side that are looked at
_NOISE = 48  # of four cells' three colours: 4 of 255 each


def _look(frame: np.ndarray) -> np.ndarray:
    """A frame [H W 3] uint8 as the mean colours of its cells [h w 3] int32, in whole numbers: the same everywhere."""
    # Every few pixels are enough for a mean.
    step = max(1, min(frame.shape[:2]) // _PIXELS)
    frame = frame[::step, ::step]
    height, width, _ = frame.shape
    rows, columns = (np.arange(0, side, -(-side // _CELLS)) for side in (height, width))
    sums = np.add.reduceat(np.add.reduceat(frame, rows, axis=0, dtype=np.int32), columns, axis=1)
    sizes = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))[..., None]
    return sums // sizes


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far pairs of looks [n h w 3] are apart [n]: what changes in one place counts by where it changes most."""
    apart = abs(a - b).sum(axis=-1).reshape(len(a), -1)
    most = np.sort(apart, axis=1)[:, -4:].sum(axis=1)
    return np.where(most > _NOISE, most, 0)


def frame_labels(clip: np.ndarray, numbers: Sequence[int]) -> list[str]:
    """What is said before each chosen frame: its number, from 1, and that of all frames."""
    return [f"Frame {number + 1} of {len(clip)}:" for number in numbers]


def chosen_images(clip: np.ndarray, *, frames: int | Sequence[int], max_side: int) -> list[Image.Image]:
    """Frames of a clip [F H W 3] uint8, by their numbers, or so many of `chosen_frames`.

    Those with a side of more than `max_side` pixels are shrunk to it.
    """
    images = []
    for number in chosen_frames(clip, frames) if isinstance(frames, int) else frames:
        image = Image.fromarray(clip[number])
        scale = max_side / max(image.size)
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        images.append(image)
    return images


def data_urls(clip: np.ndarray, *, frames: int | Sequence[int], max_side: int, quality: int) -> list[str]:
    """Chosen frames of a clip [F H W 3] uint8 as data URLs; equal clips give equal bytes.

    Args:
      clip: pixels.
      frames: numbers of frames, or at most how many, at least 2.
      max_side: pixels; frames with a longer side are shrunk to it, others stay as they are.
      quality: of JPEG, 1 to 100; 0 is PNG, which loses nothing and is some times larger.
    """
    urls = []
    for image in chosen_images(clip, frames=frames, max_side=max_side):
        file = io.BytesIO()
        if quality:
            image.save(file, "JPEG", quality=quality, subsampling=0)
        else:
            image.save(file, "PNG")
        kind = "jpeg" if quality else "png"
        urls.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return urls
