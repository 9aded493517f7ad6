"""Lines for the person at the terminal: results, progress, and how figures are written.

A rate is written as `percent` writes it, everywhere: in a terminal, in a report and in README.md. Files for programs
(JSON, metrics.jsonl) hold plain numbers.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
SILENCE_SECONDS = 60.0  # after so long there is a line, although its step is not one of `every`


def say(text: str = "") -> None:
    """Writes a line to stdout: a result, not progress. In a job of several processes, one of them writes."""
    if _speaks():
        _write(sys.stdout, text)


def warn(text: str) -> None:
    """Writes a line to stderr: a note beside the results."""
    if _speaks():
        _write(sys.stderr, text)


def _write(stream: Any, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A terminal of another alphabet, or LANG=C in a container, is no reason to end hours of work.
    line = (text + "\n").encode(encoding, "replace").decode(encoding)
    try:
        stream.write(line)
        stream.flush()
    except BrokenPipeError:  # the reader, such as `| head`, is gone: a run goes on without one
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def speak_if(condition: Callable[[], bool]) -> None:
    """Makes `say` ask `condition` each time whether this process writes (`devices.hosts`)."""
    global _speaks
    _speaks = condition


def _speaks() -> bool:
    return True


# ---- How a verb ends


def finish(made: str, *where: object, then: Sequence[Sequence[object]] = ()) -> None:
    """Says what a verb has made, where it is, and what comes next; the last lines of every verb.

    Args:
      made: what there is now, such as "encoded 40 records".
      where: paths of it.
      then: calls of world-distill that come next, each as its words behind `world-distill`; the first is the usual one.
    """
    say(": ".join(filter(None, (made, ", ".join(map(str, where))))))
    for number, words in enumerate(then):
        say(f"{'  or' if number else 'next'}: {command(*words)}")


def command(*words: object) -> str:
    """A call of world-distill that a shell reads back as these words."""
    return shlex.join(["world-distill", *map(str, words)])


# ---- How figures are written


def percent(value: float) -> str:
    """A rate or share, 0 to 1, for people: 0.9917 is "99.2 %"."""
    return f"{100 * value:.1f} %"


def percent_interval(value: float, low: float, high: float) -> str:
    """A rate with its interval: "99.2 % [98.0, 99.7]"."""
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def points(value: float) -> str:
    """A difference of rates, in percentage points: 0.0124 is "+1.2"."""
    return f"{100 * value:+.1f}"


def memory(count: float) -> str:
    """Bytes of memory for people, in the units of accelerators: "345 MiB", "12.3 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def disk(count: float) -> str:
    """Bytes on a disk for people, in the units of disks: "1.5 kB", "215 GB"."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 999.5 and unit != "TB":
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if count >= 99.5 or unit == "B" else f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time for people: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    seconds = max(round(seconds), 0)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


# ---- Progress


class Progress:
    """What is done of something long: a bar on a terminal, and lines at a sensible rate where there is none.

    Both have the rate and the time that is left, which the first unit has no part in: it compiles.
    """

    def __init__(self, unit: str, total: int | None = None, *, done: int = 0, every: int = 0, shown: bool = True):
        """
        Args:
          unit: what is counted, such as "step".
          total: how many there will be; None: the first call of `at` says it.
          done: how many are there already, at no cost.
          every: units between two lines; 0: a line every `LINE_SECONDS`.
          shown: whether there is anything to see at all.
        """
        self._unit, self._total, self._done, self._every = unit, total, done, every
        self._shown, self._bar = shown, None
        self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first unit was done, and how many were then
        self._draws = shown and _can_draw()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def at(self, done: int, total: int | None = None, figures: Mapping[str, str] | None = None) -> None:
        """Says that `done` units of `total` are done; `figures` are shown as far as there is room."""
        if self._total is None and total is not None:
            self._total, self._done = total, done
        now = time.monotonic()
        if done > self._done and self._first is None:
            self._first = (now, done)
        step, self._done = done - self._done, done
        if self._draws:
            bar = self._open()
            bar.set_description_str("", refresh=False)
            bar.set_postfix_str(_fitting(figures or {}, _columns() - 58), refresh=False)
            bar.update(step)
        elif self._shown and step and self._due(now):
            self._last_line = now
            text = "".join(f"  {name} {value}" for name, value in (figures or {}).items())
            say(f"{self._unit} {done}/{self._total}{self.speed(now)}{text}")

    def note(self, text: str) -> None:
        """Says what is going on meanwhile, such as "compiling rollout"; `at` takes it away."""
        if self._draws:
            self._open().set_description_str(f"{text} ")
        elif self._shown:
            say(text)

    def speed(self, now: float | None = None) -> str:
        """Rate and time left, such as "  2.1 s a step, 12 min left"; "" before a second unit is done."""
        if self._first is None or self._total is None or self._done <= self._first[1]:
            return ""
        seconds = ((time.monotonic() if now is None else now) - self._first[0]) / (self._done - self._first[1])
        rate = (
            f"{seconds:.3g} s a {self._unit}"
            if seconds >= 1
            else f"{1 / max(seconds, 1e-9):.3g} {self._unit}s a second"
        )
        left = (self._total - self._done) * seconds
        return f"  {rate}" + (f", {duration(left)} left" if self._done < self._total else "")

    def close(self) -> None:
        """Leaves the bar as it is, on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _due(self, now: float) -> bool:
        waited = now - self._last_line
        if not self._every:
            return waited >= LINE_SECONDS
        return self._done % self._every == 0 or self._done == self._total or waited >= SILENCE_SECONDS

    def _open(self) -> Any:
        if self._bar is None:
            from tqdm import tqdm  # a twentieth of a second, for whoever asks for help

            self._bar = tqdm(
                total=self._total, initial=self._done, unit=self._unit, dynamic_ncols=True,
                bar_format="{desc}{n_fmt}/{total_fmt} |{bar:14}| {elapsed}<{remaining}, {rate_fmt}{postfix}",
            )  # fmt: skip
        return self._bar


def _can_draw() -> bool:
    """Whether stderr is a terminal that a bar can be drawn on. That of some containers has no columns."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no file of the system: a notebook's, or a test's
        return True


def _columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _fitting(figures: Mapping[str, str], width: int) -> str:
    """The first figures that fit into so many columns."""
    text = ""
    for name, value in figures.items():
        more = f"{', ' if text else ''}{name} {value}"
        if len(text) + len(more) > width:
            break
        text += more
    return text
