"""Rates, intervals and break-downs against plain counting; the evaluator's clips."""

import argparse
import math

import numpy as np
import pytest
from small import make_inputs, small_config

from world_distill import components, evaluate, runs
from world_distill.data.records import RecordReader
from world_distill.scoring import Verdict, breakdown, markdown, summarise


def verdict(i, task, agent, consistency, kind="go"):
    scores = {"task": task, "agent": agent, "consistency": consistency}
    return Verdict(str(i), f"[red disc]: Task {i}.", "red disc", kind, scores)


VERDICTS = [verdict(0, 1, 1, 1), verdict(1, 1, 1, 0), verdict(2, 0, 1, 1, "push"), verdict(3, 0, 0, 0, "push")]


def test_summary_counts():
    row = summarise("x", VERDICTS)
    assert (row["task"], row["agent"], row["consistency"]) == (0.5, 0.75, 0.5)
    assert row["average"] == pytest.approx(7 / 12)
    assert row["all"] == 0.25
    assert (row["n"], row["invalid"]) == (4, 0)
    low, high = row["ci95"]["task"]
    # Wilson's interval is where (p - rate)^2 = z^2 p (1 - p) / n.
    for p in (low, high):
        assert (p - 0.5) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 4)
    values = np.array([1, 2 / 3, 2 / 3, 0])
    low, high = row["ci95"]["average"]
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 2)


def test_clips_that_could_not_be_checked_are_counted_and_left_out():
    row = summarise("x", [*VERDICTS, verdict(9, math.nan, 1, 1)])
    assert (row["n"], row["invalid"], row["task"]) == (4, 1, 0.5)
    empty = summarise("x", [verdict(9, math.nan, 1, 1)])
    assert empty["task"] is None and "–" in markdown([empty])


def test_breakdown_and_table():
    rows = breakdown("x", VERDICTS, "kind")
    assert [(r["group"], r["n"], r["task"]) for r in rows] == [("go", 2, 1.0), ("push", 2, 0.0)]
    assert breakdown("x", VERDICTS, "agent")[0]["agent"] == 0.75  # the rate, not the name
    text = markdown(rows, first=("group", "name"))
    assert text.splitlines()[0].startswith("| group | name | task |")
    assert "| push | x | 0.000 [0.000, 0.658] |" in text


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    config = small_config(folder, **{"scenes.test": 4})
    mesh = components.start_devices(config)
    family = components.make_family(config)
    return config, mesh, family, components.load_base(family, config, mesh), RecordReader(folder / "data", "test")


def clips_of(parts, batch, **kwargs):
    config, mesh, family, base, reader = parts
    with config.unlocked():
        config.evaluate_batch = batch
    evaluator = runs.make_evaluator(config, family, mesh, components.make(config, "benchmark"))
    clips = {}
    verdicts = evaluator.run(reader, base, None, text="task", keep=clips.__setitem__, **kwargs)
    return clips, verdicts


def test_a_clip_does_not_depend_on_the_batch(parts):
    small, verdicts = clips_of(parts, 2)
    large, again = clips_of(parts, 8)
    assert list(small) == list(large) and len(small) == 4
    for name in small:
        # Another batch size is another program: the last bit may differ, and a byte where it rounds.
        assert np.abs(small[name].astype(int) - large[name]).max() <= 1
    assert [v.id for v in verdicts] == [v.id for v in again]


def test_limit(parts):
    assert len(clips_of(parts, 2, limit=3)[1]) == 3


def test_rates_are_those_of_the_benchmark(parts):
    clips, verdicts = clips_of(parts, 8)
    config, _, _, _, reader = parts
    benchmark = components.make(config, "benchmark")
    records = list(reader)
    scores = benchmark.check(
        np.stack([clips[r.id] for r in records]), [r.task for r in records], [r.image_png for r in records]
    )
    for question, values in scores.items():
        assert [v.scores[question] for v in verdicts] == list(values)


def test_unknown_roles_are_named(tmp_path):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    args = parser.parse_args(["--workdir", str(tmp_path), "--roles", "teacher"])
    with pytest.raises(evaluate.UserError, match="teacher"):
        evaluate.run(args)
