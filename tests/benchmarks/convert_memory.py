"""Peak memory of `world-distill convert`, measured on a made-up model of any size (Linux).

    python tests/benchmarks/convert_memory.py [--gib 2] [--dtype keep] [--rank 0] [--folder DIR]

Writes a Wan checkpoint in several shards, converts it in a process of its own, and compares that process's peak with
one that imports the same modules and does nothing. With --rank, a LoRA of all linear layers is merged on the way. Ends
with exit code 1 if the difference exceeds the largest array of ours by more than 1 GiB: the need for memory must not
grow with the model, or with the LoRA, but by that array.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import safetensors.numpy

from world_distill.cli.convert import DTYPES
from world_distill.weights import published

GIB = 2**30
SHARD_BYTES = GIB // 4
NAME = "diffusion_pytorch_model"
HEAD, HEADS, MLP = 128, 14, 6144
TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": HEADS,
    "attention_head_dim": HEAD, "in_channels": 4, "out_channels": 4, "text_dim": 64, "freq_dim": 64, "ffn_dim": MLP,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
}  # fmt: skip
VAE = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip

# VmHWM and not ru_maxrss, which starts from the size of the process that started this one.
CHILD = """
import pathlib, sys
from world_distill.weights import convert, merging
if len(sys.argv) > 1:
    merges = [merging.Merge(pathlib.Path(path)) for path in sys.argv[4:]]
    convert.convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), dtype=sys.argv[3], merges=merges)
status = pathlib.Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the model, which is in bfloat16 (default: 2)")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="to convert to (default: keep)")
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA that is merged (default: none)")
    parser.add_argument("--folder", type=pathlib.Path, help="for both checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = pathlib.Path(folder)
        make_source(folder / "source", args.gib)
        if args.rank:
            make_lora(folder, args.rank)
        return measure(folder, args.dtype)


def make_source(folder: pathlib.Path, gib: float) -> None:
    """A model of at least `gib` GiB."""
    width = HEAD * HEADS
    block = 2 * (8 * width**2 + 2 * width * MLP)
    configs = {"transformer": TRANSFORMER | {"num_layers": math.ceil(gib * GIB / block)}, "vae": VAE}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    _, model = published.describe(folder)
    for part, entries in model.entries.items():
        shapes = {name: entry.shape for entry in entries for name in entry.names}
        where = {}
        for number, shard in enumerate(shards(shapes)):
            where |= dict.fromkeys(shard, file := f"{NAME}-{number + 1:05d}.safetensors")
            safetensors.numpy.save_file(shard, folder / part / file)
        (folder / part / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, np.ndarray]]:
    """Random tensors, grouped into files."""
    rng = np.random.default_rng(0)
    waiting: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        waiting[name] = rng.random(shape, np.float32).astype(ml_dtypes.bfloat16)
        if sum(x.nbytes for x in waiting.values()) > SHARD_BYTES:
            yield waiting
            waiting = {}
    yield waiting


def make_lora(folder: pathlib.Path, rank: int) -> None:
    """`lora.safetensors`, of all linear layers of the model in `folder`."""
    _, model = published.describe(folder / "source")
    rng, tensors = np.random.default_rng(1), {}
    for entry in model.entries["transformer"]:
        for name in entry.names if len(entry.shape) == 2 and entry.name.endswith(".weight") else ():
            for key, shape in (("A", (rank, entry.shape[1])), ("B", (entry.shape[0], rank))):
                key = f"transformer.{name.removesuffix('weight')}lora_{key}.weight"
                tensors[key] = rng.random(shape, np.float32).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, folder / "lora.safetensors")


def measure(folder: pathlib.Path, dtype: str) -> int:
    """Converts, prints what it took, and returns the exit code."""
    source = folder / "source"
    _, model = published.describe(source)
    entries = model.entries["transformer"]
    itemsize = 4 if dtype == "float32" else 2
    largest = max(math.prod(entry.shape) * max(entry.blocks, 1) for entry in entries) * itemsize
    files = list(source.rglob("*.safetensors"))
    baseline = peak()
    lora = sorted(folder.glob("lora.safetensors"))
    extra = peak(source, folder / "dest", dtype, *lora) - baseline
    size = sum(path.stat().st_size for path in files)
    allowed = largest + GIB
    sys.stdout.write(
        f"checkpoint      {size / GIB:6.2f} GiB in {len(files)} files\n"
        f"LoRA            {sum(path.stat().st_size for path in lora) / GIB:6.2f} GiB\n"
        f"largest array   {largest / GIB:6.2f} GiB\n"
        f"imports alone   {baseline / GIB:6.2f} GiB\n"
        f"conversion      {extra / GIB:6.2f} GiB above that, {extra / largest:.2f} times the largest array\n"
        f"allowed         {allowed / GIB:6.2f} GiB: {'met' if extra <= allowed else 'EXCEEDED'}\n"
    )
    return int(extra > allowed)


def peak(*arguments: str | pathlib.Path) -> int:
    """Bytes that a process had in memory at most, converting if there are arguments."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
