"""Annotation killed at random instants: the files are those of a job that was left alone, and no answer is lost.

WORLD_DISTILL_KILLS is how often each job is killed.
"""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data import annotating
from tests.effort import KILLS

ROOT = pathlib.Path(__file__).resolve().parents[3]
COUNT = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "05.png").write_bytes((folder / "04.png").read_bytes())
    (folder / "06.png").write_text("broken")
    return folder


@pytest.mark.parametrize("threads, shards", [(4, 1), (3, 2)])
def test_killed_jobs_end_with_the_files_of_one_that_was_left_alone(images, tmp_path, threads, shards):
    (tmp_path / "images").symlink_to(images)
    parts = [None] if shards == 1 else list(range(shards))
    for only in parts:
        annotating.annotate(tmp_path, tmp_path / "alone", 1, only=only, shards=shards, log="alone.log")
    code = [sys.executable, annotating.__file__, str(tmp_path), *map(str, (KILLS, threads, shards, KILLS))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(code, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = int(done.stdout)
    names = {p.name for p in (tmp_path / "alone").iterdir()}
    left = {p.name for p in (tmp_path / "out").iterdir()} - names
    # A killed writer of what all parts share may leave its draft: another machine could be at work on it.
    assert not left or (shards > 1 and all(re.fullmatch(r"\.set\.(card\.|rejected\.)?jsonl?\..*tmp", n) for n in left))
    for name in names:
        if not name.endswith(".journal.jsonl"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    asked = (tmp_path / "asked").read_text().split()
    assert len(set(asked)) == COUNT - 2
    assert killed >= 2 and len(asked) <= COUNT - 2 + killed * threads
