"""A scorer behind HTTP as a judge (see `scorer`): for learned rewards that need an environment or a GPU of their own.

The protocol, version 1. A request is `POST ADDRESS/score` with JSON; a server answers all items, in their order:

    {"model": "VideoReward", "items": [{"task": "[hand]: Pick up the cup.", "fps": 24.0, "count": 49,
                                        "frames": ["data:image/jpeg;base64,...", ...], "numbers": [0, 3, 6, ...]}]}
    {"scores": [{"VQ": 1.31, "MQ": 0.2, "TA": null}]}

`numbers` are those of the frames in a clip of `count`, from 0. Where `form = "mp4"`, an item has `"video":
"data:video/mp4;base64,..."` in place of `frames` and `numbers`. null, NaN or a missing name means that there is no
number. A server refuses what it does not take by status 400 or 422, and says why in `{"error": {"message": ...}}`; it
answers 429 or 503, with Retry-After, while it is busy.
"""

import asyncio
import base64
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.errors import UserError
from world_distill.interfaces import JudgeAnswer, JudgeRequest
from world_distill.judges.answering import Done
from world_distill.judges.scorer import PROBE_FRAMES, PROBE_TASK, Measures, items_of
from world_distill.judges.selftest import probe_clip
from world_distill.judges.serving import AsksServers, Refusals, check_servers, side_by_side, wait_for
from world_distill.storage.video_files import require_pyav, save_mp4
from world_distill.vlm.chat_marks import ForbiddenText, refuse_marks
from world_distill.vlm.client import Client, Limits, Refused, Server
from world_distill.vlm.complaints import server_words
from world_distill.vlm.frames import data_urls, spread_frames
from world_distill.vlm.options import api_key
from world_distill.vlm.pool import GaveUp, Pool
from world_distill.vlm.replies import MalformedAnswer

PATH = "/score"
FORMS = ("frames", "mp4")
_HINTS = {
    401: "the API key is missing or wrong: name its environment variable in api_key_env",
    403: "this API key may not be used here",
    404: "the address is none of a scorer's: POST ADDRESS/score has to answer (world_distill/judges/README.md)",
    405: "the address is none of a scorer's: POST ADDRESS/score has to answer (world_distill/judges/README.md)",
    413: "the request is too large: a smaller batch, fewer frames, or a smaller max_side",
}


