"""Scorers for tests, and a server that scores as they do and misbehaves when told to."""

import base64
import io
import math

import numpy as np
from PIL import Image

from tests.vlm.fake_server import FakeServer, error


def brightness(clips, tasks, *, scale=1.0):
    """Mean brightness of the frames after the first, with a little for the task's length."""
    return [scale * float(clip[1:].mean()) + len(task) / 100 for clip, task in zip(clips, tasks, strict=True)]


class Several:
    """Numbers by name; `calls` has the sizes of its batches."""

    name = "several-1"

    def __init__(self, offset=0.0):
        self.offset, self.calls = offset, []

    def __call__(self, clips, tasks):
        self.calls.append(len(clips))
        bright = np.array([clip.mean() for clip in clips])
        return {"VQ": bright + self.offset, "TA": [float(len(task)) for task in tasks], "other": bright * 0}


class OldTensor:
    """A number in an object, as tensors are."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return float(self.value)


def odd(clips, tasks):
    """A number, and things that are none, in turn."""
    values = [1.5, math.nan, math.inf, None, "2.0", True, OldTensor(2.5), np.float32(0.25), "yes"]
    return [values[i % len(values)] for i in range(len(clips))]


def one_too_few(clips, tasks):
    return [1.0] * (len(clips) - 1)


def broken(clips, tasks):
    raise RuntimeError("CUDA out of memory")


def pixels(url):
    """The picture in a data URL, [H W 3]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def served(item):
    """The fake server's numbers about an item."""
    frames = np.stack([pixels(url) for url in item["frames"]])
    return {"VQ": float(frames.mean()), "TA": float(len(item["task"]))}


class FakeScorer(FakeServer):
    """A context manager: `FakeServer` with another protocol; faults of replies are in `_reply`."""

    async def _handle(self, writer, method, path, body, headers):
        if (method, path) != ("POST", "/v1/score"):
            return self._send(writer, 404, error("Not Found"))
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return self._send(writer, 401, error(f"Incorrect API key provided: {headers.get('authorization')}"))
        number, self.chats = self.chats, self.chats + 1
        self.bodies.append(body)
        return await self._misbehave(writer, self.fault(number, body), body)

    def _seen(self, body):
        return [item["task"] for item in body["items"]]

    def _refusal(self, body):
        return "too rude" if any("rude" in item["task"] for item in body["items"]) else None

    def _reply(self, body, fault):
        scores = [served(item) if "frames" in item else {"VQ": 1.0, "TA": 2.0} for item in body["items"]]
        match fault:
            case "short":
                scores = scores[:-1]
            case "nan" | "null" | "string":
                scores[0]["VQ"] = {"nan": math.nan, "null": None, "string": "good"}[fault]
            case "missing":
                del scores[0]["VQ"]
            case "columns":
                return {"scores": {"VQ": [s["VQ"] for s in scores]}}
        return {"scores": scores}
