"""One attempt at one request to an OpenAI-compatible server, within the limits of all requests together.

What goes wrong is either a `Failure`, after which another attempt may succeed (no connection, a reset, a time-out, 408,
409, 425, 429, 5xx), or `Refused`, after which it will not.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from world_distill.errors import UserError
from world_distill.vlm.complaints import advice, is_final, is_page, server_words
from world_distill.vlm.tokens import TokenBudget, used_tokens

_PASSING = {408, 409, 425, 429}  # and 5xx
_OF_ONE_REQUEST = {400, 413, 422, 500, 501}  # a filter, a text too long, a picture that cannot be read
_CHAT_HINTS = {
    401: "the API key is missing or wrong: name its environment variable in api_key_env",
    403: "this API key may not use the model",
    404: "the address does not end in /v1 as it should, or the model has another name",
    405: "the address does not end in /v1 as it should",
    413: "the request is too large: fewer frames, or a smaller max_side",
    429: "the account's quota is used up",
}
_CONNECT = 20.0  # seconds until a server takes a connection


class Refused(UserError):
    """The server does not take this request, nor will it the next time.

    Attributes:
      status: of HTTP.
      words: the server's own.
    """

    def __init__(self, message: str, status: int, words: str = ""):
        super().__init__(message)
        self.status, self.words = status, words

    @property
    def of_one_request(self) -> bool:
        """Whether it is about this request and not about all, from a server that has passed its self-test."""
        return self.status in _OF_ONE_REQUEST


class Failure(Exception):
    """One attempt came to nothing; another may not.

    Attributes:
      wait: seconds that the server asks to wait.
      alive: the server is there, busy or with a damaged answer.
      own: it is likely to be about this request, and not about the server.
    """

    def __init__(self, reason: str, *, wait: float = 0.0, alive: bool = False, own: bool = False):
        super().__init__(reason)
        self.wait, self.alive, self.own = wait, alive, own


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds and counts.

    Attributes:
      concurrency: requests under way at once, over all servers.
      requests_per_minute: over all servers; 0: no limit.
      timeout: of one attempt.
      give_up_after: seconds since a request's first attempt.
      tries: failures of one request while others are answered, or of a kind that is its own.
      backoff: wait before the second attempt.
      backoff_limit: the longest wait.
      tokens_per_minute: of requests and answers, over all servers; 0: no limit.
    """

    concurrency: int
    requests_per_minute: float
    timeout: float
    give_up_after: float
    tries: int
    backoff: float
    backoff_limit: float
    tokens_per_minute: float = 0.0

    def __post_init__(self):
        if self.concurrency < 1 or self.tries < 1 or min(self.requests_per_minute, self.tokens_per_minute) < 0:
            raise UserError(
                "a VLM server needs concurrency and tries of at least 1, requests_per_minute and tokens_per_minute of "
                "at least 0"
            )
        if min(self.timeout, self.give_up_after, self.backoff, self.backoff_limit) <= 0:
            raise UserError("a VLM server's timeout, give_up_after, backoff and backoff_limit are above 0 seconds")

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures (1, 2, ...)."""
        longest = min(self.backoff_limit, self.backoff * 2 ** min(failures - 1, 30))
        return longest * random.uniform(0.5, 1.0)


class Server:
    """An address with what is known about it."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("a VLM server is written like http://host:8000/v1")
        self.url = url.rstrip("/")
        self.password = parts.password
        self.label = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
        self.form: Any = None  # how it is asked; the self-test finds out
        self.kind = ""  # "vllm", "llamacpp", ... where its list of models says so
        self.in_flight = 0
        self.failures = 0  # running
        self.marked = self.answered = self.down_until = 0.0  # last counted failure, last answer, end of the pause
        self.tested, self.test_failure = 0.0, ""  # when the self-test was last in vain, and why

    def __repr__(self) -> str:
        return f"Server({self.label})"


