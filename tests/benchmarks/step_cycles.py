"""What a pass through a 14-billion-parameter transformer costs on TPUs, in cycles as their compiler estimates them.

Three programs of `wan_sizes:14b` (32,760 tokens a clip, one clip on every four chips, `mesh.tensor` = 4): the
Demonstrator's forward, the Executor's (LoRA of rank 32 on ten maps a block), and the gradient of a distillation loss in
the Executor's factors. Cycles are of one chip, outside attention kernels, which the compiler does not estimate. Needs
the extra `tpu` and no TPU. A program takes minutes; with --json, what is there already is not compiled again.

    python tests/benchmarks/step_cycles.py --json cycles.json
    python tests/benchmarks/step_cycles.py --topology v5p:2x2x1 --program demonstrator
    python tests/benchmarks/step_cycles.py --json cycles.json --int8        # the same over kernels of int8

Other code of the same size, read in the same way on v5p:2x2x1: MaxDiffusion's forward without LoRA, its tokens split
four ways, takes 1,473 million cycles and 7.8 GiB; a plain LoRA step, scan and remat without RoPE, split like ours,
3,910 million and 16.1 GiB. The products of a forward alone take 748 million at the peak.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from world_distill import build
from world_distill.devices import cycles
from world_distill.devices.sharding import make_mesh, rows_or_whole, tree_shardings
from world_distill.programs import plan
from world_distill.settings.loading import load_config
from world_distill.structs import Condition, Tokens
from world_distill.weights import base_model

TOPOLOGIES = ("v5p:2x2x1", "v5e:2x2", "v6e:4x4")
PROGRAMS = ("demonstrator", "executor", "update")
RANK = 32


def abstract(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def make_program(program: str, devices: list, depth: int | None, int8: bool):
    """A jitted function and its abstract arguments."""
    rows = len(devices) // 4
    changes = {"mesh.fsdp": -1, "mesh.tensor": 4, "model.int8": int8} | ({"model.depth": depth} if depth else {})
    config = load_config("wan_sizes:14b", changes)
    mesh = make_mesh(**config.mesh.to_dict(), devices=devices)
    family = build.make_family(config, mesh)
    base = base_model.abstract_base(family, mesh)
    factors = jax.eval_shape(lambda key, base: family.init_lora(key, base, rank=RANK), jax.random.key(0), base)
    placed = tree_shardings(mesh, family.lora_axes(factors), factors)
    factors = jax.tree.map(lambda x, s: abstract(x.shape, x.dtype, s), factors, placed)
    lie = rows_or_whole(mesh, rows)
    texts = {}
    for name, length in build.text_lengths(family, config).items():
        spec = family.encoders.texts[name]
        texts[name] = Tokens(
            abstract((rows, length, spec.width), spec.dtype, lie), abstract((rows, length), jnp.bool_, lie)
        )
    scene = {name: abstract((rows, *x.shape), x.dtype, lie) for name, x in family.encoders.scenes.items()}
    x = {name: abstract((rows, *spec.shape), jnp.float32, lie) for name, spec in family.latents.items()}
    given = x, abstract((rows,), jnp.float32, lie), Condition(texts, scene)
    if program == "demonstrator":
        return jax.jit(lambda base, *given: family.denoise(base, None, *given)), (base, *given)
    if program == "executor":
        return jax.jit(lambda base, lora, *given: family.denoise(base, lora, *given)), (base, factors, *given)

    def loss(lora, base, wanted, *given):
        found = family.denoise(base, lora, *given)
        return sum(jnp.mean(jnp.square(found[name] - wanted[name])) for name in found)

    return jax.jit(jax.grad(loss), out_shardings=placed), (factors, base, x, *given)


def measure(program: str, topology: str, depth: int | None, int8: bool) -> dict:
    function, given = make_program(program, plan.topology(topology), depth, int8)
    started = time.process_time()
    compiled = function.lower(*given).compile()
    seconds = time.process_time() - started
    estimate = cycles.estimate(compiled.as_text())
    return {
        "cycles": estimate.cycles, "kernels": estimate.kernels,
        "sent": sum(c.sent * c.runs for c in estimate.collectives),
        "peak": compiled.memory_analysis().peak_memory_in_bytes / plan.GIB, "compile": seconds,
    }  # fmt: skip


def table(rows: dict[str, dict]) -> str:
    lines = [
        f"| slice | program | M cycles | {' | '.join(cycles.KINDS)} | sent, GB | peak, GiB | compile, CPU s |",
        "|---" * (len(cycles.KINDS) + 6) + "|",
    ]
    for key, row in rows.items():
        parts = " | ".join(f"{row['cycles'][kind] / 1e6:,.0f}" for kind in cycles.KINDS)
        total = sum(row["cycles"].values()) / 1e6
        lines.append(
            f"| {key.replace(' ', ' | ', 1)} | {total:,.0f} | {parts} | {row['sent'] / 1e9:.1f} | {row['peak']:.1f} | "
            f"{row['compile']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="rows are added to this file as they are done")
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--program", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--depth", type=int, help="blocks (default: all 40)")
    parser.add_argument("--int8", action="store_true", help="the blocks' kernels as int8 (`model.int8`)")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for topology in args.topology:
        for program in args.program:
            key = f"{topology} {program}{', int8' if args.int8 else ''}"
            if key not in rows:
                print(f"{key} ...", flush=True)
                rows[key] = measure(program, topology, args.depth, args.int8)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
