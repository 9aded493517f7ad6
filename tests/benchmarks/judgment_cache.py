"""Time of looking up and storing 100 judgments, by how many the cache holds.

    python tests/benchmarks/judgment_cache.py [--sizes 10000 1000000] [--batches 200] [--folder DIR]

Fills a cache with made-up judgments, each with what was asked, and at every size times batches of 100 that are new,
100 that are known, and puts. Prints medians over that at the first size, and the file's bytes a judgment. Ends with
exit code 1 if a median at any size is more than `--limit` times that at the first.
"""

import argparse
import hashlib
import pathlib
import statistics
import sys
import tempfile
import time

from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.entries import About

BATCH = 100
TASKS = 3_000  # so few that all texts are known at the first size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000], help="judgments held, rising")
    parser.add_argument("--batches", type=int, default=200, help="of each kind, timed at every size (default: 200)")
    parser.add_argument("--limit", type=float, default=4.0, help="largest ratio (default: 4)")
    parser.add_argument("--folder", type=pathlib.Path, help="for the cache (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return measure(pathlib.Path(folder) / "cache.sqlite", args.sizes, args.batches, args.limit)


def measure(path: pathlib.Path, sizes: list[int], batches: int, limit: float) -> int:
    first, worst, held = {}, 0.0, 0
    with JudgmentCache(path) as cache:
        for size in sizes:
            while held < size:
                keys = make(held, min(10_000, size - held))
                put(cache, keys)
                held += len(keys)
            times = timed(cache, held, batches)
            held += batches * BATCH
            first = first or times
            ratios = {name: times[name] / first[name] for name in times}
            worst = max(worst, *ratios.values())
            figures = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in ratios.items())
            sys.stdout.write(f"{size:>9}  {figures}  {path.stat().st_size / held:.0f} bytes each\n")
            sys.stdout.flush()
    sys.stdout.write(f"largest ratio x{worst:.2f}, limit x{limit:g}\n")
    return int(worst > limit)


def timed(cache: JudgmentCache, held: int, batches: int) -> dict[str, float]:
    """Median seconds of a batch by what is done with it."""
    times: dict[str, list[float]] = {"new": [], "put": [], "known": []}
    step = max(1, held // (batches * BATCH))
    for i in range(batches):
        keys = make(held + i * BATCH, BATCH)
        known = [key_of((i * BATCH + j) * step) for j in range(BATCH)]
        for name, action in (
            ("new", lambda keys=keys: cache.get_many(list(keys)) == {}),
            (
                "put",
                lambda keys=keys: len(cache.put_many(dict.fromkeys(keys, 1.5), judge_name="j", about=keys)) == BATCH,
            ),
            ("known", lambda known=known: len(cache.get_many(known)) == BATCH),
        ):
            began = time.perf_counter()
            right = action()
            times[name].append(time.perf_counter() - began)
            assert right, name
    return {name: statistics.median(values) for name, values in times.items()}


def put(cache: JudgmentCache, keys: dict[str, About]) -> bool:
    return len(cache.put_many(dict.fromkeys(keys, 1.5), judge_name="a judge", about=keys)) == len(keys)


def key_of(i: int) -> str:
    return hashlib.sha256(f"key {i}".encode()).hexdigest()


def make(start: int, count: int) -> dict[str, About]:
    """Keys, and questions like a run's: three a clip, tasks that come again."""
    made = {}
    for i in range(start, start + count):
        clip, question = hashlib.sha256(f"clip {i // 3}".encode()).hexdigest(), ("task", "agent", "consistency")[i % 3]
        task = f"[hand]: Do number {i // 3 % TASKS}."
        made[key_of(i)] = About(
            clip, question, f"{question}? {task}" + "x" * 500, task, "hand", f"r{i // 3 % TASKS}", "v"
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
