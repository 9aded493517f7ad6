"""The log of a run: one line a step, and what is left of it when a run goes on."""

import math
import sys

from world_distill.storage import metric_log


def test_a_figure_that_is_not_finite_is_null_and_a_gap(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", lambda self, *point: drawn.append(point))
    log = metric_log.MetricLog(tmp_path, 0)
    log.write(1, {"train/anchor": 0.5, "within_group/task~agent": math.nan})
    log.write(2, {"train/anchor": math.inf, "within_group/task~agent": 0.25})
    log.close()
    assert metric_log.read_log(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/anchor": 0.5, "within_group/task~agent": None},
        {"step": 2, "train/anchor": None, "within_group/task~agent": 0.25},
    ]
    assert drawn == [("train/anchor", 0.5, 1), ("within_group/task~agent", 0.25, 2)]


def test_a_run_that_goes_on_drops_what_lies_behind_its_checkpoint(tmp_path):
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = metric_log.MetricLog(tmp_path, first)
        for step in steps:
            log.write(step, {"loss": 10.0 * first + step})
        log.close()
    assert [line["loss"] for line in metric_log.read_log(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 23.0, 24.0]


def test_a_log_imports_no_torch(tmp_path, monkeypatch):
    class Watch:
        def find_spec(self, name, path=None, target=None):
            assert name.partition(".")[0] != "torch"

    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    metric_log.MetricLog(tmp_path, 0).close()
    assert "torch" not in sys.modules and "tensorboardX" in sys.modules
