"""Gradients of LoRA factors against torch's, from goldens that `make_goldens.py` wrote."""

import dataclasses

import numpy as np
import pytest

from tests.models.ltx2.small_ltx2 import CONFIG, GOLDENS, check_gradients, load, weights_of


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_every_adapted_layer_are_those_of_torch(remat):
    golden, theirs = load("transformer.npz")
    with np.load(GOLDENS / "lora_gradients.npz") as arrays:
        config = dataclasses.replace(CONFIG, remat=remat)
        check_gradients(weights_of(CONFIG, theirs), golden, dict(arrays), alpha=6, rank=3, config=config)
