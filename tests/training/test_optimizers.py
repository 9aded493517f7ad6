"""Optimisers: each against its formula, and Muon on exactly the matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from world_distill.training.optimizers import make_optimizer, make_schedule, muon_dimensions


def updates(optimizer, gradients, params):
    state, out = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        out.append(update)
    return out


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name, decay", [("adam", 0.0), ("adamw", 0.1)])
def test_adam_against_its_formula(name, decay):
    lr, b1, b2, eps = 3e-3, 0.8, 0.95, 1e-5
    optimizer = make_optimizer(name=name, learning_rate=lr, weight_decay=decay, b1=b1, b2=b2, eps=eps)
    params, gradients = random(0, 5), [random(i, 5) for i in (1, 2, 3)]
    m = v = 0.0
    for k, (g, update) in enumerate(zip(gradients, updates(optimizer, gradients, params), strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        expected = -lr * (m / (1 - b1**k) / (jnp.sqrt(v / (1 - b2**k)) + eps) + decay * params)
        np.testing.assert_allclose(update, expected, rtol=2e-5, atol=1e-8)


def test_gradient_clip_is_by_global_norm():
    big = {"a": jnp.full(4, 30.0), "b": jnp.full(2, 40.0)}
    norm = float(jnp.sqrt(4 * 30.0**2 + 2 * 40.0**2))
    clipped = make_optimizer(name="adam", learning_rate=0.1, grad_clip=1.0, eps=1.0)
    plain = make_optimizer(name="adam", learning_rate=0.1, eps=1.0)
    params = jax.tree.map(jnp.zeros_like, big)
    scaled = jax.tree.map(lambda g: g / norm, big)
    for gradient, same in ((big, scaled), (scaled, scaled)):
        a, b = updates(clipped, [gradient], params)[0], updates(plain, [same], params)[0]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


@pytest.mark.parametrize("warmup, decay", [(0, None), (4, None), (4, 12), (0, 8)])
def test_schedule(warmup, decay):
    schedule = make_schedule(2.0, warmup_steps=warmup, decay_steps=decay)
    for i in range(16):
        if i < warmup:
            expected = 2.0 * (i + 1) / warmup
        elif decay is None:
            expected = 2.0
        else:
            expected = 1.0 + np.cos(np.pi * min((i - warmup) / (decay - warmup), 1.0))
        assert float(schedule(i)) == pytest.approx(expected, abs=1e-6)


def test_schedule_drives_the_updates():
    options = dict(name="adam", b1=0.0, b2=0.0, eps=1e-30)  # every update is the learning rate times a sign
    gradients, params = [jnp.ones(2)] * 4, jnp.zeros(2)
    warm = updates(make_optimizer(learning_rate=1.0, warmup_steps=4, **options), gradients, params)
    np.testing.assert_allclose([-u[0] for u in warm], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    own = updates(make_optimizer(learning_rate=lambda step: 10.0 + step, **options), gradients, params)
    np.testing.assert_allclose([-u[0] for u in own], [10, 11, 12, 13], rtol=1e-6)


# ---- Muon

WEIGHTS = {
    "stack": {"kernel": random(0, 3, 6, 4), "bias": random(1, 3, 4)},
    "one": {"kernel": random(2, 4, 8), "bias": random(3, 8)},
    "scale": jnp.ones(()),
}
AXES = {
    "stack": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
    "one": {"kernel": (None, "mlp"), "bias": None},
    "scale": None,
}


def orthogonality(update):
    """Singular values of a matrix, divided by their mean."""
    values = np.linalg.svd(np.asarray(update), compute_uv=False)
    return values / values.mean()


def test_muon_takes_matrices_and_stacked_matrices_only():
    found = muon_dimensions(WEIGHTS, AXES)
    assert found["stack"] == {"kernel": MuonDimensionNumbers(1, 2), "bias": None}
    assert found["one"] == {"kernel": MuonDimensionNumbers(0, 1), "bias": None} and found["scale"] is None
    specs = jax.tree.map(lambda a: jax.sharding.PartitionSpec(*a), AXES, is_leaf=lambda x: isinstance(x, tuple))
    assert muon_dimensions(WEIGHTS, specs) == found


def test_muon_orthogonalises_each_layer_by_itself():
    optimizer = make_optimizer(name="muon", learning_rate=0.1, axes=AXES)
    gradients = jax.tree.map(lambda w: random(9, *w.shape), WEIGHTS)
    update = jax.jit(lambda g: updates(optimizer, [g], WEIGHTS)[0])(gradients)
    raw = orthogonality(gradients["stack"]["kernel"][0])
    assert raw.max() - raw.min() > 0.8
    for layer in range(3):
        values = orthogonality(update["stack"]["kernel"][layer])
        assert values.max() - values.min() < 0.5
        # The same as that layer alone: no layer sees another.
        alone = {"w": gradients["stack"]["kernel"][layer]}
        single = updates(make_optimizer(name="muon", learning_rate=0.1), [alone], alone)[0]["w"]
        np.testing.assert_allclose(update["stack"]["kernel"][layer], single, rtol=1e-4, atol=1e-6)
    # Stacked vectors get the first update of Adam with Nesterov's momentum: a sign times the learning rate and this.
    first = 1 + 0.9 / (1 + 0.9)
    np.testing.assert_allclose(update["stack"]["bias"], -0.1 * first * jnp.sign(gradients["stack"]["bias"]), rtol=1e-4)
    np.testing.assert_allclose(update["scale"], -0.1 * first * jnp.sign(gradients["scale"]), rtol=1e-4)


def test_muon_decays_matrices_only():
    zero = jax.tree.map(jnp.zeros_like, WEIGHTS)
    optimizer = make_optimizer(name="muon", learning_rate=0.1, weight_decay=0.5, axes=AXES)
    update = updates(optimizer, [zero], WEIGHTS)[0]
    np.testing.assert_allclose(update["stack"]["kernel"], -0.05 * WEIGHTS["stack"]["kernel"], rtol=1e-5)
    assert not update["stack"]["bias"].any() and not update["one"]["bias"].any()


def test_muon_on_lora_needs_no_axes():
    lora = {
        "q": {"a": random(0, 3, 6, 2), "b": random(1, 3, 2, 6)},
        "head": {"a": random(2, 6, 2), "b": random(3, 2, 4)},
    }
    found = muon_dimensions(lora)
    assert found["q"] == {"a": MuonDimensionNumbers(1, 2), "b": MuonDimensionNumbers(1, 2)}
    assert found["head"] == {"a": MuonDimensionNumbers(0, 1), "b": MuonDimensionNumbers(0, 1)}


def test_muon_refuses_to_guess():
    with pytest.raises(ValueError, match=r"whether \['stack'\]\['bias'\] are matrices, or vectors stacked"):
        make_optimizer(name="muon", learning_rate=0.1).init(WEIGHTS)
    incomplete = AXES | {"one": {"kernel": (None, "mlp")}}
    with pytest.raises(ValueError, match=r"axes for weight \['one'\]\['bias'\] \(8,\): none given"):
        make_optimizer(name="muon", learning_rate=0.1, axes=incomplete).init(WEIGHTS)
    short = AXES | {"one": {"kernel": ("mlp",), "bias": None}}
    with pytest.raises(ValueError, match=r"\['one'\]\['kernel'\] \(4, 8\)"):
        make_optimizer(name="muon", learning_rate=0.1, axes=short).init(WEIGHTS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "sgd"}, "unknown optimiser 'sgd'; there are: adam, adamw, muon"),
        ({"name": "adam", "weight_decay": 0.1}, "adam has no weight decay"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"grad_clip": 0.0}, "grad_clip 0.0"),
        ({"grad_clip": float("nan")}, "grad_clip nan"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
        ({"warmup_steps": 5, "decay_steps": 5}, "decay_steps 5"),
        ({"learning_rate": lambda step: 1.0, "warmup_steps": 5}, "a schedule already"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**dict(name="adamw", learning_rate=1e-3) | changes)
