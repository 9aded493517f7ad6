"""The networks of `make_goldens.py` in our layout, with their weights and inputs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from world_distill.models.functional import Functional
from world_distill.models.lora import init_lora
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig, TextConnectors
from world_distill.models.ltx2.layout import LORA_RULES
from world_distill.models.ltx2.modeling import LTX2DiT
from world_distill.models.ltx2.published import (
    KNOWN_SIZES,
    LORA_NAMES,
    connector_entries,
    projection_entry,
    transformer_entries,
)
from world_distill.models.tensor_map import assemble, our_shapes
from world_distill.weights import lora_reading
from world_distill.weights.lora_layouts import METADATA_KEY, LoraModel

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIG = LTX2Config(
    channels=6, width=40, audio_channels=5, audio_width=24, depth=2, heads=4, text_width=14, fps=25.0, remat="none"
)
OFF = dataclasses.replace(CONFIG, audio="off")
CONNECTORS = ConnectorConfig(width=24, heads=3, depth=2, registers=4, length=12, states=3)
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


def split(arrays):
    """Arrays without the weights, and the weights under diffusers' names, float32."""
    theirs = {key[2:]: x.astype(np.float32) for key, x in arrays.items() if key.startswith("w:")}
    return {key: x for key, x in arrays.items() if not key.startswith("w:")}, theirs


def load(name):
    """The golden's arrays, and its weights under diffusers' names."""
    with np.load(GOLDENS / name) as file:
        return split(dict(file))


def weights_of(config, theirs):
    """Our tree of the transformer, from the tensors that it has."""
    entries = list(transformer_entries(config))
    return assemble(entries, {name: theirs[name] for entry in entries for name in entry.names})


def network(config):
    return Functional(lambda rngs: LTX2DiT(config, rngs=rngs))


def connectors(config=CONNECTORS):
    return Functional(lambda rngs: TextConnectors(config, rngs=rngs))


def connector_weights(config, theirs):
    """Our tree of the connectors, and the kernel of the projection."""
    entries = list(connector_entries(config))
    tree = assemble(entries, {name: theirs[name] for entry in entries for name in entry.names})
    return tree, projection_entry(config).gather(theirs.__getitem__)


def inputs(arrays, config=CONFIG):
    """Latents, times and texts as the network takes them, of the streams that it has."""
    streams = config.widths
    t = jnp.asarray(arrays["t"])
    return (
        {name: jnp.asarray(arrays[name]) for name in streams},
        jnp.stack([jnp.zeros_like(t), t], axis=1),
        {name: jnp.asarray(arrays[f"{name}_text"]) for name in streams},
    )


def times(arrays):
    """Which time each place has: 0 the first frame and the first two moments, t the rest."""
    frames, moments = arrays["video"].shape[1], arrays["audio"].shape[1]
    return {"video": (0,) + (1,) * (frames - 1), "audio": (0, 0) + (1,) * (moments - 2)}


def velocity(config, arrays, weights, lora=None, scale=1.0, given=None):
    """Velocities by stream, compiled."""
    run = jax.jit(lambda w, x, lora: network(config)(w, *x, lora, scale, times(arrays)))
    return run(weights, inputs(arrays, config) if given is None else given, lora)


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

    def total(lora):
        v = network(config)(weights, *inputs(golden, config), lora, scale, times(golden))
        return sum((x * arrays[f"weights_{name}"]).sum() for name, x in v.items())

    found = jax.jit(jax.grad(total))(lora)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        for n in range(len(ours)) if ours.ndim == 3 else [...]:
            # Where a block is not adapted, both are exactly 0.
            error, size = np.abs(ours[n] - theirs[n]).max(), np.abs(theirs[n]).max()
            assert error <= 1e-4 * size, f"{jax.tree_util.keystr(path)}[{n}]: off by {error} of {size}"
