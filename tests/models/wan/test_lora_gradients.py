"""Gradients of LoRA factors against torch's, from goldens that `make_goldens.py` wrote."""

import numpy as np

from tests.models.wan.small_wan import GOLDENS, check_gradients, load


def test_gradients_of_every_adapted_layer_are_those_of_torch():
    golden, weights, _ = load("transformer_3x4x6.npz")
    with np.load(GOLDENS / "lora_gradients.npz") as arrays:
        check_gradients(weights, golden, dict(arrays), alpha=6, rank=3)