class Client:
    """Sends requests to servers; one `session` at a time, on one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        limits: Limits,
        *,
        kind: str = "VLM server",
        hints: Mapping[int, str] | None = None,
    ):
        """
        Args:
          urls: addresses of equal servers.
          key: API key; None sends none.
          limits: of all requests together.
          kind: what messages call a server.
          hints: what would help by the status of a refusal; None: what helps with the chats of VLMs.
        """
        if not urls:
            raise UserError("name at least one server of the VLM")
        self.servers = [Server(url) for url in urls]
        self.limits = limits
        self._key, self._kind, self._hints = key, kind, hints
        self._secrets = [text for text in (key, *(server.password for server in self.servers)) if text]
        self._next_start = 0.0
        self._tokens = TokenBudget(limits.tokens_per_minute)
        # These log each request with its address.
        for name in ("httpx", "httpx2", "openai"):
            logging.getLogger(name).setLevel(logging.WARNING)

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Opens connections. Raises UserError without the package `openai`."""
        try:
            from openai import AsyncOpenAI, Timeout
        except ImportError as error:
            raise UserError("VLM servers need the extra `vlm`: pip install -e '.[vlm]'") from error
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._tokens.open()
        # An address at which nobody is may keep silent for ever.
        timeout = Timeout(self.limits.timeout, connect=min(_CONNECT, self.limits.timeout))
        settings = {"api_key": self._key or "none", "max_retries": 0, "timeout": timeout}
        async with contextlib.AsyncExitStack() as stack:
            self._clients = {
                server: await stack.enter_async_context(AsyncOpenAI(base_url=server.url, **settings))
                for server in self.servers
            }
            yield

    async def send(self, server: Server, path: str, body: Mapping[str, Any] | None = None) -> str:
        """One attempt: GET, or POST of `body` as JSON; the reply's text. `path` may be a whole address.

        Raises:
          Failure: another attempt may succeed.
          Refused: it will not.
        """
        import openai

        client = self._clients[server]
        async with self._slots:
            await self._pace()
            charged = await self._tokens.charge(body)
            server.in_flight += 1
            try:
                # The client's own time-outs are between two pieces of a reply.
                async with asyncio.timeout(self.limits.timeout):
                    if body is None:
                        return await client.get(path, cast_to=str)
                    reply = await client.post(path, cast_to=str, body=body)
                if charged:
                    self._tokens.settle(charged, used_tokens(reply))
                return reply
            except (TimeoutError, openai.APITimeoutError):
                # The server may have worked on it: it stays charged.
                problem: Exception = Failure(f"{server.label}: no answer within {self.limits.timeout:g} s")
            except openai.APIStatusError as error:
                self._tokens.settle(charged, 0)
                problem = self._status_error(server, error)
            except openai.OpenAIError as error:
                self._tokens.settle(charged, 0)
                cause = error.__cause__ or error  # what went wrong
                problem = Failure(self.clean(f"{server.label}: {type(cause).__name__}: {cause}")[:300])
            finally:
                server.in_flight -= 1
        # Raised above, it would carry the request and the key along, as its context.
        raise problem

    async def send_patiently(self, server: Server, path: str, body: Mapping[str, Any] | None = None) -> str:
        """Up to four attempts on one server. Raises as `send` does."""
        told = ""
        for attempt in range(1, 5):
            try:
                return await self.send(server, path, body)
            except Failure as failure:
                # A server that dies of a request says why once, and then nothing.
                told = told or (str(failure) if failure.own else "")
                if attempt == 4:
                    if told and not failure.own:
                        raise Failure(
                            f"{failure}; before that: {told}", wait=failure.wait, alive=failure.alive
                        ) from None
                    raise
                await asyncio.sleep(min(max(self.limits.wait(attempt), failure.wait), self.limits.backoff_limit))
        raise AssertionError

    def clean(self, text: str) -> str:
        """`text` without key and passwords, which servers like to repeat in their complaints."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def _pace(self) -> None:
        if not self.limits.requests_per_minute:
            return
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + 60 / self.limits.requests_per_minute
        await asyncio.sleep(start - now)

    def _status_error(self, server: Server, error: Any) -> Exception:
        status, body = error.status_code, error.response.text
        words = self.clean(server_words(body))
        text = words or "no words with it"
        # A quota that is used up has the status of too many requests, but will not come back by itself.
        passing = status in _PASSING and "insufficient_quota" not in body
        # Some servers report with status 500 what they will never do.
        if passing or (status >= 500 and status != 501 and not (status == 500 and is_final(words))):
            reason = f"{server.label}: status {status}: {text[:200]}"
            return Failure(reason, wait=_asked_wait(error), alive=status in _PASSING, own=status == 500)
        page = "this is no answer of a model's server: a gateway or a proxy stands between, or the address is another's"
        told = page if is_page(body) else "" if self._hints else advice(words, server.kind)
        told = told or (self._hints or _CHAT_HINTS).get(
            status, "the server does not take such a request: see its message"
        )
        return Refused(f"{self._kind} {server.label} refused with status {status}: {text}\n  {told}", status, words)


def _asked_wait(error: Any) -> float:
    """Seconds that the reply asks to wait, in any of the forms in use; 0 if it does not."""
    headers = error.response.headers
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) * unit
            return seconds if 0 <= seconds < 1e6 else 0.0
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    return 0.0
