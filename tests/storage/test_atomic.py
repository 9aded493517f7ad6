"""Files that appear whole or not at all."""

import dataclasses
import json

import numpy as np
import pytest

from world_distill.storage import atomic


@dataclasses.dataclass
class Row:
    name: str
    task: float


def test_write_json_takes_what_programs_have(tmp_path):
    path = tmp_path / "new" / "out.json"
    atomic.write_json(
        path,
        {"rows": [Row("base", np.float32(0.5))], "n": np.int64(3), "xs": np.ones(2), "nan": float("nan"), 1: path},
    )
    assert json.loads(path.read_text()) == {
        "rows": [{"name": "base", "task": 0.5}], "n": 3, "xs": [1.0, 1.0], "nan": None, "1": str(path),
    }  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    atomic.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left.*{path}"):
        atomic.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert not list(tmp_path.glob("tmp*")) and not list(tmp_path.glob(".*"))


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out.json"):
        atomic.write_json(tmp_path / "file" / "out.json", {})