@dataclasses.dataclass(frozen=True)
class _Sent:
    """How a clip is sent: whatever changes a number."""

    form: str
    frames: int
    max_side: int
    quality: int
    fps: float

    def __post_init__(self):
        if self.form not in FORMS or self.frames < 1 or self.max_side < 1 or not 0 <= self.quality <= 100:
            raise UserError(
                f"a scorer's server needs a form of {' or '.join(FORMS)}, frames and max_side of at least 1 and a "
                f"quality of 0 to 100, not {self.form!r}, {self.frames}, {self.max_side}, {self.quality}"
            )
        if self.fps <= 0:
            raise UserError(f"fps is the clips' frames a second, above 0, not {self.fps:g}")
        if self.form == "mp4":
            require_pyav()

    @property
    def version(self) -> str:
        if self.form == "mp4":
            return f"mp4 {self.fps:g}"
        picture = f"jpeg{self.quality}" if self.quality else "png"
        return f"{self.frames}x{self.max_side} {picture} {self.fps:g}"

    def item(self, clip: np.ndarray, task: str) -> dict[str, Any]:
        """An item of a request, about a clip [F H W 3] uint8."""
        about: dict[str, Any] = {"task": task, "fps": self.fps, "count": len(clip)}
        if self.form == "mp4":
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "clip.mp4"
                save_mp4(path, clip, self.fps)
                return about | {"video": f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"}
        numbers = spread_frames(len(clip), self.frames) if self.frames > 1 else [len(clip) - 1]
        urls = data_urls(clip, frames=numbers, max_side=self.max_side, quality=self.quality)
        return about | {"frames": urls, "numbers": numbers}


class ScorerServerJudge(AsksServers):
    """`interfaces.Judge`, of a scorer behind HTTP.

    Attributes:
      name: changes with whatever changes answers; without addresses and keys.
      measures: measure -> what is answered; they take the place of questions.
      thresholds: measure -> number above which it counts as a yes.
    """

    def __init__(
        self,
        servers: Sequence[str] = ("http://localhost:8100",),
        model: str = "",
        *,
        measures: Sequence[str] | Mapping[str, str] = ("score",),
        thresholds: Mapping[str, float] | None = None,
        api_key_env: str | None = None,
        form: str = "frames",
        frames: int = 16,
        max_side: int = 448,
        quality: int = 95,
        fps: float = 24.0,
        batch: int = 4,
        concurrency: int = 8,
        requests_per_minute: float = 0,
        timeout: float = 300,
        give_up_after: float = 900,
        tries: int = 5,
        backoff: float = 0.5,
        backoff_limit: float = 30,
    ):
        """Nothing is sent yet.

        Args:
          servers: addresses; all of them have the same scorer, at ADDRESS/score.
          model: name and version of the scorer. Stored answers of another are not used.
          measures: names of the numbers that are used, or a mapping from other names to them, such as {"task": "TA"}.
          thresholds: measure -> number above which it counts as a yes; others have no rate.
          api_key_env: environment variable with the API key; None or "" sends none.
          form: "frames" sends pictures, "mp4" the whole clip as H.264.
          frames: of a clip that are sent at most, evenly over time; 1 sends the last.
          max_side: pixels; larger pictures are shrunk.
          quality: of JPEG; 0 sends PNG.
          fps: frames a second of the clips.
          batch: clips a request.
          concurrency: requests under way at once.
          requests_per_minute: 0: no limit.
          timeout: seconds of one attempt.
          give_up_after: seconds after which a request has no answer.
          tries: failures of one request while others are answered.
          backoff: seconds before the second attempt; doubles with each.
          backoff_limit: the longest wait in seconds, but for those that the server asks for.

        Raises:
          UserError: no model, a value that is out of range, or the environment variable is not set.
        """
        if not model or batch < 1:
            raise UserError(
                f"a scorer's server needs its model, a name and version for the cache, and a batch of at least 1, not "
                f"{model!r} and {batch}"
            )
        self._measures, self._sent = Measures.of(measures, thresholds), _Sent(form, frames, max_side, quality, fps)
        self.measures, self.thresholds = self._measures.asked, self._measures.thresholds
        self._model, self._batch = model, batch
        limits = Limits(concurrency, requests_per_minute, timeout, give_up_after, tries, backoff, backoff_limit)
        urls = [servers] if isinstance(servers, str) else list(servers)
        self._client = Client(urls, api_key(api_key_env, "scorer"), limits, kind="scorer's server", hints=_HINTS)
        self._pool = Pool(self._client, self._test, path=PATH)
        self._refusals, self._answers, self._missing = Refusals(), 0, 0
        self.name = f"scorer-server-1 {model} {self._sent.version}"

    def check(self) -> list[str]:
        """Tests every server; one line for each.

        Raises:
          UserError: one cannot score, or lacks a measure.
          NoServer: none can be reached.
        """
        describe = lambda server: f"{self._model}, {server.form} about red pictures"  # noqa: E731
        return wait_for(check_servers(self._pool, describe, start="start the scorer's"))

    def health(self) -> dict[str, float]:
        """Since the last call: answers, and counts of missing numbers, refused requests and retries."""
        figures: dict[str, float] = {
            "answers": self._answers, "no_number": self._missing, "refused": self._refusals.count,
            "retries": self._pool.retries,
        }  # fmt: skip
        self._answers = self._missing = self._refusals.count = self._pool.retries = 0
        return figures

    async def _test(self, server: Server) -> str:
        """Has a server score red pictures, and says what it gave. Raises UserError, or Failure if it is not reached."""
        body = self._body([self._sent.item(probe_clip(PROBE_FRAMES), PROBE_TASK)])
        problem = ""
        for _ in range(3):
            reply = await self._client.send_patiently(server, PATH, body)
            try:
                [numbers] = read_scores(reply, 1)
            except MalformedAnswer as error:
                problem = self._client.clean(str(error))[:300]
            else:
                return self._measures.check(numbers, f"scorer's server {server.label}")
        raise UserError(
            f"scorer's server {server.label} does not answer as world_distill/judges/README.md says: {problem}"
        )

    def _body(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"model": self._model, "items": list(items)}

    async def _ask(self, requests: Sequence[JudgeRequest], done: Done) -> None:
        items = []
        for numbers in items_of(requests):
            try:
                refuse_marks(requests[numbers[0]].task)
                items.append(numbers)
            except ForbiddenText as error:
                _answer_all(numbers, str(error), done)
        batches = [items[i : i + self._batch] for i in range(0, len(items), self._batch)]
        async with self._pool.session():
            count = min(len(batches), self._pool.limits.concurrency)
            await side_by_side(batches, lambda batch: self._score(requests, batch, done), count)

    async def _score(self, requests: Sequence[JudgeRequest], batch: Sequence[Sequence[int]], done: Done) -> None:
        """All measures of some clips, in one request."""
        firsts = [requests[numbers[0]] for numbers in batch]
        sent = [await asyncio.to_thread(self._sent.item, first.clip, first.task) for first in firsts]
        try:
            found, _ = await self._pool.ask(
                lambda server: self._body(sent), lambda server, reply: read_scores(reply, len(batch))
            )
        except GaveUp as error:
            for numbers in batch:
                _answer_all(numbers, self._client.clean(str(error)), done)
            return
        except Refused as error:
            if error.of_one_request and len(batch) > 1:  # one of the clips may be meant
                for numbers in batch:
                    await self._score(requests, [numbers], done)
                return
            self._refusals.take(firsts[0].task, error)
            _answer_all(batch[0], self._client.clean(str(error)), done)
            return
        self._refusals.answered()
        for numbers, scores in zip(batch, found, strict=True):
            for i in numbers:
                answer = self._measures.answer(requests[i].name, scores)
                self._answers += answer.error is None
                self._missing += answer.error is not None
                done(i, answer)


def read_scores(text: str, count: int) -> list[dict[str, Any]]:
    """The numbers by name of each of `count` items, from the body of a reply.

    Raises:
      MalformedAnswer: not such a reply, or of another number of items.
    """
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswer(f"not JSON, or cut off ({type(error).__name__})") from error
    scores = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(scores, list) or not all(isinstance(entry, dict) for entry in scores):
        raise MalformedAnswer(f"no list of scores in it: {server_words(text)}")
    if len(scores) != count:
        raise MalformedAnswer(f"{len(scores)} scores for {count} clips")
    return scores


def _answer_all(numbers: Sequence[int], error: str, done: Done) -> None:
    for i in numbers:
        done(i, JudgeAnswer(None, error))
