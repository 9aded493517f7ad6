"""An event loop in a thread of its own, for objects that are called from ordinary threads."""

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any


class Background:
    """Keeps one session open on its loop, from the first call until `close`, or until it is collected."""

    def __init__(self, session: Callable[[], contextlib.AbstractAsyncContextManager]):
        self._session = session
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Waits for the coroutine that `work` returns; from any thread but the loop's own."""
        with self._lock:
            if self._stop is None:
                self._loop, stop = _start(self._session)
                # Also called when the interpreter ends.
                self._stop = weakref.finalize(self, stop)
            assert self._loop is not None  # it has been started
            future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # where waiting was interrupted
            raise

    def close(self) -> None:
        """Closes the session and ends the thread; what is still waited for is cancelled."""
        with self._lock:
            stop, self._stop = self._stop, None
        if stop is not None:
            stop()


def _start(session: Callable[[], contextlib.AbstractAsyncContextManager]) -> tuple[Any, Callable[[], None]]:
    """(loop, function that ends it). Raises what the session raises when it is opened."""
    started: concurrent.futures.Future = concurrent.futures.Future()

    async def serve() -> None:
        stopped = asyncio.Event()
        try:
            async with session():
                started.set_result((asyncio.get_running_loop(), stopped))
                await stopped.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=_run, args=[serve()], daemon=True, name="vlm")
    thread.start()
    loop, stopped = started.result()

    def stop() -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(stopped.set)
        if threading.current_thread() is not thread:
            thread.join(5)

    return loop, stop


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Like `asyncio.run`, which starts another thread at its end: when the interpreter ends, too late."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(work)
    finally:
        loop.run_until_complete(_cancel_others())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
