import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill.core import schedules


def test_piecewise_linear_by_hand():
    beta = schedules.piecewise_linear([(10, 1.0), (20, 0.05), (60, 0.25)])
    steps = [0, 10, 15, 20, 40, 60, 1000]
    expected = [1.0, 1.0, 0.525, 0.05, 0.15, 0.25, 0.25]
    np.testing.assert_allclose([beta(step) for step in steps], expected, rtol=1e-6)
    traced = jax.jit(jax.vmap(beta))(jnp.asarray(np.int32(steps)))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, expected, rtol=1e-6)


def test_constants():
    for points in (0.01, 3, [(5, 0.01)]):
        schedule = schedules.piecewise_linear(points)
        expected = np.float32(points if np.isscalar(points) else 0.01)
        assert [schedule(step) for step in (0, 5, 10**6)] == [expected] * 3


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0, 1.0), (0, 2.0)],
        [(10, 1.0), (5, 2.0)],
        [(0, 1.0, 2.0)],
        [(0, float("nan"))],
        [1.0, 2.0],
    ],
)
def test_bad_points_are_refused(points):
    with pytest.raises(ValueError):
        inspect.unwrap(schedules.piecewise_linear)(points)  # without the check of annotations


def test_linear_ema_decay():
    got = [float(schedules.ema_decay_linear(step)) for step in (0, 1, 100, 299, 300, 10**5)]
    np.testing.assert_allclose(got, [0, 0.001, 0.1, 0.299, 0.3, 0.3], rtol=1e-6)
    step = jax.jit(schedules.ema_decay_linear)(jnp.asarray(np.int32(7)))
    np.testing.assert_allclose(step, 0.007, rtol=1e-6)
    assert float(schedules.ema_decay_linear(50, slope=0.01, maximum=0.9)) == pytest.approx(0.5)


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(3, 4)), rng.normal(size=5)
    return {"a": jnp.asarray(a, dtype), "b": (jnp.asarray(b, dtype), None)}


def test_ema_update_is_the_weighted_mean():
    avg, new = tree(0), tree(1)
    got = jax.jit(schedules.ema_update)(avg, new, 0.9)
    expected = jax.tree.map(lambda a, n: 0.9 * np.float64(a) + 0.1 * np.float64(n), avg, new)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6), got, expected)
    jax.tree.map(np.testing.assert_array_equal, schedules.ema_update(avg, new, 0.0), new)
    for decay in (0.0, 0.123, 0.9999):
        jax.tree.map(np.testing.assert_array_equal, schedules.ema_update(avg, avg, decay), avg)


def test_ema_update_keeps_the_dtype_of_the_average():
    avg, new = tree(0, jnp.bfloat16), tree(1)
    got = schedules.ema_update(avg, new, jnp.float32(0.5))
    assert got["a"].dtype == jnp.bfloat16
    expected = (np.float32(avg["a"]) + np.float32(new["a"])) / 2
    np.testing.assert_allclose(np.float32(got["a"]), expected, rtol=2**-8, atol=1e-6)


def test_repeated_updates_forget_geometrically():
    avg, new = {"a": jnp.asarray(np.float32([1.0]))}, {"a": jnp.asarray(np.float32([0.0]))}
    update = jax.jit(schedules.ema_update)
    for _ in range(10):
        avg = update(avg, new, 0.7)
    np.testing.assert_allclose(avg["a"], [0.7**10], rtol=1e-5)
