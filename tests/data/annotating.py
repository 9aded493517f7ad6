"""Annotation that is killed again and again: `python annotating.py FOLDER KILLS THREADS SHARDS SEED`.

FOLDER holds images/. Each attempt is a forked child, one for each shard at a time, that gets SIGKILL at a random
instant; then all are done once more. Writes FOLDER/asked, a line for every question. Prints how many were killed.
"""

import os
import pathlib
import random
import signal
import sys
import time

from world_distill.data.annotation.annotate import annotate_images
from world_distill.data.images.filters import Filters
from world_distill.data.images.reader import find_images
from world_distill.interfaces import TaskPair


class Slow:
    """Answers after a while that depends on the image, as its answer does; writes down each question."""

    name = "slow-1"

    def __init__(self, path, concurrency, delay):
        self.path, self.concurrency, self.delay = path, concurrency, delay

    def annotate(self, image, *, max_pairs, seed):
        with open(self.path, "a") as file:
            file.write(f"{seed}\n")
        time.sleep(self.delay * (1 + seed % 5))
        solution = "The fox with the number {} runs to the gate {} and stops there while the camera stays still."
        return [
            TaskPair(f"[fox {seed}]: Run to the gate {k}.", solution.format(seed, k), f"fox {seed}", "k")
            for k in range(seed % 4)
        ]


def annotate(folder, out, threads, *, only=None, shards=1, delay=0.0, log="asked"):
    return annotate_images(
        find_images(folder / "images"), Slow(folder / log, threads, delay), out, name="set", max_pairs=4, seed=0,
        only=only, shards=shards, filters=Filters(broken=True, near=3), licence="CC0",
    )  # fmt: skip


def attempt(folder, threads, shard, shards, wait):
    """One child; True if it was killed, False if it had ended by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            only = shard if shards > 1 else None
            annotate(folder, folder / "out", threads, only=only, shards=shards, delay=0.012)
            code = 0
        finally:
            os._exit(code)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        sys.exit(f"shard {shard} failed")
    return False


def main(folder, kills, threads, shards, seed):
    chance, killed = random.Random(seed), 0
    for i in range(kills):
        killed += attempt(folder, threads, i % shards, shards, chance.uniform(0, 0.25))
    for shard in range(shards):
        attempt(folder, threads, shard, shards, None)
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:6]))
