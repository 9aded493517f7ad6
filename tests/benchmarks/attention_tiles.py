"""What a tile of the TPU's attention kernels costs, by the schedules that the compiler makes for them.

XLA estimates no cycles for a Pallas kernel, but its compiler writes the kernel's schedule: one bundle of instructions a
cycle, if nothing waits. So the bundles of a kernel's text, over the scores of a tile, compare shapes of tiles and
kernels: ours (`flash`), JAX's splash kernels with one or two passes backward, and those of the package `tokamax`, where
it is installed. The text begins and ends a row of tiles, too, so that a tile takes a few percent less. Cycles are of
one core, for 1024 x 1024 scores of one head of 128, where the last 8 of 32,768 keys only fill up. The products of such
a tile alone take 2,048 cycles of a core of v5e and v5p, each, at the published peak: two of them forward, five backward
in one pass, seven in two. Schedules may say less than products take. What does not fit a core's VMEM is refused. A
tile's keys have to divide 32,768. Needs the extra `tpu` and no TPU. A line is seconds of compiling.

    python tests/benchmarks/attention_tiles.py
    python tests/benchmarks/attention_tiles.py --topology v6e:2x2 --tiles 1024x2048x512 --form flash
    python tests/benchmarks/attention_tiles.py --tiles 1024x2048x1024 --form "tokamax, base 2" "tokamax, base e"
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
    "1024x2048x1024", "1024x1024x1024", "1024x512x512", "512x2048x1024", "2048x1024x1024", "1024x2048x512",
)  # fmt: skip
FORMS = ("two passes", "one pass", "flash")
TOKAMAX = ("tokamax, base 2", "tokamax, base e")
HEADS, TOKENS, FILLED, WIDTH = 10, 32768, 8, 128
_FLAG = "--xla_jf_dump_to="


def compile_kernels(topology: str, queries: int, keys: int, at_once: int, form: str) -> None:
    """Compiles values and gradients of attention in these tiles; a child's work, since the flag is a process's own."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from world_distill.devices.sharding import make_mesh
    from world_distill.programs import plan

    mesh, spec = make_mesh(devices=plan.topology(topology)[:1]), PartitionSpec()
    x = jax.ShapeDtypeStruct((HEADS, TOKENS, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    make = {"flash": flash, "tokamax": tokamax}.get(form.split(",")[0], splash)
    run = make(queries, keys, at_once, form)
    # Tokamax asks the mesh what chip it compiles for.
    on_chip = jax.shard_map(
        lambda *qkv: run(*qkv).astype(jnp.float32), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    loss = lambda *qkv: on_chip(*qkv).sum()  # noqa: E731
    try:
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    except jax.errors.JaxRuntimeError as error:
        sys.exit("VMEM" if "vmem" in str(error).lower() else str(error).splitlines()[0])


def flash(queries: int, keys: int, at_once: int, form: str):
    """Our kernels in these tiles, whatever they would choose."""
    from world_distill.models import flash as ours

    ours.tile, ours.key_tile, ours.turn_keys = (lambda _, size=size: size for size in (queries, keys, at_once))
    return lambda q, k, v: ours.flash_attention(*(y.swapaxes(0, 1)[None] for y in (q, k, v)), TOKENS - FILLED)


def splash(queries: int, keys: int, at_once: int, form: str):
    """JAX's kernels."""
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    backward = {"use_fused_bwd_kernel": True} if form == "one pass" else {"block_q_dq": queries, "block_kv_dq": keys}
    sizes = kernel.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=at_once, block_q_dkv=queries, block_kv_dkv=keys,
        block_kv_dkv_compute=at_once, **backward,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((TOKENS, TOKENS))] * HEADS)
    run = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    filled = (jnp.arange(TOKENS) >= TOKENS - FILLED).astype(jnp.int32)
    return lambda q, k, v: run(q, k, v, segment_ids=kernel.SegmentIds(jnp.zeros_like(filled), filled))


def tokamax(queries: int, keys: int, at_once: int, form: str):
    """Tokamax' splash kernels, with powers of 2 or of e; the queries' gradient is summed in three arrays."""
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    sizes = kernel.SplashConfig(
        block_q=queries, block_kv=keys, block_kv_compute=at_once, block_q_dkv=queries, block_kv_dkv=keys,
        block_kv_dkv_compute=at_once, use_base2_exp=not form.endswith("base e"), dq_reduction_steps=3,
    )  # fmt: skip
    run = kernel.make_splash_mha(masks.FullMask((TOKENS, TOKENS)), config=sizes, q_seq_shards=1)
    filled = (jnp.arange(TOKENS) >= TOKENS - FILLED).astype(jnp.int32)
    return lambda q, k, v: run(q, k, v, segment_ids=kernel.SegmentIds(jnp.zeros_like(filled), filled))


def schedules(topology: str, tiles: str, form: str) -> dict[str, int] | str:
    """Bundles of each kernel's text by the kernel's name; or why the compiler refuses."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--child", "--topology", topology, "--tiles", tiles, "--form", form],
            capture_output=True, text=True, env=os.environ | {"LIBTPU_INIT_ARGS": _FLAG + folder},
        )  # fmt: skip
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        found = {}
        for path in pathlib.Path(folder).glob("*schedule-analysis_final_bundles.txt"):
            name = re.search(r"splash_mha_(fwd|dkv|dq)|flash_(forward|backward)", path.name)
            total = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            if name and total:
                found[name[1] or name[2]] = int(total[1])
        return found


def line(topology: str, tiles: str, form: str) -> str:
    queries, keys, _ = map(int, tiles.split("x"))
    found = schedules(topology, tiles, form)
    about = f"| {topology} | {tiles} | {'splash, ' * (form in FORMS[:2])}{form} |"
    if isinstance(found, str):
        return f"{about} refused: {found} | |"
    share = (1024 / queries) * (1024 / keys)
    # The text of our forward pass has two tiles: the last one, with its mask, and any other.
    forward = found["forward"] / 2 if form == "flash" else found["fwd"]
    backward = sum(found.get(name, 0) for name in ("backward", "dkv", "dq"))
    return f"{about} {forward * share:,.0f} | {backward * share:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--tiles", nargs="+", default=TILES, help="QUERIESxKEYSxAT_ONCE")
    parser.add_argument("--form", nargs="+", choices=(*FORMS, *TOKAMAX), default=FORMS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compile_kernels(args.topology[0], *map(int, args.tiles[0].split("x")), args.form[0])
        return
    print("| slice | queries x keys x at once | kernels | forward | backward |")
    print("|---|---|---|---|---|")
    for topology in args.topology:
        for tiles in args.tiles:
            for form in args.form:
                print(line(topology, tiles, form), flush=True)


if __name__ == "__main__":
    main()
