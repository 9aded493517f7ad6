"""Clips on disk: strips come back exactly or not at all, and the files for viewers hold what they should."""

import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from world_distill.errors import UserError
from world_distill.storage import video_files


def noise(frames=5, height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 8), (9, 30, 30), (3, 7, 2)])
def test_strip_comes_back_exactly(tmp_path, shape):
    clip = noise(*shape)
    video_files.save_strip(tmp_path / "deep/er/strip.png", clip)
    loaded = video_files.load_strip(tmp_path / "deep/er/strip.png")
    assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, clip)
    with Image.open(tmp_path / "deep/er/strip.png") as image:
        assert image.size == (shape[0] * shape[2], shape[1])
        np.testing.assert_array_equal(np.array(image)[:, : shape[2]], clip[0])


def test_clip_of_any_memory_layout_is_saved(tmp_path):
    clip = noise(4, 6, 6).swapaxes(1, 2)[::-1]
    video_files.save_strip(tmp_path / "s.png", clip)
    np.testing.assert_array_equal(video_files.load_strip(tmp_path / "s.png"), clip)


def smooth(frames, height, width):
    """A clip whose brightness rises from frame to frame and from left to right."""
    ramp = (
        np.linspace(0, 120, width)[None, None] + np.linspace(0, 120, frames)[:, None, None] + np.zeros((1, height, 1))
    )
    return np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (24, 18, 40)])
def test_small_strip_comes_back_nearly(tmp_path, shape):
    clip = smooth(*shape)
    video_files.save_small_strip(tmp_path / "s.webp", clip)
    loaded = video_files.load_strip(tmp_path / "s.webp")
    assert loaded.shape == clip.shape and np.abs(loaded.astype(int) - clip).max() < 12
    with Image.open(tmp_path / "s.webp") as image:
        assert image.format == "WEBP" and image.size == (shape[0] * shape[2], shape[1])


def test_small_strip_that_does_not_fit_or_does_not_say_its_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too large for one WebP"):
        video_files.save_small_strip(tmp_path / "s.webp", np.zeros((200, 2, 100, 3), np.uint8))
    Image.new("RGB", (12, 4)).save(tmp_path / "s.webp")
    with pytest.raises(ValueError, match="number of `frames` is missing"):
        video_files.load_strip(tmp_path / "s.webp")
    Image.new("RGB", (12, 4)).save(tmp_path / "s.webp", xmp=b"frames=5")
    with pytest.raises(ValueError, match="cannot hold '5' frames"):
        video_files.load_strip(tmp_path / "s.webp")


def test_reduced_clips_keep_their_ends_and_their_shape():
    clip = smooth(25, 30, 60)
    few = video_files.reduced(clip, 100, 7)  # no side is too long
    np.testing.assert_array_equal(few, clip[[0, 4, 8, 12, 16, 20, 24]])
    small = video_files.reduced(clip, 20, 99)
    assert small.shape == (25, 10, 20, 3) and np.abs(small[:, 5, 10].astype(int) - clip[:, 15, 31]).max() < 6
    assert video_files.reduced(clip.swapaxes(1, 2), 20, 99).shape == (25, 20, 10, 3)  # the longer side


def save(path, mode="RGB", **text):
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    Image.new(mode, (12, 4)).save(path, pnginfo=info)


@pytest.mark.parametrize("count", ["0", "-3", "5", "3.0", "", "three", "٣", "9" * 30, "24"])
def test_impossible_frame_count_is_refused(tmp_path, count):
    save(tmp_path / "s.png", frames=count)
    with pytest.raises(ValueError, match=r"s\.png.*frames|s\.png.*chunk"):
        video_files.load_strip(tmp_path / "s.png")


