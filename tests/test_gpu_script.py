"""`tests/benchmarks/gpu.py`: its dry run on a CPU, and what it makes of measurements."""

import json
import sys

import pytest

from tests.benchmarks import gpu

pytestmark = pytest.mark.once


def test_dry_run_goes_through_every_part(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run"])
    assert gpu.main() == 0, capsys.readouterr().out[-3000:]
    found = json.loads(capsys.readouterr().out)

    single, half = found["parity"]["float32"], found["parity"]["bfloat16"]
    assert single == {"attention": "xla", "velocity": 0.0, "gradients": 0.0}  # one device against itself
    assert 1e-4 < half["velocity"] < gpu.LIMITS["bfloat16"] and half["gradients"] > 1e-4
    assert [row["name"] for row in found["quickstart"]["rows"]] == ["base", "demonstrator", "executor"]
    parts = found["speed"]["parts"]
    assert parts.keys() == {"forward", "all", "lora"}
    assert all(part["seconds"]["ours"] > 0 and part["mfu"] is None for part in parts.values())


def test_a_part_that_takes_too_long_stops_no_other(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--only", "quickstart", "parity"])
    monkeypatch.setitem(gpu.SECONDS, "quickstart", 0.1)
    assert gpu.main() == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {"quickstart": "not done after 0.1 s"} and found["parity"]["device"]


def test_speed_is_a_ratio_to_the_others_and_a_share_of_the_peak():
    part = {"ours": {"wall": 2.0, "peak": 10.0}, "compiled": {"wall": 3.0, "peak": 20.0}}
    about = {"ours": {"device": "GPU", "tflops": 100.0, "operations": {"lora": 5e13}}}
    found = gpu.read_speed({"about": about, "check": {}, "parts": {"lora": part, "product": part}})
    assert found["parts"] == {
        "lora": {
            "seconds": {"ours": 2.0, "compiled": 3.0},
            "peak_mib": {"ours": 10.0, "compiled": 20.0},
            "times_faster_than": {"compiled": 1.5},
            "mfu": 0.25,
        }
    }
