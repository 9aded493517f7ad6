"""Gradients of LoRA factors against torch's, from goldens that `make_goldens.py` wrote."""

import dataclasses

import numpy as np
import pytest

from tests.models.wan.small_wan import CONFIG, GOLDENS, check_gradients, load


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_gradients_of_every_adapted_layer_are_those_of_torch(remat):
    golden, weights, _ = load("transformer_3x4x6.npz")
    with np.load(GOLDENS / "lora_gradients.npz") as arrays:
        check_gradients(weights, golden, dict(arrays), alpha=6, rank=3, config=dataclasses.replace(CONFIG, remat=remat))
