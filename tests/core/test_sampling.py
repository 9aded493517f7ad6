import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from streams import video

from world_distill.core import flow, sampling

SHAPE = (3, 2, 2, 4)  # f h w c
PINNED = np.float32([0, 1, 1])
FREE = np.float32([1, 1, 1])


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keys(ids, seed=0):
    return sampling.sample_keys(jax.random.key(seed), ids)


# One compilation a call, where eager calls would compile every operation.
sde_step = jax.jit(sampling.sde_step)


@functools.partial(jax.jit, static_argnames=["mask"])
def log_prob_of(x_next, mean, std, mask):
    return sampling.gaussian_log_prob(x_next, mean, std, None if mask is None else np.float32(mask))


def log_prob(x_next, mean, std, mask):
    return log_prob_of(x_next, mean, std, None if mask is None else tuple(mask.tolist()))


# The exact velocity field of data N(MEAN, STD^2): x_t is N((1 - t) MEAN, variance(t)).
MEAN, STD = 0.7, 0.4


def variance(t):
    return (1 - t) ** 2 * STD**2 + t**2


def gaussian_velocity(x, t):
    centred = (x - (1 - t) * MEAN) / variance(t)
    return t * centred - (MEAN + (1 - t) * STD**2 * centred)


def test_step_without_diffusion_is_euler_exactly():
    x, v, noise = draw(0, (2, *SHAPE)), draw(1, (2, *SHAPE)), draw(2, (2, *SHAPE))
    t, t_next = np.float32(0.7), np.float32(0.55)
    x_next, mean, std = sampling.sde_step(x, v, t, t_next, 0.0, noise)
    np.testing.assert_array_equal(x_next, x + v * (t_next - t))
    np.testing.assert_array_equal(mean, x_next)
    np.testing.assert_array_equal(std, np.zeros(2))


def test_step_adds_the_score_of_the_marginal():
    """Mean = Euler of [v - g^2/2 score], with the score taken by differentiating a density."""
    x = draw(0, (2, *SHAPE))
    t, t_next, g = 0.6, 0.5, 1.3

    def log_density(y):
        return jax.scipy.stats.norm.logpdf(y, (1 - t) * MEAN, variance(t) ** 0.5)

    score = jax.jit(jax.vmap(jax.grad(log_density)))(x.ravel()).reshape(x.shape)
    x, score = np.asarray(x), np.asarray(score)
    v = gaussian_velocity(x, t)
    _, mean, std = sde_step(x, v, t, t_next, g, None)
    np.testing.assert_allclose(mean, x + (v - g**2 / 2 * score) * (t_next - t), atol=1e-6)
    np.testing.assert_allclose(std, [g * 0.1**0.5] * 2, rtol=1e-6)


def test_step_has_the_stated_moments():
    n = 100_000
    x = np.full((n, 1, 1, 1, 1), 0.4, np.float32)
    x_next, mean, std = jax.device_get(sde_step(jnp.asarray(x), jnp.asarray(0.5 * x), 0.8, 0.6, 0.9, draw(0, x.shape)))
    t, dt, g = 0.8, -0.2, 0.9
    expected = 0.4 + (0.2 + g * g / (2 * t) * (0.4 + 0.2 * 0.2)) * dt
    error = g * np.sqrt(0.2) / np.sqrt(n)
    np.testing.assert_allclose(mean.ravel()[0], expected, rtol=1e-6)
    np.testing.assert_allclose(np.mean(x_next), expected, atol=4 * error)
    np.testing.assert_allclose(np.std(x_next), g * np.sqrt(0.2), rtol=0.01)
    np.testing.assert_allclose(std[0], g * np.sqrt(0.2), rtol=1e-6)


def test_means_of_two_policies_differ_by_a_multiple_of_their_velocities():
    x, a, b = (draw(seed, (3, *SHAPE)) for seed in range(3))
    t, t_next, g = np.array([[0.9, 0.5, 0.2], [0.7, 0.4, 0.1], [0.5, 1.0, 0.0]], np.float32)
    mean_a = np.asarray(sde_step(x, a, t, t_next, g, None)[1])
    mean_b = np.asarray(sde_step(x, b, t, t_next, g, None)[1])
    factor = (1 + g**2 * (1 - t) / (2 * t)) * (t_next - t)
    expected = factor[:, None, None, None, None] * (np.asarray(a) - np.asarray(b))
    np.testing.assert_allclose(mean_a - mean_b, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["ode", "constant", "flow_grpo"])
def test_steps_keep_the_marginals_of_gaussian_data(kind):
    """A step is affine in (x, noise): carry mean and variance through it without any sampling."""
    times = flow.sampling_times(2000)
    g = {
        "ode": np.zeros(2000),
        "constant": np.full(2000, 0.7),
        "flow_grpo": sampling.flow_grpo_diffusion(times, 0.7),
    }[kind].astype(np.float32)

    def moments(carry, inputs):
        t, t_next, g = inputs
        x = jnp.array([0.0, 1.0, 0.0]).reshape(3, 1, 1, 1, 1)
        noise = jnp.array([0.0, 0.0, 1.0]).reshape(3, 1, 1, 1, 1)
        x_next, _, _ = sampling.sde_step(x, gaussian_velocity(x, t), t, t_next, g, noise)
        offset, slope, spread = (
            x_next[0, 0, 0, 0, 0],
            *(x_next[1:, 0, 0, 0, 0] - x_next[0, 0, 0, 0, 0]),
        )
        mean, var = carry
        carry = (offset + slope * mean, slope**2 * var + spread**2)
        return carry, carry

    _, (mean, var) = jax.lax.scan(moments, (0.0, 1.0), (times[:-1], times[1:], g))
    # Flow-GRPO's g is infinite at t = 1 and g^2 dt does not fall with the step there; what that
    # costs is forgotten on the way, so it is looked at later.
    t = times[1:].astype(np.float64)
    look = t < (0.5 if kind == "flow_grpo" else 1.0)
    np.testing.assert_allclose(mean[look], ((1 - t) * MEAN)[look], atol=2e-3)
    np.testing.assert_allclose(var[look], variance(t)[look], rtol=1e-2)


