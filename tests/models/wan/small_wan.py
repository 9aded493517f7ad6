"""The transformer of `make_goldens.py` in our layout, with its weights and inputs."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from world_distill.models.functional import Functional
from world_distill.models.lora import init_lora
from world_distill.models.tensor_map import assemble, our_shapes
from world_distill.models.wan.modeling import WanConfig, WanDiT
from world_distill.models.wan.published import KNOWN_SIZES, LORA_NAMES, LORA_RULES, transformer_entries
from world_distill.weights import lora_reading
from world_distill.weights.lora_layouts import METADATA_KEY, LoraModel

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIG = WanConfig(channels=6, width=32, depth=2, heads=2, mlp=48, text_width=20, time_width=32, remat="none")
MODEL = LoraModel(
    LORA_NAMES,
    {
        path.removesuffix(".kernel"): shape
        for path, shape in flatten_dict(our_shapes(transformer_entries(CONFIG)), sep=".").items()
        if path.endswith(".kernel")
    },
    {"diffusers": list(transformer_entries(CONFIG)), "comfy": list(transformer_entries(CONFIG, "original"))},
    KNOWN_SIZES,
    LORA_RULES,
)


def load(name):
    """The golden's arrays, its weights as our tree, and as diffusers has them."""
    with np.load(GOLDENS / name) as file:
        arrays = dict(file)
    theirs = {key[2:]: arrays.pop(key) for key in list(arrays) if key.startswith("w:")}
    return arrays, assemble(transformer_entries(CONFIG), theirs), theirs


def network(config):
    return Functional(lambda rngs: WanDiT(config, rngs=rngs))


def inputs(arrays):
    x = np.moveaxis(arrays["x"], 1, -1)
    times = np.concatenate([np.zeros((len(x), 1)), np.repeat(arrays["t"][:, None], x.shape[1] - 1, 1)], 1)
    return jnp.asarray(x), jnp.asarray(times, jnp.float32), jnp.asarray(arrays["text"])


def random_lora(weights, *, targets, rank=3, seed=0):
    """Factors that are all drawn anew, strong enough to be seen."""
    rng = np.random.default_rng(seed)
    lora = jax.eval_shape(lambda key: init_lora(key, weights, rank=rank, targets=targets), jax.random.key(0))
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) / x.shape[-2] ** 0.5).astype(np.float32), lora)


def tree_of(tensors, scale, **settings):
    """Our factors from tensors by diffusers' names, and PEFT's settings."""
    return lora_reading.read(tensors, {METADATA_KEY: json.dumps(settings)}, MODEL, scale=scale).tree


def check_gradients(weights, golden, arrays, *, alpha, rank, config=CONFIG):
    """Ours of the weighted sum of velocities against those in `arrays`, which `make_goldens.lora_gradients` made."""
    factors = {key: x for key, x in arrays.items() if "lora_" in key and not key.startswith("grad:")}
    # With PEFT's strength as our scale, `b` is lora_B as it stands, and so are the gradients.
    scale = alpha / rank
    lora = tree_of(factors, scale, lora_alpha=alpha)
    expected = tree_of({key[5:]: x for key, x in arrays.items() if key.startswith("grad:")}, 1.0)
    each = np.moveaxis(arrays["weights"], 1, -1)
    found = jax.jit(jax.grad(lambda w: (network(config)(weights, *inputs(golden), w, scale) * each).sum()))(lora)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        for n in range(len(ours)) if ours.ndim == 3 else [...]:
            # Where a block is not adapted, both are exactly 0.
            error, size = np.abs(ours[n] - theirs[n]).max(), np.abs(theirs[n]).max()
            assert error <= 1e-4 * size, f"{jax.tree_util.keystr(path)}[{n}]: off by {error} of {size}"
