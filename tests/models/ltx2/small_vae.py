"""The autoencoder of `make_vae_goldens.py` in our layout, with its weights and inputs."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.models.ltx2.vae import VaeConfig
from world_distill.models.ltx2.vae_tensors import vae_entries
from world_distill.models.tensor_map import assemble

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CONFIG = VaeConfig(
    channels=4, encoder_widths=(8, 8, 16, 16), encoder_blocks=(1, 2, 1, 2, 1), decoder_widths=(8, 16, 32),
    decoder_blocks=(2, 1, 2, 1),
)  # fmt: skip


class Case(NamedTuple):
    """What `make_vae_goldens.vae` returns, channels last; of the golden's `clips`, every 7th row and 5th column."""

    weights: dict
    pixels: jax.Array
    encoded: jax.Array
    latents: jax.Array
    clips: jax.Array


def case(arrays: dict[str, np.ndarray], config: VaeConfig = CONFIG) -> Case:
    theirs = {key[2:]: x.astype(np.float32) for key, x in arrays.items() if key.startswith("w:")}
    weights = jax.tree.map(jnp.asarray, assemble(vae_entries(config), theirs))
    return Case(weights, *(jnp.moveaxis(jnp.asarray(arrays[name]), 1, -1) for name in ("pixels", "z", "latents", "y")))


def golden() -> Case:
    with np.load(GOLDENS / "vae.npz") as file:
        return case(dict(file))
