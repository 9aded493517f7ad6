"""Benchmarks as their authors lay them out, of noise and made-up tasks: WorldTasks-Bench and DreamGen Bench."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

KINDS = ("navigation", "object interaction", "perception", "positioning")
AGENTS = ("First person view", "First-person view", "Man in blue shirt")
SPLITS = {"gr1_object": 50, "gr1_behavior": 47, "gr1_env": 29}


def save_worldtasks(folder, count: int, agents: Sequence[str] = AGENTS) -> None:
    """FOLDER/bench/bench.jsonl and its pictures."""
    (folder / "bench/images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"bench/images/{i:06}.png")
        task = f"[{agents[i % len(agents)]}]: Move on to place {i}."
        rows.append({"id": f"{i:06}", "image": f"images/{i:06}.png", "task": task, "kind": KINDS[i % len(KINDS)]})
    (folder / "bench/bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def instruction(split: str, i: int) -> str:
    """The instruction of a case of `save_dreamgen`."""
    return f"Use the {'left' if i % 2 else 'right'} hand to pick up the cup, then move it to tray {split[4:]} {i}."


def save_dreamgen(folder, splits: Mapping[str, int] = SPLITS) -> None:
    """A folder a split, with `NAME.txt` beside a picture, and `NAME..txt` where the picture's name lost its dot."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        (folder / split).mkdir(parents=True)
        for i in range(count):
            text = instruction(split, i)
            stem = f"{i}_{text.removesuffix('.') if i % 10 == 3 else text}"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / split / f"{stem}.png")
            twin = f"{stem}..txt" if i % 10 == 3 else f"{stem}.txt"
            if i % 10 != 7:  # of some there is no text
                (folder / split / twin).write_text(f"{text}\n")
