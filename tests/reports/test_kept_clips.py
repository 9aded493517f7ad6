"""Clips that an evaluation keeps: which, how, and that a stopped evaluation changes nothing."""

import json
import types

import numpy as np
import pytest

from world_distill.reports import kept_clips, run_data
from world_distill.storage.video_files import load_strip


class Reader:
    """Records in a reader's place."""

    def __init__(self, *ids):
        self.ids = ids

    def heads(self):
        return types.SimpleNamespace(id=list(self.ids))

    def __getitem__(self, number):
        name = self.ids[number]
        return types.SimpleNamespace(id=name, task=f"Do {name}.", solution=f"{name} is done.", agent="a", kind="k")


def clip(frames=5, side=16, value=7):
    return np.full((frames, side, 2 * side, 3), value, np.uint8)


def test_chosen_records_are_kept_small_ones_exactly(tmp_path):
    folder = tmp_path / "evaluation_clips"
    with kept_clips.KeptClips(folder, Reader("x", "y", "z"), [0, 2], fps=8) as kept:
        for name in ("x", "y"):
            kept.keep("base", name, clip(value=3))
        kept.keep("executor", "z", clip(48, 400, 200))
        kept.keep("base", "z", clip(48, 400, 100))
        assert not folder.exists()
        assert kept.finish() == 2
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == [
        "base/x.png", "base/z.webp", "clips.json", "executor/z.webp",
    ]  # fmt: skip
    np.testing.assert_array_equal(load_strip(folder / "base/x.png"), clip(value=3))
    large = load_strip(folder / "executor/z.webp")
    assert large.shape == (24, 160, 320, 3) and abs(int(large.mean()) - 200) < 3
    entries = json.loads((folder / "clips.json").read_text())
    assert [(e["id"], e["solution"], e["fps"]) for e in entries] == [("x", "x is done.", 8), ("z", "z is done.", 4)]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": [], "clips": 2}))
    found = run_data.read(tmp_path).clips
    assert [(c.id, sorted(c.films)) for c in found] == [("x", ["base"]), ("z", ["base", "executor"])]
    assert found[1].load("base").shape == (24, 160, 320, 3)


def test_a_stopped_evaluation_leaves_the_clips_of_the_one_before(tmp_path):
    folder = tmp_path / "clips"
    with kept_clips.KeptClips(folder, Reader("x", "y"), [0, 1], fps=8) as kept:
        kept.keep("base", "x", clip())
        kept.keep("executor", "x", clip())
        kept.finish()
    with pytest.raises(KeyboardInterrupt), kept_clips.KeptClips(folder, Reader("x", "y"), [0, 1], fps=8) as kept:
        kept.keep("base", "x", clip(value=9))
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["clips"] and load_strip(folder / "base/x.png").max() == 7
    with kept_clips.KeptClips(folder, Reader("x", "y"), [0, 1], fps=8) as kept:
        kept.keep("base", "y", clip(value=9))
        kept.finish()
    assert not (folder / "base/x.png").exists() and not (folder / "executor").exists(), "no clip of other weights stays"


def test_ids_that_are_no_file_names_are_counted(tmp_path, capsys):
    with kept_clips.KeptClips(tmp_path / "clips", Reader("../x", "y"), [0, 1], fps=8) as kept:
        for name in ("../x", "y"):
            kept.keep("base", name, clip())
        assert kept.finish() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["clips"]
    assert "clips of 1 tasks are not kept, since their ids are no file names: ../x" in capsys.readouterr().err


def test_nothing_kept_leaves_no_folder(tmp_path):
    with kept_clips.KeptClips(tmp_path / "clips", Reader("x"), [], fps=8) as kept:
        kept.keep("base", "x", clip())
        assert kept.finish() == 0
    assert not any(tmp_path.iterdir())
