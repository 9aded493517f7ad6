import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill.core import flow

SHAPE = (3, 4, 2, 2, 5)  # b f h w c


def draw(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_ends_of_the_path():
    x0, eps = draw(0), draw(1)
    np.testing.assert_array_equal(flow.interpolate(x0, eps, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, eps, jnp.ones(3)), eps)


def test_velocity_is_the_time_derivative():
    x0, eps, t = draw(0), draw(1), jnp.array([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: flow.interpolate(x0, eps, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(flow.velocity(x0, eps), derivative, rtol=1e-6)


def test_velocity_points_back_at_data_and_noise():
    x0, eps, t = draw(0), draw(1), jnp.array([0.1, 0.5, 1.0])
    x_t, v = flow.interpolate(x0, eps, t), flow.velocity(x0, eps)
    np.testing.assert_allclose(flow.clean_from_velocity(x_t, v, t), x0, atol=1e-6)
    np.testing.assert_allclose(flow.noise_from_velocity(x_t, v, t), eps, atol=1e-6)


def test_half_precision_inputs_are_not_rounded_again():
    x0, eps = draw(0).astype(jnp.bfloat16), draw(1).astype(jnp.bfloat16)
    t = np.array([0.3, 0.5, 0.7], np.float32)
    x64, e64 = np.asarray(x0, np.float64), np.asarray(eps, np.float64)
    t64 = t.astype(np.float64)[:, None, None, None, None]
    v, x_t = flow.velocity(x0, eps), flow.interpolate(x0, eps, t)
    assert v.dtype == x_t.dtype == jnp.float32
    np.testing.assert_allclose(v, e64 - x64, rtol=1e-6)
    np.testing.assert_allclose(x_t, (1 - t64) * x64 + t64 * e64, atol=1e-6)
    np.testing.assert_allclose(flow.clean_from_velocity(x0, eps, t), x64 - t64 * e64, atol=1e-6)
    np.testing.assert_allclose(flow.noise_from_velocity(x0, eps, t), x64 + (1 - t64) * e64, atol=1e-6)


def test_broadcast_time():
    assert flow.broadcast_time(jnp.arange(3.0), 5).shape == (3, 1, 1, 1, 1)
    assert flow.broadcast_time(0.5, 4).shape == (1, 1, 1, 1)
    assert flow.broadcast_time(np.float64([0.5, 0.25]), 2).tolist() == [[0.5], [0.25]]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_shift_moves_log_odds_of_time(shift):
    t = np.linspace(0.05, 0.95, 19)
    moved = flow.shift_times(t, shift)
    assert moved.dtype == np.float64
    np.testing.assert_allclose(np.log(moved / (1 - moved)), np.log(shift * t / (1 - t)), rtol=1e-9)
    assert flow.shift_times(0.0, shift) == 0.0
    assert flow.shift_times(1.0, shift) == pytest.approx(1.0, abs=1e-15)


def test_sampling_times_by_hand():
    times = flow.sampling_times(4, shift=3.0)
    assert isinstance(times, np.ndarray) and times.dtype == np.float32
    np.testing.assert_allclose(times, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-7)
    np.testing.assert_array_equal(flow.sampling_times(1), np.float32([1, 0]))


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 5.0, 7.7])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_sampling_times_run_from_exactly_1_to_exactly_0(steps, shift):
    times = flow.sampling_times(steps, shift)
    assert times.shape == (steps + 1,)
    assert times[0] == 1.0 and times[-1] == 0.0 and (np.diff(times) < 0).all()


def test_explicit_times_are_kept_and_closed():
    table = [1.0, 0.99375, 0.725, 0.421875]
    np.testing.assert_array_equal(flow.sampling_times(4, explicit=table), np.float32([*table, 0]))
    np.testing.assert_array_equal(flow.sampling_times(None, explicit=[*table, 0.0]), np.float32([*table, 0]))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(steps=0),
        dict(steps=None),
        dict(steps=4, shift=0.0),
        dict(steps=4, shift=-1.0),
        dict(steps=None, explicit=[]),
        dict(steps=None, explicit=[0.0]),
        dict(steps=None, explicit=[1.5, 0.5]),
        dict(steps=None, explicit=[1.0, 0.5, 0.5]),
        dict(steps=None, explicit=[0.5, 1.0]),
        dict(steps=None, explicit=[1.0, 0.0, 0.5]),
        dict(steps=None, explicit=[1.0, -0.5]),
        dict(steps=None, explicit=[1.0, float("nan"), 0.5]),
        dict(steps=None, explicit=[0.5, 0.5 - 1e-12]),  # one number in float32
        dict(steps=3, explicit=[1.0, 0.5]),
        dict(steps=2, shift=3.0, explicit=[1.0, 0.5]),
    ],
)
def test_bad_times_are_refused(arguments):
    with pytest.raises(ValueError):
        flow.sampling_times(**arguments)


def test_masked_mean_is_the_mean_of_the_free_frames():
    x = draw(2)
    x64 = np.asarray(x, np.float64)
    np.testing.assert_allclose(flow.masked_mean(x, None), x64.mean((1, 2, 3, 4)), atol=1e-6)
    for mask in ([1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]):
        expected = x64[:, np.array(mask, bool)].mean((1, 2, 3, 4))
        np.testing.assert_allclose(flow.masked_mean(x, np.float32(mask)), expected, atol=1e-6)


def test_masked_mean_ignores_what_is_pinned_and_sums_in_float32():
    x = jnp.ones((1, 2, 64, 64, 8), jnp.bfloat16).at[:, 0].set(jnp.nan)
    x = x.at[:, 1, ::2].set(1.0078125)  # the neighbour of 1: a bfloat16 sum would lose it
    mean_of = lambda x: flow.masked_mean(x, np.float32([0, 1]))  # noqa: E731
    for function in (mean_of, jax.jit(mean_of)):
        mean = function(x)
        assert mean.dtype == jnp.float32
        np.testing.assert_allclose(mean, [1.00390625], rtol=1e-6)
