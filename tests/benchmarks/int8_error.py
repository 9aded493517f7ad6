"""How far velocities are off with the blocks' kernels as int8 (`model.int8`), beside what bfloat16 costs anyway.

Errors are relative to float32: |v - v32| / |v32| over all latents of two clips. The network is Wan's with blocks of any
size, and every weight is random: kernels with variance 1 / inputs, the rest with a standard deviation of .3. Published
weights have larger outliers than these, and are not measured here.

    python tests/benchmarks/int8_error.py
    python tests/benchmarks/int8_error.py --width 3072 --mlp 14336 --heads 24 --depth 4
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from world_distill.models.functional import functional
from world_distill.models.int8 import block_kernels, quantised
from world_distill.models.wan.modeling import WanConfig, WanDiT
from world_distill.structs import PyTree


def random_weights(shapes: PyTree, seed: int) -> PyTree:
    rng = np.random.default_rng(seed)

    def draw(path: str, x) -> jax.Array:
        size = x.shape[-2] ** -0.5 if path.endswith("kernel") else 0.3
        mean = 1.0 if path.endswith(("_norm", "scale")) else 0.0
        return jnp.asarray(mean + size * rng.standard_normal(x.shape, np.float32))

    return unflatten_dict({path: draw(path, x) for path, x in flatten_dict(shapes, sep=".").items()}, sep=".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"width": 768, "depth": 8, "heads": 6, "mlp": 3072, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    sizes = {"width": args.width, "depth": args.depth, "heads": args.heads, "mlp": args.mlp}
    network = functional(WanDiT, WanConfig(text_width=256, **sizes))
    weights = random_weights(jax.eval_shape(network.init, jax.random.key(0)), args.seed)
    rng = np.random.default_rng(args.seed + 1)
    x, text = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 8, 8, 48), (2, 64, 256)))
    given = x, jnp.asarray([[0.0, 0.4], [0.0, 0.9]]), text, None, 1.0, (0, 1, 1)
    run, kernels = jax.jit(network.__call__, static_argnums=(4, 5, 6)), block_kernels(network.axes())
    exact = run(weights, *given)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    for name, tree in {
        "float32, kernels of blocks as int8": quantised(weights, kernels),
        "bfloat16": half,
        "bfloat16, kernels of blocks as int8": quantised(half, kernels),
    }.items():
        print(f"{name}: {float(jnp.linalg.norm(run(tree, *given) - exact) / jnp.linalg.norm(exact)):.4f}")


if __name__ == "__main__":
    main()
