"""Peak memory of `world-distill export` on a run that trained all weights (Linux).

    python tests/benchmarks/export_memory.py [--width 1024] [--depth 12] [--folder DIR]

Makes a run folder of a Wan model with random weights, exports it in a process of its own, and compares that process's
peak with one that imports the same modules and does nothing. A checkpoint of such a run holds the Executor five times:
the weights, their two averages and the optimiser's two moments. `export --format merged` reads one of them, and the
base array by array. Ends with exit code 1 if the difference exceeds the Executor, one file of the model (which is held
twice while it is written) and 1 GiB.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from world_distill import build
from world_distill.settings.loading import load_config
from world_distill.storage import array_store
from world_distill.storage.checkpoints import Checkpointer, make_metadata
from world_distill.training import run_folder
from world_distill.training.step_programs import make_programs
from world_distill.weights.merged_model import SHARD_BYTES

GIB = 2**30
# VmHWM and not ru_maxrss, which starts from the size of the process that started this one.
CHILD = """
import pathlib, sys
from world_distill.programs import export
if len(sys.argv) > 1:
    export.export_merged(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
status = pathlib.Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="of the transformer (default: 1024)")
    parser.add_argument("--depth", type=int, default=12, help="its blocks (default: 12)")
    parser.add_argument("--folder", type=pathlib.Path, help="for the run and the export (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run, out = pathlib.Path(folder, "run"), pathlib.Path(folder, "merged")
        executor = make_run(run, args.width, args.depth)
        baseline = peak()
        extra = peak(run, out) - baseline
    allowed = executor + 2 * SHARD_BYTES + GIB
    sys.stdout.write(
        f"Executor        {executor / GIB:6.2f} GiB, as large as the base\n"
        f"imports alone   {baseline / GIB:6.2f} GiB\n"
        f"export          {extra / GIB:6.2f} GiB above that, {extra / executor:.2f} times the Executor\n"
        f"allowed         {allowed / GIB:6.2f} GiB: {'met' if extra <= allowed else 'EXCEEDED'}\n"
    )
    return int(extra > allowed)


def make_run(folder: pathlib.Path, width: int, depth: int) -> int:
    """Writes a run folder with a converted base and one checkpoint; returns the bytes of an Executor."""
    sizes = {"model.width": width, "model.depth": depth, "model.heads": width // 128, "model.mlp": 4 * width}
    config = load_config("wan22_5b:debug", sizes | {"executor.rank": 0, "base": str(folder / "base")})
    run_folder.claim_folder(config, folder)
    mesh = build.start_devices(config)
    programs = make_programs(config, mesh)
    base = jax.jit(programs.family.init_base)(jax.random.key(0))
    writer = array_store.Writer(folder / "base", {"family": programs.family.name})
    for name, array in array_store.by_name(base).items():
        writer.add(name, np.asarray(array))
    writer.finish()
    state = programs.init(base, 0)
    # A fresh Executor adds nothing: each leaf gets values of its own.
    average = jax.tree.map(lambda x: x + 0.01 * jnp.cos(x.size + x), state.lora_ema)
    with Checkpointer(folder / "checkpoints") as checkpointer:
        metadata = make_metadata(run_folder.fixed_settings(config))
        checkpointer.save(1, state.replace(lora_ema=average, step=state.step + 1), b"{}", metadata, force=True)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.lora))


def peak(*arguments: pathlib.Path) -> int:
    """Bytes that a process had in memory at most, exporting if there are arguments."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
