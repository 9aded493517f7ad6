import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from streams import one_stream, told, video

from world_distill.core import flow, sampling, unipc

SHAPE = (3, 2, 2, 4)  # f h w c
PINNED = np.float32([0, 1, 1])
SCENE = np.random.default_rng(1).normal(size=(2, 1, *SHAPE[1:])).astype(np.float32)
MEAN, STD = 0.7, 0.4


def condition(dtype=np.float32):
    return told(jnp.zeros((2, 1, 1)), jnp.ones((2, 1), bool), jnp.asarray(SCENE, dtype))


def keys():
    return sampling.sample_keys(jax.random.key(0), np.arange(2))


def exact(steps, shift=3.0):
    """A schedule that tells the network the exact times, not whole timesteps."""
    schedule = unipc.unipc_schedule(steps, shift)
    return schedule._replace(times_told=schedule.times[:-1])


@functools.partial(jax.jit, static_argnames=["denoise", "pinned", "dtype"])
def run(denoise, schedule, pinned=False, dtype=np.float32):
    streams = video(SHAPE, PINNED if pinned else None)
    out = unipc.unipc_rollout(
        one_stream(denoise), None, None, condition(dtype), keys(), schedule=schedule, streams=streams
    )
    return out.latents["video"]


@functools.partial(jax.jit, static_argnames=["denoise"])
def euler(denoise, times):
    out = sampling.rollout(
        one_stream(denoise), None, None, condition(), keys(), times=times, streams=video(SHAPE), keep_states=False
    )
    return out.latents["video"]


@pytest.fixture(scope="module")
def noise():
    return np.asarray(jax.jit(lambda: sampling.initial_noise(keys(), {}, video(SHAPE))["video"])())


def constant(base, lora, x, t, condition):
    return jnp.full_like(x, 0.25)


def towards_a_point(base, lora, x, t, condition):
    return (x - condition.scene["video"]) / flow.broadcast_time(t, x.ndim)


def towards_a_gaussian(base, lora, x, t, condition):
    """The velocity for data N(MEAN, STD^2), whose ODE carries noise x to MEAN + STD x."""
    t = flow.broadcast_time(t, x.ndim)
    centred = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    return t * centred - (MEAN + (1 - t) * STD**2 * centred)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_constant_velocity_is_followed_exactly(noise, steps):
    latents = run(constant, unipc.unipc_schedule(steps, 5.0))
    np.testing.assert_allclose(latents, noise - 0.25, atol=3e-6)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_flow_into_a_point_ends_there(steps):
    schedule = exact(steps)
    goal = np.broadcast_to(SCENE, (2, *SHAPE))
    np.testing.assert_allclose(run(towards_a_point, schedule), goal, atol=3e-6)
    np.testing.assert_allclose(euler(towards_a_point, schedule.times), goal, atol=3e-6)


def test_it_is_of_second_order_and_ahead_of_euler(noise):
    goal = MEAN + STD * noise
    few, many = (np.abs(run(towards_a_gaussian, exact(steps, 1.0)) - goal).max() for steps in (8, 64))
    assert few / many > 25  # 8 would be first order, 64 second
    by_euler = np.abs(euler(towards_a_gaussian, flow.sampling_times(64)) - goal).max()
    assert many < by_euler / 10


def test_corrections_integrate_parabolas_exactly():
    """x(t') = t'/t x + t' int e^l m(l) dl over l = log((1-t)/t), for each m of degree 2 in l."""
    schedule = unipc.unipc_schedule(8, 5.0)
    t = schedule.times.astype(np.float64)[:-1]
    nodes = np.log(1 - t) - np.log(t)
    for i in range(2, 8):
        for degree in range(3):

            def clean(at, degree=degree, origin=nodes[i]):
                return ((at - origin) / 5) ** degree

            integral, _ = scipy.integrate.quad(lambda at: np.exp(at) * clean(at), nodes[i - 1], nodes[i])  # noqa: B023
            row = schedule.corrector[i].astype(np.float64)
            ours = row[1:] @ [clean(nodes[i]), clean(nodes[i - 1]), clean(nodes[i - 2])]
            np.testing.assert_allclose(ours, t[i] * integral, atol=1e-7)
            np.testing.assert_allclose(row[0], t[i] / t[i - 1], rtol=1e-6)


def test_tables_are_finite_and_end_at_the_prediction():
    for steps in (1, 2, 50):
        schedule = unipc.unipc_schedule(steps, 5.0)
        assert all(table.dtype == np.float32 and np.isfinite(table).all() for table in schedule)
        np.testing.assert_array_equal(schedule.predictor[-1], [0, 1, 0])
        assert schedule.times[-1] == 0 and schedule.times[0] < 1


def test_the_network_is_traced_as_often_for_many_steps_as_for_few():
    def count(*schedules):
        calls = []

        def denoise(*inputs):
            calls.append(1)
            return constant(*inputs)

        for schedule in schedules:
            run(denoise, schedule)
        return len(calls)

    few = count(unipc.unipc_schedule(2, 5.0))
    assert few == count(unipc.unipc_schedule(20, 5.0)) > 0
    assert few == count(unipc.unipc_schedule(2, 5.0), unipc.unipc_schedule(2, 1.0))


def coarse(base, lora, x, t, condition):
    """Half precision; nonsense in the pinned frame, and everywhere unless that frame holds the scene."""
    held = jnp.all(x[:, :1] == condition.scene["video"].astype(x.dtype), axis=(1, 2, 3, 4), keepdims=True)
    return jnp.where(held, jnp.sin(2 * x), jnp.nan).at[:, 0].set(jnp.nan).astype(jnp.bfloat16)


def test_pinned_frames_hold_the_scene_and_states_stay_float32(noise):
    latents = np.asarray(run(coarse, unipc.unipc_schedule(8, 5.0), pinned=True, dtype=jnp.bfloat16))
    np.testing.assert_array_equal(latents[:, :1], SCENE.astype(jnp.bfloat16).astype(np.float32))
    assert latents.dtype == np.float32 and np.isfinite(latents).all()
    free = latents[:, 1:]
    assert (free != free.astype(jnp.bfloat16)).mean() > 0.9
    assert np.abs(free - noise[:, 1:]).max() > 0.1


@pytest.mark.parametrize(
    "steps, shift, message",
    [
        (0, 5.0, "at least one step"),
        (8, 0.0, "must be positive"),
        (8, float("nan"), "must be positive"),
        (8, float("inf"), "finite"),
        (1000, 1e5, "take fewer, or a smaller shift"),
    ],
)
def test_bad_schedules_are_refused(steps, shift, message):
    with pytest.raises(ValueError, match=message):
        unipc.unipc_schedule(steps, shift)
