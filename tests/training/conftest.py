"""Fixtures of the toy network."""

import jax.numpy as jnp
import pytest
from small import redraw

from tests.training.toy import DIFFUSION, Network, make_batch
from world_distill.structs import TrainBatch


@pytest.fixture(scope="module")
def family():
    return Network()


@pytest.fixture(scope="module")
def base(family):
    return redraw({name: jnp.zeros(shape) for name, shape in family.shapes.items()}, 0, 0.5)


@pytest.fixture(scope="module")
def lora():
    return redraw({"out": {"a": jnp.zeros((16, 4)), "b": jnp.zeros((4, 2))}}, 2)


@pytest.fixture(scope="module")
def batch(family, base, lora) -> TrainBatch:
    """Rollouts along the ODE."""
    return make_batch(family, base, lora)


@pytest.fixture(scope="module")
def noisy(family, base, lora) -> TrainBatch:
    """Rollouts by Flow-GRPO's stochastic steps."""
    return make_batch(family, base, lora, DIFFUSION)
