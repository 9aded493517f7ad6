"""What a tile of the TPU's attention kernels costs, by the schedules that the compiler makes for them.

XLA estimates no cycles for a Pallas kernel, but its compiler writes the kernel's schedule: one bundle of instructions a
cycle, if nothing waits. So the bundles of a kernel's body, over the scores that it computes in one turn, compare shapes
of tiles, and two passes of the backward pass with one. Cycles are of one core, for 1024 x 1024 scores of one head of
128; the products of one such tile alone take 2,048 cycles of a core of v5e and v5p, each: two of them forward, four for
keys and values, three for queries, five for all at once. What does not fit a core's VMEM is refused. Needs the extra
`tpu` and no TPU. A line is seconds of compiling.

    python tests/benchmarks/attention_tiles.py
    python tests/benchmarks/attention_tiles.py --topology v6e:2x2 --tiles 1024x2048x512 --one-pass
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# Queries, keys that lie in VMEM, keys that are computed at once.
TILES = (
    "1024x2048x2048", "1024x1024x1024", "1024x512x512", "1024x256x256", "1024x128x128", "512x2048x2048",
    "256x2048x2048", "128x2048x2048", "2048x1024x1024", "1024x2048x512",
)  # fmt: skip
HEADS, TOKENS, WIDTH = 10, 32768, 128
_FLAG = "--xla_jf_dump_to="


def compile_kernels(topology: str, queries: int, keys: int, at_once: int, one_pass: bool) -> None:
    """Compiles values and gradients of attention in these tiles; a child's work, since the flag is a process's own."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import SingleDeviceSharding

    from world_distill.programs import plan

    backward = {"use_fused_bwd_kernel": True} if one_pass else {"block_q_dq": queries, "block_kv_dq": keys}
    sizes = kernel.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=at_once, block_q_dkv=queries, block_kv_dkv=keys,
        block_kv_dkv_compute=at_once, **backward,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((TOKENS, TOKENS))] * HEADS)
    run = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    place = SingleDeviceSharding(plan.topology(topology)[0])
    x = jax.ShapeDtypeStruct((HEADS, TOKENS, WIDTH), jnp.bfloat16, sharding=place)
    loss = lambda *qkv: run(*qkv).astype(jnp.float32).sum()  # noqa: E731
    try:
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    except jax.errors.JaxRuntimeError as error:
        sys.exit("VMEM" if "vmem" in str(error).lower() else str(error).splitlines()[0])


def schedules(topology: str, tiles: str, one_pass: bool) -> dict[str, int] | str:
    """Bundles of each kernel's body by the kernel's name; or why the compiler refuses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", "--topology", topology, "--tiles", tiles]
        done = subprocess.run(
            command + ["--one-pass"] * one_pass, capture_output=True, text=True,
            env=os.environ | {"LIBTPU_INIT_ARGS": _FLAG + folder},
        )  # fmt: skip
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        found = {}
        for path in pathlib.Path(folder).glob("*splash*schedule-analysis_final_bundles.txt"):
            name = re.search(r"splash_mha_(fwd|dkv|dq)", path.name)
            total = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            if name and total:
                found[name[1]] = int(total[1])
        return found


def line(topology: str, tiles: str, one_pass: bool) -> str:
    queries, _, at_once = map(int, tiles.split("x"))
    found = schedules(topology, tiles, one_pass)
    passes = "one" if one_pass else "two"
    if isinstance(found, str):
        return f"| {topology} | {tiles} | {passes} | refused: {found} | | | |"
    # A body computes its keys in turns of `at_once`, one after the other in its text.
    turns = int(tiles.split("x")[1]) // at_once
    share = (1024 / queries) * (1024 / at_once) / turns
    cells = [f"{found[name] * share:,.0f}" if name in found else "" for name in ("fwd", "dkv", "dq")]
    backward = sum(found.get(name, 0) for name in ("dkv", "dq")) * share
    return f"| {topology} | {tiles} | {passes} | {' | '.join(cells)} | {backward:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--tiles", nargs="+", default=TILES, help="QUERIESxKEYSxAT_ONCE")
    parser.add_argument("--one-pass", action="store_true", help="only one pass backward (default: both forms)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compile_kernels(args.topology[0], *map(int, args.tiles[0].split("x")), args.one_pass)
        return
    print("| slice | queries x keys x at once | passes backward | forward | keys, values | queries | backward |")
    print("|---|---|---|---|---|---|---|")
    for topology in args.topology:
        for tiles in args.tiles:
            for one_pass in (True,) if args.one_pass else (False, True):
                print(line(topology, tiles, one_pass), flush=True)


if __name__ == "__main__":
    main()
