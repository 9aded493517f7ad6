"""Coefficient-preserving sampling: its step, its noise level, its log-probability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import one_stream, told, video

from world_distill.core import flow, sampling

# LTX-2's distilled sampler: half of its steps are the first 2.5 % of the way.
GRID = flow.sampling_times(8, explicit=(1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422))
SHAPE = (3, 2, 2, 4)  # f h w c
CLIP = 0.6  # every entry of the only clip that `told_all` knows


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=["sde"])
def step(x, v, t, t_next, g, noise=None, counts=None, sde="cps"):
    return sampling.sde_step(x, v, t, t_next, g, noise, counts, sde)


def test_the_step_is_the_published_formula():
    """In float64, as it is written in the paper: predicted clip and predicted noise, mixed anew."""
    x, v, z = (draw(seed, (3, *SHAPE)) for seed in range(3))
    t, t_next = np.float32([1.0, 0.725, 0.422]), np.float32([0.99375, 0.422, 0.2])
    share = np.sin(np.array([0.8, 0.3, 1.0]) * np.pi / 2)
    x_next, mean, std = step(x, v, t, t_next, np.float32(t_next * share), z)

    t, t_next, share = (np.float64(y)[:, None, None, None, None] for y in (t, t_next, share))
    x, v, z = (np.float64(y) for y in (x, v, z))
    clip, noise = x - t * v, x + (1 - t) * v
    expected = (1 - t_next) * clip + np.sqrt(t_next**2 * (1 - share**2)) * noise
    np.testing.assert_allclose(mean, expected, atol=5e-4)  # at eta = 1 a square root of a rounding
    np.testing.assert_allclose(mean[:2], expected[:2], atol=2e-6)
    np.testing.assert_allclose(std, (t_next * share).ravel(), rtol=1e-6)
    np.testing.assert_allclose(x_next, np.float64(mean) + t_next * share * z, atol=1e-6)


def test_a_step_without_noise_is_eulers_exactly_and_so_is_the_step_into_0():
    x, v, z = (draw(seed, (2, *SHAPE)) for seed in range(3))
    for t, t_next in ((0.7, 0.55), (0.422, 0.0)):
        x_next, mean, std = sampling.sde_step(x, v, np.float32(t), np.float32(t_next), 0.0, z, sde="cps")
        np.testing.assert_array_equal(mean, x + v * np.float32(np.float32(t_next) - np.float32(t)))
        np.testing.assert_array_equal(x_next, mean)
        np.testing.assert_array_equal(std, 0)


def test_places_that_do_not_count_take_the_euler_step():
    x, v, z = (draw(seed, (2, *SHAPE)) for seed in range(3))
    counts = np.array([False, True, True])
    part = step(x, v, 0.7, 0.5, 0.4, z, counts)[0]
    np.testing.assert_allclose(part[:, :1], (x - 0.2 * v)[:, :1], atol=1e-6)
    np.testing.assert_array_equal(part[:, 1:], step(x, v, 0.7, 0.5, 0.4, z)[0][:, 1:])


def told_all(base, lora, x, t, condition):
    """The exact velocity where there is one clip: of x_t = (1 - t) CLIP + t e, it is e - CLIP."""
    return (x - CLIP) / t[:, None, None, None, None]


@functools.cache
def noise_levels(sde, eta, window=None):
    """Of a rollout on GRID, (mean, std) [k] of its states over 36,864 entries."""
    rows, shape = 16, (9, 16, 16, 1)

    @jax.jit
    def run():
        keys = sampling.sample_keys(jax.random.key(0), jnp.arange(rows))
        condition = told(jnp.zeros((rows, 1, 1)), jnp.ones((rows, 1), bool), jnp.zeros((rows, 1, 16, 16, 1)))
        return sampling.rollout(
            one_stream(told_all), None, None, condition, keys, times=GRID, streams=video(shape),
            diffusion=sampling.DIFFUSIONS[sde](GRID, eta, window), sde=sde, keep_states=True,
        )  # fmt: skip

    out = jax.device_get(run())
    states = out.states["video"].reshape(8, -1).astype(np.float64)
    np.testing.assert_allclose(out.latents["video"], CLIP, atol=1e-4)  # the last step ends in the clip
    return states.mean(axis=1), states.std(axis=1)


@pytest.mark.parametrize("eta, window", [(0.8, None), (1.0, None), (0.5, (4, 4))])
def test_cps_lands_on_the_noise_level_of_every_time(eta, window):
    mean, std = noise_levels("cps", eta, window)
    np.testing.assert_allclose(std, GRID[:-1], rtol=0.015)
    np.testing.assert_allclose(mean, (1 - GRID[:-1]) * CLIP, atol=0.02)


def test_flow_grpo_does_not():
    """From t = .975 on a step's noise alone is above the level: the state at .422 has 1.5 times its noise."""
    mean, std = noise_levels("flow_grpo", 0.7, (4, 4))
    np.testing.assert_allclose(std[:5], GRID[:5], rtol=0.015)  # before the window: the ODE
    assert (std[5:] / GRID[5:8] > [1.2, 1.3, 1.5]).all(), std / GRID[:-1]


