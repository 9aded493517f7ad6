"""A tiny video model with every weight drawn at random, and something to put into it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from small import redraw
from streams import told

from world_distill.models.tiny.family import TinyCodec, TinyFamily
from world_distill.models.tiny.modeling import TinyConfig

# Three different sides, so that no two axes can be mixed up unseen.
CONFIG = TinyConfig(grid=(3, 2, 4), channels=6, text_width=8, width=32, depth=2, heads=2, mlp=2)
TARGETS = r"blocks\..*|text_in|text_out"


def make_family(config=CONFIG, **options):
    return TinyFamily(config, TinyCodec(1, 2), **({"lora_targets": TARGETS} | options))


@functools.cache
def base_weights():
    shapes = jax.eval_shape(make_family().init_base, jax.random.key(0))
    return redraw(shapes, 1)


def random_lora():
    """Factors for every layer of the model that LoRA can adapt, all random."""
    family, base = make_family(lora_targets=".*"), base_weights()
    return redraw(jax.eval_shape(lambda key: family.init_lora(key, base, rank=2), jax.random.key(0)), 3, 0.3)


def inputs(batch=2, tokens=5, config=CONFIG, seed=2):
    """x_t, t and the condition; the last tokens of the odd rows are padding."""
    rng = np.random.default_rng(seed)
    f, h, w = config.grid
    mask = np.ones((batch, tokens), bool)
    mask[1::2, -2:] = False
    condition = told(
        jnp.asarray(rng.normal(size=(batch, tokens, config.text_width)), jnp.float32),
        jnp.asarray(mask),
        jnp.asarray(rng.normal(size=(batch, 1, h, w, config.channels)), jnp.float32),
    )
    x_t = jnp.asarray(rng.normal(size=(batch, f, h, w, config.channels)), jnp.float32)
    return x_t, jnp.asarray(rng.uniform(0.1, 1.0, batch), jnp.float32), condition
