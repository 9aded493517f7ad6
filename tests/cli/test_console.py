"""What people read at a terminal: results, progress with and without a terminal, and how figures are written."""

import io
import os
import re
import sys

import pytest

from world_distill import console


@pytest.mark.parametrize(
    ("value", "text"), [(0.9917, "99.2 %"), (1.0, "100.0 %"), (0.0004, "0.0 %"), (0.0395, "4.0 %"), (0.5, "50.0 %")]
)
def test_a_rate_is_written_in_one_form(value, text):
    assert console.percent(value) == text


def test_a_rate_has_its_interval_behind_it_and_a_difference_its_sign():
    assert console.percent_interval(0.979, 0.962, 0.988) == "97.9 % [96.2, 98.8]"
    assert (console.points(0.018), console.points(-0.057)) == ("+1.8", "-5.7")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (99_600, "100 kB"), (2e11, "200 GB"), (3e15, "3000 TB")],
)
def test_sizes_on_a_disk_are_written_for_people(count, text):
    assert console.disk(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5400, "90 min"), (12_000, "3 h 20 min"), (190_000, "2 d 4 h")],
)
def test_a_time_is_written_for_people(seconds, text):
    assert console.duration(seconds) == text


def test_a_verb_ends_with_what_it_made_where_and_calls_that_a_shell_reads_back(capsys):
    console.finish("made 2 clips", "my clips", then=[("report", "--workdir", "a b"), ("export", "--workdir", "a b")])
    assert capsys.readouterr().out.splitlines() == [
        "made 2 clips: my clips",
        "next: world-distill report --workdir 'a b'",
        "  or: world-distill export --workdir 'a b'",
    ]


def test_a_terminal_of_another_alphabet_ends_no_run(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console.say("54.5 → 97.9 %, “so” – 過曝")
    assert stream.buffer.getvalue().decode("ascii") == "54.5 ? 97.9 %, ?so? ? ??\n"


def test_a_run_goes_on_when_nobody_reads_its_lines_any_more(monkeypatch, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return file.fileno()

    with (tmp_path / "pipe").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Closed())
        console.say("line")


# ---- Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def steps(progress, clock, seconds, count, first=1):
    for step in range(first, first + count):
        clock[0] += seconds
        progress.at(step, figures={"reward": "0.31", "task": "61.2 %"})


def test_off_a_terminal_there_is_a_line_every_so_many_steps_with_rate_and_time_left(clock, capsys):
    with console.Progress("step", 100, every=10) as progress:
        progress.note("compiling rollout")
        clock[0] += 300.0  # which counts for no rate
        steps(progress, clock, 2.0, 20)
    assert capsys.readouterr().out.splitlines() == [
        "compiling rollout",
        "step 1/100  reward 0.31  task 61.2 %",  # since nothing was said for minutes
        "step 10/100  2 s a step, 3 min left  reward 0.31  task 61.2 %",
        "step 20/100  2 s a step, 3 min left  reward 0.31  task 61.2 %",
    ]


def test_slow_steps_say_something_each_minute_and_quick_records_only_now_and_then(clock, capsys):
    with console.Progress("step", 100, every=50) as progress:
        steps(progress, clock, 45.0, 4)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["2/100", "4/100"]
    with console.Progress("record") as progress:
        progress.at(0, 1000)
        for done in range(1, 1001):
            clock[0] += 0.025
            progress.at(done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["400/1000", "800/1000"]
    assert lines[0].endswith("40 records a second, 15 s left")


def test_a_short_job_off_a_terminal_and_a_process_that_is_not_to_speak_say_nothing(clock, capsys):
    with console.Progress("record") as progress:
        progress.at(0, 3)
        progress.at(3, 3)
    with console.Progress("step", 3, every=1, shown=False) as progress:
        progress.note("compiling rollout")
        progress.at(3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("why", ["dumb", "no columns", "a file"])
def test_what_no_bar_can_be_drawn_on_gets_lines(why, monkeypatch, clock, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: why != "a file", raising=False)
    monkeypatch.setattr("sys.stderr.fileno", lambda: 2, raising=False)
    monkeypatch.setenv("TERM", "dumb" if why == "dumb" else "xterm")
    monkeypatch.setattr(console.os, "get_terminal_size", lambda fd: os.terminal_size((0, 0)))
    with console.Progress("step", 3, every=1) as progress:
        progress.at(1)
    assert capsys.readouterr().out == "step 1/3\n"


@pytest.mark.parametrize("columns", [100, 80, 160])
def test_on_a_terminal_a_bar_and_figures_share_the_line(columns, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    figures = {"anchor": "0.0123", "reward": "0.312", "task": "61.2 %", "agent": "97.1 %", "consistency": "88.0 %",
               "ratio": "1.02", "s": "2.07", "judge_s": "0.4", "TFLOP/s": "88.1", "goodput": "91.0 %"}  # fmt: skip
    with console.Progress("step", 74) as progress:
        progress.note("compiling rollout")
        progress.at(1, figures=figures)
        progress.at(9, figures=figures)
    drawn = [text for text in re.split(r"[\r\n]", terminal.getvalue()) if text.strip()]
    assert any(text.startswith("compiling rollout") for text in drawn)
    last = drawn[-1]
    assert re.match(r"9/74 \|.{14}\| \d\d:\d\d<\S+, .+anchor 0.0123", last) and len(last.rstrip()) <= columns
    assert ("consistency 88.0 %" in last) == (columns == 160)
