"""A vision-language model behind an OpenAI-compatible server (vLLM, SGLang, hosted) as the annotator.

One request a picture asks whether there is anything to do in it, and for all its tasks with their solutions. An answer
that cannot be read, is cut off, or declines is asked for again, at first with the same seed, which mends what was an
accident, and then with others; of answers that are all cut off, the one with most pairs is taken.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from world_distill.data.annotation.pair_parsing import Parsed
from world_distill.data.annotation.prompt import load_prompt
from world_distill.data.annotation.request import Settings, read_pairs
from world_distill.data.annotation.selftest import find_form
from world_distill.errors import Unreachable, UserError
from world_distill.interfaces import AnnotationError, TaskPair
from world_distill.vlm.background import Background
from world_distill.vlm.client import Client, Failure, Limits, Refused, Server
from world_distill.vlm.options import api_key, extra_fields
from world_distill.vlm.pool import GaveUp, Pool
from world_distill.vlm.replies import MalformedAnswer

_SEEDS = 2**31


class ServerAnnotator:
    """`interfaces.Annotator`; `annotate` may be called from `concurrency` threads at once.

    Attributes:
      name: changes with whatever changes answers, the prompt included; without addresses and keys.
      concurrency: requests under way at once.
    """

    def __init__(
        self,
        servers: Sequence[str] = ("http://localhost:8000/v1",),
        model: str = "",
        *,
        api_key_env: str | None = None,
        prompt: str = "",
        seconds: float = 5.0,
        max_side: int = 1024,
        quality: int = 95,
        max_tokens: int = 4096,
        temperature: float = 0.7,
        thinking: bool = False,
        extra: Mapping[str, Any] | str = "",
        concurrency: int = 32,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        timeout: float = 300,
        give_up_after: float = 1800,
        tries: int = 5,
        backoff: float = 0.5,
        backoff_limit: float = 30,
    ):
        """Nothing is sent yet.

        Args:
          servers: addresses that end in /v1; all of them serve the model.
          model: its name there.
          api_key_env: environment variable with the API key; None or "" sends none.
          prompt: folder of the texts (see `prompt`); "": the package's own.
          seconds: length of the clips in which a task has to be done.
          max_side: pixels; larger pictures are shrunk.
          quality: of JPEG; 0 sends PNG.
          max_tokens: of an answer; about 250 a pair, and what it thinks.
          temperature: of sampling.
          thinking: the model may think first; needs more max_tokens.
          extra: more fields of the request; a text is JSON.
          concurrency: requests under way at once.
          requests_per_minute: 0: no limit.
          tokens_per_minute: of requests and answers; 0: no limit.
          timeout: seconds of one attempt.
          give_up_after: seconds after which a picture has no answer.
          tries: failures of one picture while others are answered, unreadable answers included.
          backoff: seconds before the second attempt; doubles with each.
          backoff_limit: the longest wait in seconds, but for those that the server asks for.

        Raises:
          UserError: a value is out of range, the prompt cannot be read, or the environment variable is not set.
        """
        try:
            texts = load_prompt(prompt or None)
        except (ValueError, OSError) as error:
            raise UserError(f"annotator.options.prompt: {error}") from error
        self._settings = settings = Settings(
            model,
            texts,
            seconds,
            max_side,
            quality,
            max_tokens,
            temperature,
            thinking,
            extra_fields(extra, "annotator"),
        )
        limits = Limits(
            concurrency, requests_per_minute, timeout, give_up_after, tries, backoff, backoff_limit, tokens_per_minute
        )
        self._client = client = Client(
            [servers] if isinstance(servers, str) else list(servers), api_key(api_key_env, "annotator"), limits
        )
        self._pool = Pool(client, lambda server: find_form(client, server, settings))
        self._background = Background(self._pool.session)
        self._counts: collections.Counter[str] = collections.Counter()
        self.name, self.concurrency = settings.version, concurrency

    def __repr__(self) -> str:
        return f"ServerAnnotator({self.name!r})"

    def annotate(self, image: np.ndarray, *, max_pairs: int, seed: int) -> list[TaskPair]:
        """Tasks and solutions for one image [H W 3] uint8, unchecked; [] when there is nothing to do in it.

        Raises:
          AnnotationError: no usable answer after all attempts, or the servers refuse this picture.
          UserError: a server refuses what will not change by asking again, or fails its self-test.
        """
        url = self._settings.url(image)
        return self._background.run(lambda: self._annotate(url, max_pairs, seed))

    def check(self) -> list[str]:
        """Tests every server; one line for each.

        Raises:
          UserError: one is of no use, or none can be reached (Unreachable).
        """
        return self._background.run(self._check)

    def health(self) -> dict[str, float]:
        """Since the last call: answers, pairs, empty (nothing to do), partial, not_understood, failed, retries."""
        counts, self._counts = self._counts, collections.Counter()
        names = ("answers", "pairs", "empty", "partial", "not_understood", "failed")
        figures = {name: float(counts[name]) for name in names} | {"retries": float(self._pool.retries)}
        self._pool.retries = 0
        return figures

    def close(self) -> None:
        """Closes connections; another call opens them again."""
        self._background.close()

    async def _annotate(self, url: str, max_pairs: int, seed: int) -> list[TaskPair]:
        settings = self._settings
        fields = {"max_pairs": max_pairs, "seconds": settings.seconds}
        before, after = settings.prompt.before(**fields), settings.prompt.after(**fields)
        unusable: list[Parsed] = []

        def body(server: Server) -> dict[str, Any]:
            number = (seed + max(0, len(unusable) - 1)) % _SEEDS
            return settings.body(server.form, url, before=before, after=after, seed=number)

        def read(server: Server, reply: str) -> Parsed:
            parsed = read_pairs(reply, self._client.clean, settings.prompt)
            if parsed.cut_off or not (parsed.pairs or parsed.nothing_to_do):
                unusable.append(parsed)
                raise MalformedAnswer("an answer that is cut off" if parsed.cut_off else "; ".join(parsed.problems))
            return parsed

        try:
            parsed, _ = await self._pool.ask(body, read)
        except GaveUp as error:
            parsed = max(unusable, key=lambda one: len(one.pairs), default=None)
            if parsed is None or not parsed.pairs:
                raise self._failure(error) from None
            self._counts["partial"] += 1
            logging.warning("annotator: %d pairs of an answer that is cut off; max_tokens?", len(parsed.pairs))
        except Refused as error:
            if not error.of_one_request:
                raise
            raise self._failure(error) from None
        return self._take(parsed)

    def _failure(self, error: Exception) -> AnnotationError:
        self._counts["failed"] += 1
        return AnnotationError(self._client.clean(str(error)))

    def _take(self, parsed: Parsed) -> list[TaskPair]:
        self._counts.update(
            answers=1, pairs=len(parsed.pairs), empty=parsed.nothing_to_do, not_understood=len(parsed.problems)
        )
        if parsed.problems:
            logging.info("annotator: not understood: %s", "; ".join(parsed.problems)[:300])
        return list(parsed.pairs)

    async def _check(self) -> list[str]:
        lines = []
        for server in self._pool.servers:
            try:
                await self._pool.prepare(server)
                lines.append(f"{server.label}: {self._settings.model}, asked for {server.form.output}")
            except Failure as failure:
                lines.append(f"{'fails its self-test' if failure.own else 'cannot be reached'}: {failure}")
        if not any(server.form for server in self._pool.servers):
            raise Unreachable("no annotator server: " + "; ".join(lines) + " (launch/serve_judge.sh starts one)")
        return lines