def test_the_table_is_a_share_of_the_next_level():
    share = np.sin(0.8 * np.pi / 2)
    table = sampling.cps_diffusion(GRID, 0.8)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, share * np.append(GRID[1:8], 0), rtol=1e-6)
    inside = sampling.cps_diffusion(GRID, 0.8, (4, 4))
    np.testing.assert_array_equal(inside, np.where(np.arange(8) >= 4, table, 0))
    assert np.flatnonzero(inside).tolist() == [4, 5, 6]  # the step into 0 has no noise
    np.testing.assert_array_equal(sampling.cps_diffusion(GRID, 0.0), 0)
    assert (sampling.cps_diffusion(GRID, 1.0) == GRID[1:]).all()
    for eta, window in ((1.01, None), (-0.1, None), (0.8, (4, 5)), (0.8, (7, 1))):
        with pytest.raises(ValueError):
            sampling.cps_diffusion(GRID, eta, window)


def test_stds_of_steps_are_those_that_a_step_reports():
    x = jnp.zeros((8, 1, 1))
    for sde, eta in (("cps", 0.8), ("flow_grpo", 0.3)):
        table = sampling.DIFFUSIONS[sde](GRID, eta)
        std = step(x, x, GRID[:-1], GRID[1:], table, sde=sde)[2]
        np.testing.assert_allclose(sampling.step_stds(GRID, table, sde), std, rtol=1e-5)
        assert (std[:7] > 0).all()
    loud = sampling.step_stds(GRID, sampling.flow_grpo_diffusion(GRID, 0.7), "flow_grpo")
    np.testing.assert_allclose(loud[4:7], [1.12, 0.95, 0.63], atol=5e-3)


def test_the_log_probability_is_minus_the_mean_square():
    x, mean = draw(0, (3, *SHAPE)), draw(1, (3, *SHAPE))
    std, pinned = np.float32([0.0, 0.5, 2.0]), np.float32([0, 1, 1])

    def log_prob(mean):
        return sampling.step_log_prob(x, mean, std, pinned, "cps")

    value, pull = jax.vjp(log_prob, mean)
    gradient = np.asarray(pull(jnp.ones(3))[0])
    error = np.float64(x) - np.float64(mean)
    np.testing.assert_allclose(value, np.where(std > 0, -(error[:, 1:] ** 2).mean((1, 2, 3, 4)), 0), rtol=1e-6)
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_array_equal(gradient[:, 0], 0)
    np.testing.assert_allclose(gradient[1:, 1:], 2 * error[1:, 1:] / (2 * 2 * 2 * 4), rtol=1e-5)
    into_action = jax.grad(lambda x: sampling.step_log_prob(x, mean, std, pinned, "cps").sum())(x)
    np.testing.assert_array_equal(into_action, 0)
    np.testing.assert_array_equal(
        sampling.step_log_prob(x, mean, std, pinned, "flow_grpo"), sampling.gaussian_log_prob(x, mean, std, pinned)
    )
