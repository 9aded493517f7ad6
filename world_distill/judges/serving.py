"""Parts that judges behind servers share: their test, work side by side, and requests that a server refuses.

A server that has passed its self-test and refuses a request refuses that one: a filter held a clip back, or a question
is too long. It has no answer, and the others keep theirs. Where one after another is refused, all stops.
"""

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from world_distill.errors import UserError
from world_distill.interfaces import JudgeRequest
from world_distill.judges.answering import AnswersEach, Done
from world_distill.vlm.client import Failure, Refused, Server
from world_distill.vlm.pool import Pool

MOST_REFUSED = 8  # different questions one after the other, without an answer between them

T = TypeVar("T")


class NoServer(UserError, ConnectionError):
    """No server can be reached now."""


class AsksServers(AnswersEach):
    """Base of judges that ask servers, many requests side by side."""

    def ask_each(self, requests: Sequence[JudgeRequest], done: Done) -> None:
        """Calls `done(number of the request, answer)` for each as it is answered.

        Raises:
          UserError: a server fails its self-test, refuses the key or the model, or one request after another.
        """
        if requests:
            wait_for(self._ask(requests, done))

    async def _ask(self, requests: Sequence[JudgeRequest], done: Done) -> None:
        raise NotImplementedError


class Refusals:
    """Counts refused requests, and stops when many different ones follow each other.

    Attributes:
      count: of all that were refused; whoever reads it may set it to 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self._since_the_last_answer: set[str] = set()

    def answered(self) -> None:
        """Notes that a request was answered."""
        self._since_the_last_answer.clear()

    def take(self, question: str, error: Refused) -> None:
        """Counts a refusal. Raises it again where it is about more than this question, UserError after too many."""
        if not error.of_one_request:
            raise error
        self.count += 1
        # All clips of a task share its questions: one task that is too long says nothing of the others.
        self._since_the_last_answer.add(question)
        if len(self._since_the_last_answer) >= MOST_REFUSED:
            raise UserError(
                f"the judge's server refused {len(self._since_the_last_answer)} different questions one after the "
                f"other; the last: {error}"
            ) from None


async def check_servers(pool: Pool, describe: Callable[[Server], str], *, start: str) -> list[str]:
    """Tests every server of a pool; what `describe` says of each that passes, or why it does not.

    Raises:
      UserError: one cannot judge.
      NoServer: none can be reached; `start` says how one is started.
    """
    lines = []
    async with pool.session():
        for server in pool.servers:
            try:
                await pool.prepare(server)
                lines.append(f"{server.label}: {describe(server)}")
            except Failure as failure:
                lines.append(f"{'fails its self-test' if failure.own else 'cannot be reached'}: {failure}")
    if not any(server.form for server in pool.servers):
        raise NoServer("no judge server: " + "; ".join(lines) + f" ({start})")
    return lines


async def side_by_side(items: Iterable[T], work: Callable[[T], Awaitable[None]], count: int) -> None:
    """Does `work` on every item, on `count` of them at a time; an error stops all."""
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    workers = [asyncio.create_task(worker()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def wait_for(work: Coroutine[Any, Any, Any]) -> Any:
    """Waits for a coroutine, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