def test_what_is_not_a_strip_is_named(tmp_path):
    path = tmp_path / "s.png"
    with pytest.raises(FileNotFoundError):
        video_files.load_strip(path)
    save(path)
    with pytest.raises(ValueError, match=r"s\.png: not a strip .*number of `frames` is missing"):
        video_files.load_strip(path)
    save(path, "RGBA", frames="3")
    with pytest.raises(ValueError, match="RGB image, this one is RGBA"):
        video_files.load_strip(path)
    path.write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"s\.png: damaged"):
        video_files.load_strip(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        video_files.load_strip(path)


def test_cut_strip_is_never_taken_for_a_clip(tmp_path):
    video_files.save_strip(tmp_path / "s.png", noise())
    whole = (tmp_path / "s.png").read_bytes()
    end = whole.index(b"IEND")
    for length in range(8, end - 8, 37):  # what follows the pixels' last byte carries nothing
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.png"):
            video_files.load_strip(tmp_path / "cut.png")


@pytest.mark.parametrize(
    "bad", [noise()[0], noise().astype(np.float32), noise()[..., :1], noise()[:0], np.zeros((2, 0, 3, 3), np.uint8)]
)
def test_what_is_not_a_clip_is_refused(tmp_path, bad):
    for write in (
        lambda: video_files.save_strip(tmp_path / "x", bad),
        lambda: video_files.save_gif(tmp_path / "x", bad, 4),
        lambda: video_files.save_sheet(tmp_path / "x", [bad]),
    ):
        with pytest.raises(ValueError, match="a clip is"):
            write()
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "s.png"
    video_files.save_strip(path, noise())
    before = path.read_bytes()

    def full(image, file, *args, **keywords):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left") as error:
        video_files.save_strip(path, noise(seed=1))
    assert error.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        video_files.save_strip(tmp_path / "file/s.png", noise())
    assert "file" in str(error.value.filename)


def frames_of(path):
    with Image.open(path) as image:
        assert image.info["loop"] == 0, "loops forever"
        shown = []
        for i in range(image.n_frames):
            image.seek(i)
            shown.append((np.array(image.convert("RGB")), image.info["duration"]))
        return shown


@pytest.mark.parametrize("fps, scale", [(4, 1), (8, 3), (7, 2), (30, 1)])
def test_gif_has_every_frame_exactly(tmp_path, fps, scale):
    clip = noise(6, 8, 8)  # 64 colours a frame
    video_files.save_gif(tmp_path / "c.gif", clip, fps, scale)
    shown = frames_of(tmp_path / "c.gif")
    assert len(shown) == 6
    for (image, _), frame in zip(shown, clip, strict=True):
        np.testing.assert_array_equal(image, frame.repeat(scale, 0).repeat(scale, 1))
    assert sum(ms for _, ms in shown) == pytest.approx(6000 / fps, abs=5)


def test_gif_holds_its_end_and_joins_equal_frames(tmp_path):
    clip = noise(3, 4, 4)[[0, 0, 1, 2, 2]]
    video_files.save_gif(tmp_path / "c.gif", clip, 10, hold=0.5)
    assert [ms for _, ms in frames_of(tmp_path / "c.gif")] == [200, 100, 200 + 500]


def test_gif_of_many_colours_is_close(tmp_path):
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    frame = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
    video_files.save_gif(tmp_path / "c.gif", np.stack([frame, frame[::-1]]), 5, 2)
    for (image, _), truth in zip(frames_of(tmp_path / "c.gif"), (frame, frame[::-1]), strict=True):
        assert np.abs(image[::2, ::2].astype(int) - truth).mean() < 8
        np.testing.assert_array_equal(image[::2, ::2], image[1::2, 1::2])  # still whole squares


@pytest.mark.parametrize("fps, scale", [(0, 1), (-1, 1), (float("nan"), 1), (4, 0), (4, 1.5)])
def test_impossible_speed_or_scale_is_refused(tmp_path, fps, scale):
    with pytest.raises(ValueError, match="need 0 < fps"):
        video_files.save_gif(tmp_path / "c.gif", noise(), fps, scale)


def test_mp4_without_pyav_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="extra `vlm`"):
        video_files.save_mp4(tmp_path / "c.mp4", noise(), 4)
    assert not list(tmp_path.iterdir())


def test_mp4_plays_everywhere(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is in the extra `vlm`")
    clip = np.full((7, 9, 15, 3), (200, 60, 30), np.uint8)
    clip[:, :, 8:] = (30, 60, 200)
    video_files.save_mp4(tmp_path / "c.mp4", clip, 7.5, 3)
    with av.open(tmp_path / "c.mp4") as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (46, 28) and float(stream.average_rate) == 7.5
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 7
    assert np.abs(frames[3][:27, :20].astype(int) - (200, 60, 30)).mean() < 12
    assert list(tmp_path.iterdir()) == [tmp_path / "c.mp4"]


def test_mp4_says_its_colours_and_begins_with_its_index(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is in the extra `vlm`")
    green = (20, 200, 40)
    video_files.save_mp4(tmp_path / "c.mp4", np.full((3, 32, 32, 3), green, np.uint8), 8)
    data = (tmp_path / "c.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert data[data.index(b"colrnclx") + 8 :][:7] == bytes([0, 1, 0, 1, 0, 1, 0])  # BT.709 thrice, limited range
    with av.open(tmp_path / "c.mp4") as container:
        codec = container.streams[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
        planes = next(container.decode(video=0)).to_ndarray()  # [48 32] y over u over v
    r, g, b = (value / 255 for value in green)
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    expected = 16 + 219 * y, 128 + 224 * (b - y) / 1.8556, 128 + 224 * (r - y) / 1.5748
    np.testing.assert_allclose([planes[9, 9], planes[34, 9], planes[43, 9]], expected, atol=2)


def test_sheet_shows_every_frame(tmp_path):
    clips = [noise(3, 4, 5), noise(2, 6, 4, seed=1)]
    video_files.save_sheet(tmp_path / "sheet.png", clips, scale=2)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    top = 2
    for clip in clips:
        left = 2
        for frame in clip:
            big = frame.repeat(2, 0).repeat(2, 1)
            np.testing.assert_array_equal(sheet[top : top + big.shape[0], left : left + big.shape[1]], big)
            left += big.shape[1] + 2
        top += 2 * clip.shape[1] + 4
    assert sheet.shape[0] == top


def test_sheet_has_labels_and_checks_them(tmp_path):
    clips = [noise(1, 2, 2), noise(1, 2, 2)]
    video_files.save_sheet(tmp_path / "plain.png", clips)
    video_files.save_sheet(tmp_path / "named.png", clips, ["a long label that needs more room", "Ünïcode → ✓"])
    plain, named = (Image.open(tmp_path / f"{n}.png").size for n in ("plain", "named"))
    assert named[0] > plain[0] and named[1] > plain[1] + 30
    with pytest.raises(ValueError, match="1 labels for 2 clips"):
        video_files.save_sheet(tmp_path / "x.png", clips, ["one"])
    with pytest.raises(ValueError, match="at least one"):
        video_files.save_sheet(tmp_path / "x.png", [])
