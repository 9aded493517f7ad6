"""CPU time and memory of importing a data set of the authors' size, made of small pictures, with its rows in any order.

    python tests/benchmarks/import_speed.py [--images 18305] [--tasks 8] [--side 32] [--order shuffled] [--json FILE]

It should end within 5 CPU minutes and 1 GiB, whatever the order.
"""

import argparse
import io
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
SOLUTION = "A hand enters from the left, takes the cup, and the cup moves over the table until it stands at the edge."


def make(folder: pathlib.Path, images: int, tasks: int, side: int, order: str) -> None:
    """A folder as WorldTasks is: shards of pictures, and a JSONL with a row a task."""
    chance, draw = np.random.default_rng(0), random.Random(0)
    rows = []
    for i in range(images):
        path = folder / "train" / "images" / f"shard_{i // 200:03d}" / f"{i}_0.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(chance.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "JPEG", quality=85)
        path.write_bytes(buffer.getvalue())
        image = f"{path.parent.name}/{path.name}"
        rows += [
            {"id": f"{i}_{k}", "image": image, "task": f"[hand]: Move cup {k} of {i}.", "solution": SOLUTION}
            for k in range(tasks)
        ]
    if order == "shuffled":
        draw.shuffle(rows)
    (folder / "train" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=18305)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--order", choices=("shuffled", "in_order"), default="shuffled")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make(folder / "set", args.images, args.tasks, args.side, args.order)
        command = [sys.executable, "-m", "world_distill", "import-tasks", "--folder", str(folder / "set")]
        started = time.perf_counter()
        subprocess.run([*command, "--out", str(folder / "out"), "--shards", "16"], cwd=ROOT, check=True)
        wall, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        size = sum(path.stat().st_size for path in (folder / "out").iterdir())
    figures = {
        "rows": args.images * args.tasks, "images": args.images, "order": args.order, "wall_s": round(wall, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1), "peak_mib": round(used.ru_maxrss / 1024),
        "out_mib": round(size / 2**20),
    }  # fmt: skip
    sys.stdout.write(json.dumps(figures) + "\n")
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
