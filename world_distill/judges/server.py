"""A vision-language model behind an OpenAI-compatible server (vLLM, SGLang, hosted) as the judge.

The score is log p(yes) - log p(no) of the first answer token (`answers`). A clip's first question goes ahead, and the
others follow once it is answered, to the same server: it has the clip's part of the work then (prefix caching).
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

from world_distill.interfaces import JudgeAnswer, JudgeRequest
from world_distill.judges.answering import Done
from world_distill.judges.answers import NoVerdict, Reading, read_answer
from world_distill.judges.selftest import Form, Rules, find_form, make_body
from world_distill.judges.serving import AsksServers, Refusals, check_servers, side_by_side, wait_for
from world_distill.vlm.chat_marks import ForbiddenText, refuse_marks
from world_distill.vlm.client import Client, Limits, Refused, Server
from world_distill.vlm.options import api_key, extra_fields
from world_distill.vlm.pool import GaveUp, Pool


class ServerJudge(AsksServers):
    """`interfaces.Judge`.

    Attributes:
      name: changes with whatever changes answers; without addresses and keys.
    """

    def __init__(
        self,
        servers: Sequence[str] = ("http://localhost:8000/v1",),
        model: str = "",
        *,
        api_key_env: str | None = None,
        frames: int = 16,
        max_side: int = 448,
        quality: int = 95,
        min_mass: float = 0.5,
        extra: Mapping[str, Any] | str = "",
        concurrency: int = 64,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        timeout: float = 120,
        give_up_after: float = 900,
        tries: int = 10,
        backoff: float = 0.5,
        backoff_limit: float = 30,
    ):
        """Nothing is sent yet.

        Args:
          servers: addresses that end in /v1; all of them serve the model.
          model: its name there.
          api_key_env: environment variable with the API key; None or "" sends none.
          frames: of a clip that are shown at most: two thirds evenly over time, and those that change most.
          max_side: pixels; larger frames are shrunk.
          quality: of JPEG; 0 sends PNG.
          min_mass: probability that yes and no together need, or the answer does not count.
          extra: more fields of the request; a text is JSON.
          concurrency: requests under way at once.
          requests_per_minute: 0: no limit.
          tokens_per_minute: of requests and answers; 0: no limit.
          timeout: seconds of one attempt.
          give_up_after: seconds after which a question has no answer.
          tries: failures of one question while others are answered.
          backoff: seconds before the second attempt; doubles with each.
          backoff_limit: the longest wait in seconds, but for those that the server asks for.

        Raises:
          UserError: a value is out of range, or the environment variable is not set.
        """
        self._rules = Rules(model, frames, max_side, quality, min_mass, extra_fields(extra, "judge"))
        limits = Limits(
            concurrency, requests_per_minute, timeout, give_up_after, tries, backoff, backoff_limit, tokens_per_minute
        )
        key = api_key(api_key_env, "judge")
        self._client = Client([servers] if isinstance(servers, str) else list(servers), key, limits)
        self._pool = Pool(self._client, lambda server: find_form(self._client, server, self._rules))
        self.name = self._rules.version
        self._masses: list[float] = []
        self._no_verdict = self._bounded = 0
        self._refusals = Refusals()

    def check(self) -> list[str]:
        """Tests every server; one line for each.

        Raises:
          UserError: one cannot judge.
          NoServer: none can be reached.
        """

        def describe(server: Server) -> str:
            form: Form = server.form
            how = f"token numbers of {len(form.ids)} spellings" if form.ids else "its likeliest tokens"
            return f"{self._rules.model}, read by {how}"

        return wait_for(check_servers(self._pool, describe, start="launch/serve_judge.sh starts one"))

    def health(self) -> dict[str, float]:
        """Since the last call: answers, mass of yes and no, retries; counts of no verdict, refused and bounded."""
        masses, self._masses = self._masses, []
        figures = {
            "answers": len(masses), "mass_mean": sum(masses) / len(masses) if masses else math.nan,
            "mass_min": min(masses, default=math.nan), "no_verdict": self._no_verdict, "bounded": self._bounded,
            "refused": self._refusals.count, "retries": self._pool.retries,
        }  # fmt: skip
        self._no_verdict = self._bounded = self._refusals.count = self._pool.retries = 0
        return figures

    async def _ask(self, requests: Sequence[JudgeRequest], done: Done) -> None:
        clips: dict[int, list[int]] = {}  # the requests of each array
        for i, request in enumerate(requests):
            clips.setdefault(id(request.clip), []).append(i)
        async with self._pool.session():
            count = min(len(clips), self._pool.limits.concurrency)
            await side_by_side(clips.values(), lambda numbers: self._judge(requests, numbers, done), count)

    async def _judge(self, requests: Sequence[JudgeRequest], numbers: Sequence[int], done: Done) -> None:
        """All questions about one clip."""
        pictures = await asyncio.to_thread(self._rules.pictures, requests[numbers[0]].clip)

        async def answer(number: int, preferred: Server | None) -> Server | None:
            question = requests[number].question
            try:
                refuse_marks(question)
                reading, server = await self._pool.ask(
                    lambda server: make_body(self._rules, server.form, pictures, question),
                    lambda server, reply: read_answer(reply, server.form.ids, min_mass=self._rules.min_mass),
                    preferred,
                )
            except (GaveUp, NoVerdict, ForbiddenText) as error:
                if isinstance(error, NoVerdict):  # which is an answer
                    self._no_verdict += 1
                    self._refusals.answered()
                done(number, JudgeAnswer(None, self._client.clean(str(error))))
                return preferred
            except Refused as error:
                self._refusals.take(question, error)
                done(number, JudgeAnswer(None, self._client.clean(str(error))))
                return preferred
            self._refusals.answered()
            done(number, JudgeAnswer(self._take(reading).log_odds))
            return server

        first, *others = numbers
        server = await answer(first, None)
        await asyncio.gather(*(answer(number, server) for number in others))

    def _take(self, reading: Reading) -> Reading:
        self._masses.append(reading.mass)
        self._bounded += reading.bounded
        return reading
