"""Lines for the person at the terminal."""

import sys
from collections.abc import Callable


def say(text: str = "") -> None:
    """Writes a line to stdout: a result, not progress. In a job of several processes, one of them writes."""
    if _speaks():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def speak_if(condition: Callable[[], bool]) -> None:
    """Makes `say` ask `condition` each time whether this process writes (`devices.hosts`)."""
    global _speaks
    _speaks = condition


def _speaks() -> bool:
    return True
