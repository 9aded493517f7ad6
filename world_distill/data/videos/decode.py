"""Frames of a video file at even times, through PyAV.

Time is that of the frames' own timestamps, so that a variable frame rate changes nothing, and begins with the first
frame. Frame i of a clip is the frame nearest to i / fps; of two as near, the earlier one. The rotation that a phone
writes beside a video is applied, and pixels that are not square are made so. Sound is not read.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from world_distill.data.records.encoder_calls import fit_image
from world_distill.storage.video_files import require_pyav

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
_UNSPECIFIED, _LARGE = 2, 720  # FFmpeg's number of a colour matrix that is not named; pixels of height
_TOLERANCE = 1e-3  # of a clip's frame interval, by which a video may be too short: times are rounded


class VideoError(ValueError):
    """A video that makes no clip. The message says why, without the file's path."""


class Timed(NamedTuple):
    """A decoded frame, shown from `time` to `end`, in seconds from the first one."""

    time: float
    end: float
    frame: Any


def first_frame(path: str | os.PathLike) -> np.ndarray:
    """The first frame of a video [H W 3] uint8, upright, with square pixels.

    Raises:
      VideoError: the file is damaged, or holds no frames.
      UserError: PyAV is not installed.
    """
    with _opened(path) as (stream, frames):
        for one in frames:
            return _pixels(one.frame, stream)
    raise VideoError("holds no frames")


def read_clip(path: str | os.PathLike, *, fps: float, frames: int, size: tuple[int, int]) -> np.ndarray:
    """The first `frames` frames of a video at `fps` [F H W 3] uint8, scaled and cut around the centre to `size`.

    Args:
      path: of the file.
      fps: frames a second of the clip.
      frames: of the clip.
      size: (height, width) of the clip in pixels, fitted as scene images are.

    Raises:
      VideoError: the file is damaged, or ends before the clip does.
      UserError: PyAV is not installed.
    """
    clip = np.empty((frames, *size, 3), np.uint8)
    with _opened(path) as (stream, timed):
        last = None
        for number, frame in enumerate(at_even_times(timed, fps, frames)):
            if frame is last:  # shown for longer than one frame of the clip
                clip[number] = clip[number - 1]
            else:
                clip[number], last = fit_image(_pixels(frame, stream), size), frame
    return clip


def at_even_times(timed: Iterable[Timed], fps: float, count: int) -> Iterator[Any]:
    """The frames nearest to the times i / fps for i below `count`; a frame may come several times.

    Raises VideoError where the frames end before the last of these times.
    """
    number, before = 0, None
    for one in timed:
        while before is not None and number < count and 2 * number / fps <= before.time + one.time:
            yield before.frame
            number += 1
        if number == count:
            return
        before = one
    if before is None:
        raise VideoError("holds no frames")
    while number < count and number < before.end * fps - _TOLERANCE:
        yield before.frame
        number += 1
    if number < count:
        raise VideoError(
            f"lasts {before.end:.2f} s, and {count} frames at {fps:g} a second need more than {(count - 1) / fps:.2f} s"
        )


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, Iterator[Timed]]]:
    """A video's picture stream and its frames. Whatever FFmpeg has to say becomes a VideoError."""
    require_pyav("reading videos")
    import av
    from av.error import FFmpegError

    if not pathlib.Path(path).stat().st_size:
        raise VideoError("is an empty file")
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                sound = container.streams.audio
                raise VideoError("has no picture, only sound" if sound else "is damaged, or no video (nothing in it)")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield stream, _timed(container.decode(stream), stream)
    except FFmpegError as error:
        raise VideoError(f"is damaged, or no video ({error.strerror})") from error


def _timed(frames: Iterable[Any], stream: Any) -> Iterator[Timed]:
    rate = stream.average_rate or stream.guessed_rate
    usual = float(1 / rate) if rate else 0.0
    start, last = None, -math.inf
    for number, frame in enumerate(frames):
        if frame.is_corrupt:
            raise VideoError(f"is damaged at frame {number}")
        at = number * usual if frame.time is None else frame.time
        start = at if start is None else start
        if at <= last:
            continue  # two frames at one time: the second would never be seen
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else usual
        yield Timed(at - start, at - start + length, frame)
        last = at


def _pixels(frame: Any, stream: Any) -> np.ndarray:
    """A frame as RGB [H W 3], upright, with square pixels."""
    # FFmpeg reads untagged colours by BT.601; players take those of large pictures for BT.709.
    untagged_large = frame.colorspace == _UNSPECIFIED and frame.height >= _LARGE
    colours = {"src_colorspace": "ITU709"} if untagged_large else {}
    pixels = frame.reformat(format="rgb24", **colours).to_ndarray()
    shape = float(stream.sample_aspect_ratio or 1)
    if abs(shape - 1) > 0.01:
        height, width = pixels.shape[:2]
        pixels = np.asarray(
            Image.fromarray(pixels).resize((max(round(width * shape), 1), height), Image.Resampling.LANCZOS)
        )
    turns, rest = divmod(frame.rotation, 90)
    if rest:
        raise VideoError(f"is to be shown turned by {frame.rotation} degrees, which is no quarter turn")
    return np.ascontiguousarray(np.rot90(pixels, turns))  # both count against the clock
