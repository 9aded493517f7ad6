"""Requests to one or several equal servers: retries, and what happens while none of them answers.

A request is repeated, on any server that is up, after what may pass by itself and after a damaged answer; with a wait
that doubles each time, is drawn at random from its upper half, and is never shorter than the server asks for
(Retry-After). A refusal is passed on: whoever asks knows whether it is about this request alone. A server that fails
three times running is left alone, then tried with one request at a time. While all are down, requests wait, and the log
says so once a minute.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from absl import logging

from world_distill.vlm.client import Client, Failure, Refused, Server
from world_distill.vlm.replies import MalformedAnswer, NoVerdict

_DOWN_AFTER = 3  # failures running
_SAY_EVERY = 60.0  # seconds

Test = Callable[[Server], Awaitable[Any]]


class GaveUp(Exception):
    """No answer after all attempts; the message says why."""


class Pool:
    """Asks the servers of a client; one `session` at a time.

    Attributes:
      retries: attempts that came to nothing.
    """

    def __init__(self, client: Client, test: Test, *, path: str = "/chat/completions"):
        """`path` is what is asked, behind a server's address.

        `test` is the self-test of a server: what it returns becomes `server.form`; raises Failure or UserError.
        """
        self.client, self.limits, self.servers = client, client.limits, client.servers
        self.retries = 0
        self._test, self._path = test, path
        self._answered = 0

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Opens connections, and forgets for how long the servers have been silent."""
        self._locks = {server: asyncio.Lock() for server in self.servers}
        self._silent_since: float | None = None  # the first failure after the last answer
        self._last = "not tried yet"
        self._said = 0.0
        for server in self.servers:
            server.down_until = min(server.down_until, time.monotonic() + self.limits.backoff_limit)
        async with self.client.session():
            yield

    async def prepare(self, server: Server) -> None:
        """Runs the self-test of a server that has not passed it yet; raises as the test does."""
        asked = time.monotonic()
        async with self._locks[server]:
            if server.form is None:
                if server.tested > asked:  # in vain, while this one waited for its outcome
                    raise Failure(server.test_failure)
                try:
                    server.form = await self._test(server)
                except Failure as failure:
                    server.tested, server.test_failure = time.monotonic(), str(failure)
                    raise

    async def ask(
        self,
        body: Callable[[Server], Mapping[str, Any]],
        read: Callable[[Server, str], Any],
        preferred: Server | None = None,
    ) -> tuple[Any, Server]:
        """What `read` makes of the reply, and the server that gave it.

        Args:
          body: the request, as this server takes it.
          read: may raise MalformedAnswer, for another attempt, or NoVerdict, which is passed on.
          preferred: server to take while it is up.

        Raises:
          GaveUp: no answer after `give_up_after` seconds or `tries` failures of this request's own.
          UserError: a server refuses, or fails its self-test.
        """
        started = time.monotonic()
        failures = own = 0
        answered, failed = self._answered, None
        while True:
            server = await self._pick(preferred, failed, started)
            sent = time.monotonic()
            try:
                await self.prepare(server)
                try:
                    reply = await self.client.send(server, self._path, body(server))
                except Refused:  # which is an answer, too
                    self._succeeded(server)
                    raise
                try:
                    result = read(server, reply)
                except MalformedAnswer as error:
                    reason = self.client.clean(f"{server.label}: {error}")[:300]
                    raise Failure(reason, alive=True, own=True) from None
                except NoVerdict:
                    self._succeeded(server)
                    raise
            except Failure as failure:
                failures, failed = failures + 1, server
                self.retries += 1
                # It is this request's own failure, too, if others were answered in the meantime.
                own += failure.own or (not failure.alive and self._answered > answered)
                answered = self._answered
                self._failed(server, failure, sent)
                wait = max(self.limits.wait(failures), failure.wait)
                if own >= self.limits.tries or self._lasted(started) + wait > self.limits.give_up_after:
                    raise GaveUp(f"gave up after {failures} attempts; the last: {failure}") from None
                await asyncio.sleep(wait)
            else:
                self._succeeded(server)
                return result, server

    def _lasted(self, started: float) -> float:
        """Seconds since `started`, or since the servers fell silent if that is longer."""
        return time.monotonic() - min(started, self._silent_since or started)

    async def _pick(self, preferred: Server | None, failed: Server | None, started: float) -> Server:
        """A server that is up, or may be again; waits for one."""
        while True:
            now = time.monotonic()
            up = [server for server in self.servers if server.down_until <= now]
            if up:
                if preferred in up and preferred is not failed:
                    server = preferred
                else:
                    server = min(up, key=lambda s: (s is failed, s.in_flight, s.failures))
                if server.failures >= _DOWN_AFTER:
                    server.down_until = now + self.limits.timeout  # for others, until this attempt is over
                return server
            if self._lasted(started) > self.limits.give_up_after:
                raise GaveUp(f"no server has answered for {self._lasted(started):.0f} s; the last: {self._last}")
            self._say()
            wake = min(server.down_until for server in self.servers)
            await asyncio.sleep(min(max(wake - now, 0.001), self.limits.backoff))

    def _succeeded(self, server: Server) -> None:
        if server.failures >= _DOWN_AFTER:
            logging.info("VLM: %s answers again", server.label)
        server.failures, server.down_until, server.answered = 0, 0.0, time.monotonic()
        self._silent_since = None
        self._answered += 1

    def _failed(self, server: Server, failure: Failure, sent: float) -> None:
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        self._last = str(failure)
        if failure.alive:
            server.down_until = 0.0
        elif sent >= server.marked:  # of several requests at once, one counts
            # Nothing at all within a whole time-out: there is nobody.
            silent = server.answered < sent and now - sent >= self.limits.timeout
            before, server.failures = server.failures, max(server.failures + 1, _DOWN_AFTER if silent else 0)
            server.marked = now
            if server.failures >= _DOWN_AFTER:
                server.down_until = now + self.limits.wait(server.failures - _DOWN_AFTER + 1)
                if before < _DOWN_AFTER:
                    logging.warning("VLM: %s is left alone for now: %s", server.label, failure)
        if now - self._silent_since > _SAY_EVERY:
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._said < _SAY_EVERY or self._silent_since is None:
            return
        self._said = now
        logging.warning(
            "VLM: no server answers, for %.0f s now; going on when one does, giving up after %.0f s. The last: %s",
            now - self._silent_since, self.limits.give_up_after, self._last,
        )  # fmt: skip