def test_log_prob_is_the_mean_gaussian_log_density():
    x, mean = draw(0, (3, *SHAPE)), draw(1, (3, *SHAPE))
    dense = scipy.stats.norm.logpdf
    std = np.float32([0.1, 1.0, 2.5])
    for mask in (None, FREE, PINNED):
        free = slice(None) if mask is None else mask > 0
        wide = std[:, None, None, None, None]
        expected = dense(np.float64(x), np.float64(mean), wide)[:, free].mean((1, 2, 3, 4))
        np.testing.assert_allclose(log_prob(x, mean, std, mask), expected, rtol=2e-6)
    one, each = log_prob(x, mean, 0.5, None), log_prob(x, mean, np.full(3, 0.5, np.float32), None)
    np.testing.assert_allclose(one, each, rtol=1e-6)


def test_log_prob_of_a_deterministic_step_is_0_with_gradient_0():
    x, mean = draw(0, (2, *SHAPE)), draw(1, (2, *SHAPE))
    std = np.float32([0.0, 0.5])

    value, pull = jax.vjp(lambda mean: log_prob(x, mean, std, PINNED), mean)
    assert value[0] == 0 and value[1] != 0
    gradient = np.asarray(pull(jnp.asarray(np.ones(2, np.float32)))[0])
    np.testing.assert_array_equal(gradient[0], 0)
    x, mean = np.asarray(x), np.asarray(mean)
    expected = (x[1] - mean[1]) / 0.5**2 / (2 * 2 * 2 * 4) * PINNED[:, None, None, None]
    np.testing.assert_allclose(gradient[1], expected, rtol=1e-5)


def test_log_prob_sends_no_gradient_into_the_action():
    x, mean = draw(0, (2, *SHAPE)), draw(1, (2, *SHAPE))
    gradient = jax.jit(jax.grad(lambda x: log_prob(x, mean, 0.5, None).sum()))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_flow_grpo_diffusion_by_hand():
    times = np.float32([1.0, 0.8, 0.5, 0.2, 0.0])
    g = sampling.flow_grpo_diffusion(times, 0.7)
    assert g.dtype == np.float32
    expected = [0.7 * (1 / 0.2) ** 0.5, 0.7 * 2.0, 0.7, 0.0]
    np.testing.assert_allclose(g, expected, rtol=1e-6)
    np.testing.assert_allclose(
        sampling.flow_grpo_diffusion(times, 0.7, window=(1, 2)), [0, *expected[1:3], 0], rtol=1e-6
    )
    np.testing.assert_array_equal(sampling.flow_grpo_diffusion(times, 0.0), np.zeros(4))
    # A grid that starts below 1 needs no replacement.
    np.testing.assert_allclose(sampling.flow_grpo_diffusion(times[1:], 0.7), [1.4, 0.7, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    "eta, window",
    [(-0.1, None), (0.7, (-1, 2)), (0.7, (0, 0)), (0.7, (3, 2)), (0.7, (3, 1)), (0.7, (0, 5))],
)
def test_bad_diffusion_is_refused(eta, window):
    with pytest.raises(ValueError):
        sampling.flow_grpo_diffusion(flow.sampling_times(4), eta, window)


def test_one_step_cannot_be_stochastic():
    with pytest.raises(ValueError):
        sampling.flow_grpo_diffusion(flow.sampling_times(1), 0.7)


@functools.partial(jax.jit, static_argnames=["mask"])
def start(ids, scene, mask=None, seed=0):
    return sampling.initial_noise(keys(ids, seed), {"video": scene}, video(SHAPE, mask))["video"]


def test_initial_noise_is_standard_normal_and_pinned():
    scene = np.asarray(draw(0, (64, 1, *SHAPE[1:])))
    x = np.asarray(start(np.arange(64), scene, mask=tuple(PINNED)))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x[:, :1], scene)
    assert scipy.stats.kstest(x[:, 1:].ravel(), "norm").pvalue > 1e-3
    whole = np.asarray(start(np.arange(64), scene))
    np.testing.assert_array_equal(whole[:, 1:], x[:, 1:])
    assert (whole[:, :1] != scene).all()


def test_noise_depends_on_key_and_sample_id_alone():
    scene = np.asarray(draw(0, (6, 1, *SHAPE[1:])))
    whole = np.asarray(start(np.array([5, 3, 8, 1, 0, 2]), scene))
    part = np.asarray(start(np.array([8, 5]), scene[:2]))
    np.testing.assert_array_equal(part, whole[[2, 0]])
    other = np.asarray(start(np.array([8, 5]), scene[:2], seed=1))
    assert (other != part).all()
    assert len(np.unique(whole)) == whole.size
