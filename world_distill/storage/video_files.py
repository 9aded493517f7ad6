"""Clips as files: lossless strips, and GIF, MP4 and contact sheets for looking at.

A *strip* is a picture with all frames of a clip side by side. It opens in any viewer, and is what reports animate. A
PNG is exact, and its text chunk `frames` says how many frames there are. A WebP is small and has lost a little; its XMP
part says it. A clip is [F H W 3] uint8. Every file is written beside its target and then renamed, so a reader sees the
old file or the whole new one. All functions raise OSError where the disk refuses.
"""

import contextlib
import fractions
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from world_distill.errors import UserError

WEBP_SIDE = 16383  # pixels that a WebP has at most
_INDEX_FIRST = {"movflags": "+faststart"}
_BT709, _LIMITED = 1, 1  # FFmpeg's numbers of the primaries, curve and matrix of BT.709, and of the range 16 to 235
_INK, _PAPER = (60, 60, 60), (255, 255, 255)
_XMP = "frames="  # before the number of frames in a WebP strip


def save_strip(path: str | os.PathLike, clip: np.ndarray, *, quick: bool = False) -> None:
    """Writes a clip [F H W 3] uint8 as a lossless PNG, frames from left to right.

    `quick` takes a fifth of the time, for a file that is a fifth larger or so.

    Raises:
      ValueError: not a clip.
    """
    clip = _checked(clip)
    info = PngInfo()
    info.add_text("frames", str(len(clip)))
    effort = {"compress_level": 1} if quick else {"optimize": True}
    with _replacing(path) as file:
        Image.fromarray(np.concatenate(list(clip), axis=1)).save(file, "PNG", pnginfo=info, **effort)


def save_small_strip(path: str | os.PathLike, clip: np.ndarray, quality: int = 75) -> None:
    """Writes a clip [F H W 3] uint8 as a WebP with loss, frames from left to right; at most 16383 pixels in all.

    Raises:
      ValueError: not a clip, or too large.
    """
    clip = _checked(clip)
    if max(len(clip) * clip.shape[2], clip.shape[1]) > WEBP_SIDE:
        raise ValueError(f"{len(clip)} frames of {clip.shape[1]} x {clip.shape[2]} are too large for one WebP")
    with _replacing(path) as file:
        Image.fromarray(np.concatenate(list(clip), axis=1)).save(
            file, "WEBP", quality=quality, method=4, xmp=f"{_XMP}{len(clip)}".encode()
        )


def reduced(clip: np.ndarray, side: int, frames: int) -> np.ndarray:
    """At most `frames` frames of a clip [F H W 3] uint8, evenly from the first to the last, no side over `side`."""
    clip = _checked(clip)
    if len(clip) > frames:
        clip = clip[np.linspace(0, len(clip) - 1, frames).round().astype(int)]
    factor = side / max(clip.shape[1:3])
    if factor >= 1:
        return clip
    height, width = (max(1, round(factor * pixels)) for pixels in clip.shape[1:3])
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)) for frame in clip]
    )


def load_strip(path: str | os.PathLike) -> np.ndarray:
    """The clip [F H W 3] uint8 that `save_strip` or `save_small_strip` wrote.

    Raises:
      ValueError: the file is damaged, is no RGB image, or does not say how many frames it holds.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            with Image.open(file) as image:
                image.load()
                mode, count = image.mode, getattr(image, "text", {}).get("frames")
                if count is None and image.format == "WEBP":
                    _, known, count = image.info.get("xmp", b"").decode("ascii", "replace").rpartition(_XMP)
                    count = count if known else None
                strip = np.array(image)
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
            raise ValueError(f"{path}: damaged, or not a picture ({error})") from error
    if count is None:
        raise ValueError(f"{path}: not a strip of frames (its number of `frames` is missing)")
    if mode != "RGB":
        raise ValueError(f"{path}: a strip is an RGB image, this one is {mode}")
    frames = int(count) if count.isascii() and count.isdecimal() and len(count) < 9 else 0
    if not frames or strip.shape[1] % frames:
        raise ValueError(f"{path}: cannot hold {count!r} frames side by side, it is {strip.shape[1]} pixels wide")
    height, width = strip.shape[0], strip.shape[1] // frames
    return np.ascontiguousarray(strip.reshape(height, frames, width, 3).swapaxes(0, 1))


def save_gif(path: str | os.PathLike, clip: np.ndarray, fps: float, scale: int = 1, *, hold: float = 0.0) -> None:
    """Writes a GIF that loops forever, pixels enlarged to crisp squares of `scale`.

    Frames of up to 256 colours are exact, others get the 256 that fit best. Equal neighbours are one frame that is
    shown for longer. The last frame stays for `hold` more seconds.

    Raises:
      ValueError: not a clip, or not a speed or scale.
    """
    clip = _checked(clip, fps, scale)
    # GIF counts hundredths of a second: rounding the frames' ends, not their lengths, keeps the whole length right.
    ends = np.round(np.arange(1, len(clip) + 1) * 100 / fps)
    lengths = np.maximum(np.diff(ends, prepend=0), 2)  # browsers slow down anything shorter
    lengths[-1] += round(100 * hold)
    first, *rest = [_with_palette(frame, scale) for frame in clip]
    with _replacing(path) as file:
        first.save(
            file, "GIF", save_all=True, append_images=rest, loop=0, duration=[int(10 * x) for x in lengths],
            optimize=False, disposal=1,
        )  # fmt: skip


def require_pyav(what: str = "writing MP4") -> None:
    """Raises UserError, saying what needs it, where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what} needs PyAV, which is in the extra `vlm` or `data`: pip install -e '.[vlm]'") from error


