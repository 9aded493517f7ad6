"""The transformer of `make_goldens.py` in our layout, with its weights and inputs."""

import pathlib

import jax
import numpy as np

from world_distill.models.functional import Functional
from world_distill.models.lora import init_lora, kernels
from world_distill.models.params import assemble
from world_distill.models.wan.modeling import WanConfig, WanDiT
from world_distill.models.wan.params import transformer_entries

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIG = WanConfig(channels=6, width=32, depth=2, heads=2, mlp=48, text_width=20, time_width=32, remat="none")


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
    return x, times.astype(np.float32), arrays["text"]


def shapes():
    """Path -> shape of every linear layer's kernel."""
    made = jax.eval_shape(network(CONFIG).init, jax.random.key(0))
    return {path: kernel.shape for path, kernel in kernels(made).items()}


def random_lora(weights, *, targets, rank=3, seed=0):
    """Factors that are all drawn anew, strong enough to be seen."""
    rng = np.random.default_rng(seed)
    lora = jax.eval_shape(lambda key: init_lora(key, weights, rank=rank, targets=targets), jax.random.key(0))
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) / x.shape[-2] ** 0.5).astype(np.float32), lora)
