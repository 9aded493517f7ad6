"""Asks an annotator about images, from as many threads as it can serve; each answer goes at once into the journal."""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from world_distill.data.annotation.journal import Journal
from world_distill.data.records.reader import RecordError
from world_distill.errors import Unreachable
from world_distill.interfaces import AnnotationError, Annotator

_SAMPLE = 20  # images; a share of fewer says nothing yet
_WAIT, _BETWEEN = 60.0, 3.0  # seconds in which a server may start, and between two looks at it


class Questions:
    """A context manager; at its end every question has its answer, or has failed.

    The first error other than AnnotationError stops the asking; answers under way are still waited for and kept.
    """

    def __init__(
        self,
        annotator: Annotator,
        journal: Journal,
        *,
        max_pairs: int,
        seed: int,
        max_failures: float,
        settled: Callable[[], None],
    ):
        """`max_failures` is a share of all images that were `ask`ed or `remember`ed; `settled` is called for each."""
        self.failed: dict[str, str] = {}  # why there is no answer, by image hash
        self.asked = 0  # answers
        self._annotator, self._journal = annotator, journal
        self._max_pairs, self._seed, self._max_failures, self._settled = max_pairs, seed, max_failures, settled
        self._count, self._error, self._is_ready = 0, None, False
        threads = max(1, int(getattr(annotator, "concurrency", 1)))
        self._free, self._lock, self._pool = threading.Semaphore(threads), threading.Lock(), ThreadPoolExecutor(threads)

    def __enter__(self) -> "Questions":
        return self

    def __exit__(self, kind, *_):
        self._error = self._error or kind  # an error elsewhere: nothing more is asked
        if kind is not None:
            logging.warning("stopping (%s): the answers under way are waited for and kept", kind.__name__)
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._check(self._count)

    def remember(self) -> None:
        """Counts an image whose answer is in the journal."""
        with self._lock:
            self._count += 1
            self._settled()

    def ask(self, digest: str, pixels: np.ndarray, where: str) -> None:
        """Has the image asked about as soon as a thread is free, and waits until then.

        Raises Unreachable at the first question, if no server is there within a minute.
        """
        if not self._is_ready:
            self._reach()
        self._free.acquire()
        self._check(max(self._count, _SAMPLE))
        self._pool.submit(self._ask, digest, pixels, where)

    def _reach(self) -> None:
        """Waits until the annotator can be asked, if it can tell; for a minute, since a typing error never answers."""
        started, check = time.monotonic(), getattr(self._annotator, "check", None)
        while check is not None:
            try:
                check()
                break
            except Unreachable as error:
                if time.monotonic() - started > _WAIT:
                    raise
                logging.warning("%s; asking again for up to %.0f s", error, _WAIT)
                time.sleep(_BETWEEN)
        self._is_ready = True

    def _check(self, count: int) -> None:
        """Raises what has stopped the asking, or RecordError if too many of `count` have failed."""
        if self._error is not None:
            raise self._error
        if len(self.failed) > self._max_failures * count:
            raise RecordError(
                f"the annotator has failed on {len(self.failed)} of {self._count} images, more than the share of"
                f" {self._max_failures:g} that may (the last: {list(self.failed.values())[-1]}); the answers are kept:"
                " start again to ask about the others"
            )

    def _ask(self, digest: str, pixels: np.ndarray, where: str) -> None:
        image_seed = int(hashlib.sha256(f"{self._seed} {digest}".encode()).hexdigest()[:7], 16)
        failure = None
        try:
            if self._error is not None:
                return
            try:
                pairs = self._annotator.annotate(pixels, max_pairs=self._max_pairs, seed=image_seed)
                self._journal.add(digest, pairs)
            except AnnotationError as error:
                failure = str(error) or "no answer"
                logging.warning("%s: no annotation: %s", where, failure)
            with self._lock:
                self._count += 1
                if failure is None:
                    self.asked += 1
                else:
                    self.failed[digest] = failure
                self._settled()
        except BaseException as error:
            error.add_note(f"while annotating {where}; start again to go on from there")
            self._error = self._error or error
        finally:
            self._free.release()
