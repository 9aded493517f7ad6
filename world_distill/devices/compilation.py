"""Compilation: what was compiled before is kept on disk, and where a loop should not compile any more, it is told.

The first visit of a part of the loop compiles, and so does one that calls a program for the first time. After that, a
compilation means that something changes from step to step (a shape, a type, a layout on the devices), and costs minutes
each time. JAX says when it compiles (`jax.monitoring`), and why it traces anew (`jax_explain_cache_misses`).
"""

import contextlib
import logging as python_logging
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

_EVENTS = "/jax/core/compile/"  # tracing, lowering, compiling; each with the name of the function
_COMPILED = "backend_compile_duration"
# Loggers of `jax_explain_cache_misses`: why a function is traced anew; what the cache on disk lacks.
_TRACES = "jax._src.interpreters.partial_eval"
_DISK = ("jax._src.compiler", "jax._src.compilation_cache")
_MISS = "TRACING CACHE MISS"
_FLAGS: Any = jax.config  # its attributes are made at run time


def keep_programs(platform: str) -> None:
    """Has JAX keep compiled programs from one run to the next, on accelerators, where nobody decided otherwise.

    They lie in `JAX_COMPILATION_CACHE_DIR`, or else in the user's cache folder (`XDG_CACHE_HOME`, ~/.cache) under
    world_distill/jax; `JAX_ENABLE_COMPILATION_CACHE=false` keeps none. A program is found again by all that went into
    it, compiler and device included, so results are the same with it and without. Not on a CPU unless the folder is
    set: a program compiled on one model of CPU may not run on another, and folders are shared by machines.
    """
    if platform == "cpu" or _FLAGS.jax_compilation_cache_dir or not _FLAGS.jax_enable_compilation_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "world_distill" / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as error:
        logging.warning("compiled programs are not kept: %s; set JAX_COMPILATION_CACHE_DIR", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


class Compiles:
    """Watches what JAX compiles on the thread that makes this, until `close`."""

    def __init__(self):
        self._thread = threading.get_ident()
        self._spans: list[tuple[float, float]] = []  # seconds from and to, none inside another
        self._visits: set[str] = set()
        self._found: list[tuple[str, float]] | None = None  # of the visit that is under way
        self._expected = False
        self._reasons: list[str] = []
        self._explains = not _FLAGS.jax_explain_cache_misses  # else the user wants to read them all
        python_logging.getLogger(_TRACES).addFilter(self._hear_reason)
        for name in _DISK:
            python_logging.getLogger(name).addFilter(self._no_news)
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)
        python_logging.getLogger(_TRACES).removeFilter(self._hear_reason)
        for name in _DISK:
            python_logging.getLogger(name).removeFilter(self._no_news)
        if self._explains:
            jax.config.update("jax_explain_cache_misses", False)

    @property
    def seconds(self) -> float:
        """What went into tracing and compiling so far."""
        return sum(end - start for start, end in self._spans)

    def expect(self) -> None:
        """Something new is called in this visit."""
        self._expected = True

    @contextlib.contextmanager
    def visit(self, part: str, where: str) -> Iterator[None]:
        """A part of the loop, run for one more time; `where` is told with what it compiles unexpectedly."""
        self._found, self._expected = [], part not in self._visits
        try:
            yield
        finally:
            found, self._found = self._found, None
        if not self._expected:
            for name, seconds in found:
                logging.warning("%s compiled %s again, for %.1f s: %s", where, name, seconds, self._reason(name))
        self._reasons.clear()
        self._visits.add(part)
        if self._explains:
            jax.config.update("jax_explain_cache_misses", True)

    def _reason(self, name: str) -> str:
        function = name.removeprefix("jit(").removesuffix(")")
        for text in self._reasons:
            if f"for {function} defined" in text:
                return " ".join(text.split())
        return "not traced anew, so its arguments lie on the devices in another way than before"

    def _hear_reason(self, record: python_logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(_MISS):
            return True
        self._reasons.append(text)
        return not self._explains

    def _no_news(self, record: python_logging.LogRecord) -> bool:
        """Whether a record says more than that a program was not on disk, and whether the program was put there."""
        news = ("PERSISTENT", "Not writing persistent", "Writing ")
        return not self._explains or not record.getMessage().startswith(news)

    def _hear(self, event: str, duration_secs: float, **kwargs) -> None:
        if not event.startswith(_EVENTS) or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        start = end - duration_secs
        # A function is traced inside of the one that calls it.
        while self._spans and self._spans[-1][0] >= start:
            self._spans.pop()
        self._spans.append((start, end))
        if event.endswith(_COMPILED) and self._found is not None:
            self._found.append((kwargs.get("fun_name", "a program"), duration_secs))
