"""Encoding many tasks about few pictures: calls of the codec, bytes a record beside the estimate, time of `inspect`.

    python tests/benchmarks/encode_records.py [--images 18305] [--tasks 8] [--shards 16] [--folder DIR]

Makes annotated records of small pictures in a shuffled order, encodes them with stub encoders (16 KiB of scene an
image, a state of 64 numbers a word), and lists both sets as `inspect` does. Prints figures, and ends with exit code 1
if a picture was encoded more than once, the estimate is off by more than a tenth, or listing took longer than
`--limit` seconds.
"""

import argparse
import pathlib
import re
import sys
import tempfile
import time

import numpy as np

from world_distill import console
from world_distill.data.images.png import encode_png
from world_distill.data.records.encode import encode_records
from world_distill.data.records.reader import AnnotatedRecord, RecordReader, write_records
from world_distill.reports import records as report

WIDTH = 64  # of a word's state
WORDS = np.random.default_rng(0).standard_normal((256, WIDTH)).astype(np.float16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=18_305, help="pictures (default: 18305)")
    parser.add_argument("--tasks", type=int, default=8, help="of each picture (default: 8)")
    parser.add_argument("--shards", type=int, default=16, help="default: 16")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that listing may take (default: 10)")
    parser.add_argument("--folder", type=pathlib.Path, help="for the records (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return measure(pathlib.Path(folder), args.images, args.tasks, args.shards, args.limit)


def measure(folder: pathlib.Path, images: int, tasks: int, shards: int, limit: float) -> int:
    started = time.perf_counter()
    write_records(folder, "train_annotated", annotated(images, tasks), shards)
    annotated_set = RecordReader(folder, "train_annotated")
    say(f"{images} pictures x {tasks} tasks, rows shuffled: written in {time.perf_counter() - started:.1f} s")
    size = annotated_set.bytes
    say(f"annotated: {console.disk(size)}, {console.disk(size / len(annotated_set))} a record")

    encoded, batches = 0, 0

    def scene(pixels: np.ndarray) -> dict[str, np.ndarray]:
        nonlocal encoded, batches
        batches += 1
        encoded += len({image.tobytes() for image in pixels})  # the last batch of a shard is filled up
        return {"video": pixels[:, None, ::2, ::2].astype(np.float32)}

    spec = {"video": np.zeros((1, 32, 48, 3), np.float32)}
    started = time.perf_counter()
    counts = encode_records(
        annotated_set, folder, name="train", encode_scene=scene, encode_text=text, shards=shards, batch=8,
        lengths={"text": 512}, scenes=spec, say=say,
    )  # fmt: skip
    took = time.perf_counter() - started
    say(f"encoded in {took:.1f} s, {counts['records'] / took:.0f} records a second, {shards} shards")
    say(f"pictures encoded: {encoded} of {images}, in {batches} batches of 8")
    each, expected = (counts[key] / counts["records"] for key in ("bytes", "estimated_bytes"))
    say(f"bytes a record: {each:.0f}, estimate {expected:.0f} ({expected / each - 1:+.1%})")

    times = []
    for name in ("train_annotated", "train"):
        started = time.perf_counter()
        reader = RecordReader(folder, name)
        matching, figures = report.survey(reader, re.compile("cup"))
        lines = report.table((reader[i] for i in report.choose(matching, 20, None)), 120)
        times.append(time.perf_counter() - started)
        say(f"inspect {name}: {times[-1]:.2f} s for {figures['records']} records, {len(lines) - 1} shown")
    return int(encoded != images or abs(expected / each - 1) > 0.1 or max(times) > limit)


def annotated(images: int, tasks: int):
    """Records in a shuffled order; a picture is drawn from its number."""
    rng = np.random.default_rng(1)
    agents = ("fox", "hand", "robot", "camera")
    for number in rng.permutation(images * tasks).tolist():
        image, task = divmod(number, tasks)
        agent, thing = agents[task % 4], ("cup", "hat")[task % 2]
        solution = " ".join(["It goes on to the next place."] * (10 + number % 11))
        yield AnnotatedRecord(
            f"{image:016x}-{task}", f"{image:016x}", picture(image), f"[{agent}]: Take the {thing} {task}.", solution,
            agent, "take", {"file": f"{image}.png"},
        )  # fmt: skip


def picture(image: int) -> bytes:
    """64 x 96 pixels, which no other image has."""
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([x * 2 + y, x + y * 3, x * y // 8], -1).astype(np.uint8)
    pixels[0, :8, 0] = np.frombuffer(image.to_bytes(8, "big"), np.uint8)
    return encode_png(pixels)


def text(texts: list[str]) -> dict[str, list[np.ndarray]]:
    return {"text": [WORDS[[hash(word) % 256 for word in t.split()]] for t in texts]}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
