"""Work in threads with results in order, and a bounded number of them in memory."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ordered(function: Callable[[T], R], items: Iterable[T], *, threads: int | None = None) -> Iterator[R]:
    """`map`, in threads (a core each, up to 8, by default), at most twice as many items ahead as there are threads.

    `items` is read by the caller's thread. What `function` raises is raised at that item's turn.
    """
    threads = threads or min(8, os.cpu_count() or 1)
    waiting = collections.deque()
    pool, waits = ThreadPoolExecutor(threads), True
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except GeneratorExit:
        # The garbage collector may close this in any thread. A thread of a pool that is just starting holds a lock of
        # `threading` which a join needs too, and would wait for itself.
        waits = False
        raise
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)
