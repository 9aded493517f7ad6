"""Being told to stop: a run saves at the end of its step, and its exit code asks to be started again."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from world_distill import console


class Preempted(Exception):
    """The run was told to stop, and has saved; the message says at which step."""

    exit_code = 75  # of the command (EX_TEMPFAIL): launchers start it again


class Interruption:
    """Watches for SIGTERM (a preemption notice) and Ctrl-C, from `watch` to `close`.

    The first one is noted, the second one acts as usual. In a job of several processes JAX's own service watches for
    SIGTERM, so that all stop after the same step; there, Ctrl-C acts as usual.
    """

    def __init__(self):
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Takes note of signals from now on, in a single process's main thread."""
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Has signals act as they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        told = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        console.warn(f"\n{told}: saving after this step; once more ends at once")
        self._caught = number
        for caught, handler in self._before.items():
            signal.signal(caught, handler)

    def asked(self, step: int) -> bool:
        """Whether to save and stop after `step`: the same on every process, which all ask this once a step."""
        if jax.process_count() == 1:
            return self._caught is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def stop(self, step: int) -> None:
        """Ends a run that has saved.

        Raises:
          KeyboardInterrupt: it was Ctrl-C.
          Preempted: it was SIGTERM.
        """
        if self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(f"told to stop: saved after step {step}; the same command goes on from there")
