"""How long training stands still when a checkpoint is saved: in the background, and in the foreground.

The state is a LoRA with its average, its start and Adam's moments, all float32. Between saves a stand-in for training
keeps one core busy and replaces the state, as a donating step does.

    python tests/benchmarks/checkpoint_stall.py [--gib 1.0] [--saves 3] [--folder DIR] [--json FILE]
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from world_distill.storage.checkpoints import Checkpointer, make_metadata
from world_distill.structs import TrainState
from world_distill.training.optimizers import make_optimizer

METADATA = make_metadata({"benchmark": "checkpoint_stall"})
LAYERS, TARGETS, RANK = 40, ("q", "k", "v", "out", "up", "down"), 32
COPIES = 5  # weights, average, start, two moments


def make_state(gib: float) -> TrainState:
    """Random arrays of `gib` GiB in all, of the shapes that a LoRA has: stacked over layers."""
    optimizer = make_optimizer(name="adam", learning_rate=1e-3)
    width = round(gib * 2**30 / 4 / COPIES / LAYERS / RANK / (2 * len(TARGETS)))

    def lora(key):
        shapes = {"a": (LAYERS, width, RANK), "b": (LAYERS, RANK, width)}
        return {
            target: {name: jax.random.normal(jax.random.fold_in(key, i), shape) for name, shape in shapes.items()}
            for i, target in enumerate(TARGETS)
        }

    @jax.jit
    def make(key):
        one, two, three = (lora(jax.random.fold_in(key, i)) for i in range(3))
        moments = jax.tree.map(lambda x: x if x.ndim == 0 else x + 0.1, optimizer.init(one))
        return TrainState(jnp.int32(0), one, two, three, moments, key)

    return make(jax.random.key(0))


def stalls(folder: pathlib.Path, gib: float, saves: int, async_: bool) -> dict[str, float]:
    """Seconds that `save` takes (median and longest, after a first one), and that a checkpoint takes to be there."""
    work = jax.jit(lambda x: (x @ x) / jnp.linalg.norm(x))
    move = jax.jit(lambda s: s.replace(step=s.step + 1, lora=jax.tree.map(lambda x: x + 1, s.lora)), donate_argnums=0)
    state, x = jax.block_until_ready(make_state(gib)), jnp.ones((256, 256))
    stalled, written = [], []
    with Checkpointer(folder, keep=1, async_=async_) as checkpointer:
        for step in range(1, saves + 2):
            jax.block_until_ready(state)
            began = time.perf_counter()
            checkpointer.save(step, state, b"{}", METADATA)
            stalled.append(time.perf_counter() - began)
            state = move(state)
            while async_ and checkpointer._manager.is_saving_in_progress():
                x = jax.block_until_ready(work(x))
            checkpointer.wait()
            written.append(time.perf_counter() - began)
    return {
        "stall": statistics.median(stalled[1:]),
        "longest stall": max(stalled[1:]),
        "first stall": stalled[0],
        "written after": statistics.median(written[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", help="where to write (a temporary folder)")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    found = {"GiB": sum(x.nbytes for x in jax.tree.leaves(make_state(args.gib)) if hasattr(x, "nbytes")) / 2**30}
    for name, async_ in (("background", True), ("foreground", False)):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            seconds = stalls(pathlib.Path(folder) / name, args.gib, args.saves, async_)
        found |= {f"{name}, {what}": value for what, value in seconds.items()}
    found["stall in the background / in the foreground"] = found["background, stall"] / found["foreground, stall"]
    for name, value in found.items():
        sys.stdout.write(f"{name}: {value:.3g}{'' if name == 'GiB' or '/' in name else ' s'}\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
