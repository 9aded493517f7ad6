"""Videos whose frames say which they are: frame i is grey, of level 4 i + 20, with a white block in the upper left."""

import fractions
import pathlib

import numpy as np

BLOCK = 8  # pixels
# The first nine numbers of an MP4's track header that have it shown upright, and turned clockwise by a quarter.
UPRIGHT = np.array([0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000], ">i4").tobytes()
CLOCKWISE = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4").tobytes()


def level(i):
    return 4 * i + 20


def frame(i, size=(32, 48)):
    pixels = np.full((*size, 3), level(i), np.uint8)
    pixels[:BLOCK, :BLOCK] = 255
    return pixels


def numbers(clip):
    """Which frame of the video each frame of a clip is, by its lower right."""
    grey = np.asarray(clip)[:, -BLOCK:, -BLOCK:].astype(float).mean((1, 2, 3))
    return np.round((grey - 20) / 4).astype(int).tolist()


def write(path, *, times=None, fps=8, count=16, size=(32, 48), sound=False, aspect=None, first=0):
    """An H.264 video with frames at `times` (in milliseconds; None: `count` at `fps`), numbered from `first`."""
    import av

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    base = fractions.Fraction(1, 1000)
    times = [round(1000 * i / fps) for i in range(count)] if times is None else times
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=fractions.Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = stream.time_base = base
        stream.options = {"crf": "4", "preset": "ultrafast"}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        speech = container.add_stream("aac", rate=16000) if sound else None
        for i, time in enumerate(times):
            one = av.VideoFrame.from_ndarray(frame(first + i, size), format="rgb24")
            one.pts, one.time_base = time, base
            container.mux(stream.encode(one))
        container.mux(stream.encode(None))
        if speech is not None:
            noise = np.random.default_rng(0).normal(size=(1, 16000)).astype(np.float32) * 0.1
            samples = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(speech.encode(samples))
            container.mux(speech.encode(None))
    return path


def turn(path):
    """Has the video shown turned clockwise by a quarter, as phones write it."""
    data = path.read_bytes()
    at = data.index(b"tkhd")
    at = data.index(UPRIGHT, at)
    path.write_bytes(data[:at] + CLOCKWISE + data[at + len(CLOCKWISE) :])
