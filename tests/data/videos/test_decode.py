"""Frames of videos: by time, upright, of the right size; and what is no video."""

import fractions

import numpy as np
import pytest

from tests.data.videos import making
from world_distill.data.records.encoder_calls import fit_image
from world_distill.data.videos import decode
from world_distill.data.videos.decode import Timed, VideoError, at_even_times, first_frame, read_clip

pytest.importorskip("av", reason="PyAV is in the extra `test`")


def clip_numbers(path, fps, frames):
    return making.numbers(read_clip(path, fps=fps, frames=frames, size=(32, 48)))


def timed(times, last=1.0):
    ends = [*times[1:], times[-1] + last]
    return [Timed(time, end, number) for number, (time, end) in enumerate(zip(times, ends, strict=True))]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(8, [0, 1, 2, 3, 4]), (4, [0, 2, 4, 6, 8]), (16, [0, 0, 1, 1, 2]), (3, [0, 3, 5, 8, 11])],
    ids=["its-own", "fewer", "more", "uneven"],
)
def test_frames_are_taken_by_time(tmp_path, fps, expected):
    assert clip_numbers(making.write(tmp_path / "a.mp4", fps=8), fps, 5) == expected


def test_a_variable_rate_is_read_by_its_timestamps(tmp_path):
    # Four frames in a quarter of a second, one that is held for a second, and four more.
    path = making.write(tmp_path / "a.mp4", times=[0, 60, 120, 180, 250, 1250, 1310, 1370, 1430])
    assert clip_numbers(path, 4, 6) == [0, 4, 4, 4, 5, 5]
    assert clip_numbers(making.write(tmp_path / "late.mp4", times=[500, 750, 1000], fps=4), 4, 3) == [0, 1, 2]


def test_of_two_frames_as_near_the_earlier_counts():
    assert list(at_even_times(timed([0, 1, 2, 3]), 2, 6)) == [0, 0, 1, 1, 2, 2]
    assert list(at_even_times(timed([0, 0.9, 2.2]), 1, 3)) == [0, 1, 2]


def test_a_clip_may_end_where_the_last_frame_does_and_no_later():
    frames = timed([0, 1, 2], last=1.0)
    assert list(at_even_times(frames, 2, 6)) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(VideoError, match=r"lasts 3\.00 s, and 7 frames at 2 a second need more than 3\.00 s"):
        list(at_even_times(frames, 2, 7))
    with pytest.raises(VideoError, match="holds no frames"):
        list(at_even_times([], 2, 1))


def test_a_long_video_is_read_no_further_than_the_clip(tmp_path):
    seen = []
    frames = (seen.append(i) or Timed(i, i + 1, i) for i in range(100))
    assert list(at_even_times(frames, 1, 5)) == [0, 1, 2, 3, 4]
    assert max(seen) == 5


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_sound_and_containers_do_not_matter(tmp_path, name):
    path = making.write(tmp_path / name, sound=True)
    assert clip_numbers(path, 8, 9) == list(range(9))


def test_a_turned_video_is_shown_upright(tmp_path):
    path = making.write(tmp_path / "a.mp4", size=(32, 48))
    before = first_frame(path)
    assert before.shape == (32, 48, 3) and before[0, 0, 0] > 240
    making.turn(path)
    after = first_frame(path)
    assert after.shape == (48, 32, 3)  # the block in the upper left is turned to the upper right
    assert after[0, -1, 0] > 240 > after[-1, 0, 0] and after[0, 0, 0] < 100
    clip = read_clip(path, fps=8, frames=3, size=(48, 32))
    np.testing.assert_array_equal(clip[0], after)


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = making.write(tmp_path / "a.mkv", size=(32, 48), aspect=fractions.Fraction(2, 1))
    assert first_frame(path).shape == (32, 96, 3)


def test_a_clip_is_fitted_as_its_scene_is(tmp_path):
    path = making.write(tmp_path / "a.mp4", size=(64, 96))
    clip = read_clip(path, fps=16, frames=4, size=(20, 20))
    assert clip.shape == (4, 20, 20, 3)
    np.testing.assert_array_equal(clip[0], fit_image(first_frame(path), (20, 20)))
    np.testing.assert_array_equal(clip[0], clip[1])  # one frame of the video, shown twice
    assert making.numbers(clip) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "is an empty file"),
        (lambda data: b"not a video " * 50, "is damaged, or no video"),
        (lambda data: data[: len(data) // 20], "is damaged, or no video"),
    ],
    ids=["empty", "text", "no-index"],
)
def test_what_is_no_video_says_why(tmp_path, damage, reason):
    path = making.write(tmp_path / "a.mp4", size=(96, 96))
    path.write_bytes(damage(path.read_bytes()))
    for read in (first_frame, lambda path: read_clip(path, fps=8, frames=4, size=(32, 32))):
        with pytest.raises(VideoError, match=reason):
            read(path)


def test_a_video_that_was_cut_off_is_too_short_or_damaged(tmp_path):
    path = making.write(tmp_path / "a.mp4", count=40, size=(96, 96))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(VideoError, match="lasts|damaged"):
        read_clip(path, fps=8, frames=40, size=(96, 96))


def test_frames_that_a_decoder_calls_corrupt_are_refused(tmp_path):
    class Frame:
        is_corrupt, time, duration, time_base = False, None, None, None

    class Stream:
        average_rate = guessed_rate = 4

    frames = [Frame(), Frame()]
    assert [one.time for one in decode._timed(frames, Stream())] == [0, 0.25]  # without timestamps: by the rate
    frames[1].is_corrupt = True
    with pytest.raises(VideoError, match="damaged at frame 1"):
        list(decode._timed(frames, Stream()))


def test_sound_alone_has_no_picture(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="only sound"):
        first_frame(tmp_path / "a.mp4")