def save_mp4(path: str | os.PathLike, clip: np.ndarray, fps: float, scale: int = 1) -> None:
    """Writes H.264 in yuv420p, which every player knows; sides are made even by repeating the last row or column.

    Colours are converted by BT.709 and the file says so: players assume that of files without a word, or BT.601, and
    would show other greens. The index stands in front, so that a browser plays it while it loads.

    Raises:
      UserError: PyAV is not installed.
      ValueError: not a clip, or not a speed or scale.
    """
    clip = _checked(clip, fps, scale)
    require_pyav()
    import av

    clip = _enlarged(clip, scale)
    clip = np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")
    # By its name: the muxer opens the file once more to move the index.
    with _replacing(path) as file, av.open(file.name, "w", format="mp4", options=_INDEX_FIRST) as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14", "preset": "slow"}
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        for pixels in clip:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def save_sheet(
    path: str | os.PathLike, clips: Sequence[np.ndarray], labels: Sequence[str] | None = None, scale: int = 1
) -> None:
    """Writes a contact sheet as PNG: one row a clip, its frames from left to right, its label above.

    Raises:
      ValueError: no clips, not as many labels as clips, or not a clip among them.
    """
    if not clips:
        raise ValueError("a contact sheet needs at least one clip")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"{len(labels)} labels for {len(clips)} clips")
    clips = [_enlarged(_checked(clip, scale=scale), scale) for clip in clips]
    gap, font = max(2, scale), ImageFont.load_default(13)
    line = 0 if labels is None else 18
    width = max(len(clip) * (clip.shape[2] + gap) for clip in clips) + gap
    if labels is not None:
        width = max(width, *(int(font.getlength(label)) + 2 * gap for label in labels))
    sheet = Image.new("RGB", (width, sum(line + clip.shape[1] + 2 * gap for clip in clips) + gap), _PAPER)
    draw, y = ImageDraw.Draw(sheet), gap
    for row, clip in enumerate(clips):
        if labels is not None:
            draw.text((gap, y), labels[row], fill=_INK, font=font)
        for column, frame in enumerate(clip):
            sheet.paste(Image.fromarray(frame), (gap + column * (clip.shape[2] + gap), y + line))
        y += line + clip.shape[1] + 2 * gap
    with _replacing(path) as file:
        sheet.save(file, "PNG", optimize=True)


def _checked(clip: np.ndarray, fps: float = 1.0, scale: int = 1) -> np.ndarray:
    clip = np.asarray(clip)
    if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8 or not clip.size:
        raise ValueError(f"a clip is [frames height width 3] uint8 and not empty; got {clip.shape} {clip.dtype}")
    if not 0 < fps <= 1000 or scale != int(scale) or scale < 1:
        raise ValueError(f"need 0 < fps <= 1000 and a whole scale from 1 on, got fps {fps}, scale {scale}")
    return clip


def _enlarged(clip: np.ndarray, scale: int) -> np.ndarray:
    return clip.repeat(scale, axis=1).repeat(scale, axis=2)


def _with_palette(frame: np.ndarray, scale: int) -> Image.Image:
    """The frame with at most 256 colours, its own ones if they are so few."""
    colours, index = np.unique(frame.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) <= 256:
        image = Image.fromarray(index.reshape(frame.shape[:2]).astype(np.uint8), "P")
        image.putpalette(colours.tobytes())
    else:
        image = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    return image.resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.NEAREST)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and leaves nothing when it does not."""
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w+b", dir=path.parent, prefix=f".{path.name[:40]}.", delete=False) as file:
            temporary = pathlib.Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # it is born readable by its owner alone
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # not the temporary name; a full disk says none at all
        raise
