import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from streams import one_stream, told, video

from world_distill.core import flow, sampling

SHAPE = (3, 2, 2, 4)  # f h w c
PINNED = np.float32([0, 1, 1])


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def condition(b, shape=SHAPE, seed=7):
    f, h, w, c = shape
    return told(draw(seed, (b, 2, 3)), jnp.asarray(np.ones((b, 2), bool)), draw(seed + 1, (b, 1, h, w, c)))


def keys(ids, seed=0):
    return sampling.sample_keys(jax.random.key(seed), ids)


@jax.jit
def start(ids):
    """Where rollouts begin when nothing is pinned."""
    return sampling.initial_noise(keys(ids), {}, video(SHAPE))["video"]


def wavy(base, lora, x, t, condition):
    """A denoiser that is not linear, works entry by entry and looks at its condition."""
    hint = jnp.mean(condition.text["text"].states, axis=(1, 2)) + t
    return base * jnp.sin(2 * x + hint[:, None, None, None, None]) + lora * x


# The exact velocity field of data N(MEAN, STD^2): x_t is N((1 - t) MEAN, variance(t)).
MEAN, STD = 0.7, 0.4


def variance(t):
    return (1 - t) ** 2 * STD**2 + t**2


def gaussian_velocity(x, t):
    centred = (x - (1 - t) * MEAN) / variance(t)
    return t * centred - (MEAN + (1 - t) * STD**2 * centred)


def gaussian_denoise(base, lora, x, t, condition):
    return gaussian_velocity(x, t[:, None, None, None, None])


def linear(base, lora, x, t, condition):
    return base * x + lora


@functools.partial(jax.jit, static_argnames=["denoise", "times", "shape", "mask", "keep"])
def compiled(denoise, ids, condition, diffusion, times, shape, mask, keep):
    return sampling.rollout(
        one_stream(denoise),
        jnp.float32(0.8),
        jnp.float32(0.3),
        condition,
        keys(ids),
        times=np.float32(times),
        streams=video(shape, mask),
        diffusion=diffusion,
        keep_states=keep,
    )


def arguments(ids, steps=6, *, c=None, shape=SHAPE, mask=PINNED, eta=None, g=None, keep=True):
    times = flow.sampling_times(steps, 2.0)
    if eta is not None:
        g = sampling.flow_grpo_diffusion(times, eta)
    c = condition(len(ids), shape) if c is None else c
    mask = None if mask is None else tuple(mask.tolist())
    return jnp.asarray(ids), c, g, tuple(times.tolist()), shape, mask, keep


def run(denoise, ids, steps=6, **settings):
    """A rollout with weights (0.8, 0.3), as numpy; calls of one shape share one compilation."""
    out = jax.device_get(compiled(denoise, *arguments(np.array(ids), steps, **settings)))
    return of_video(out)


def of_video(out):
    """A rollout's arrays in place of its streams."""
    return jax.tree.map(lambda x: x["video"] if isinstance(x, dict) else x, out, is_leaf=lambda x: isinstance(x, dict))


def test_ode_rollout_of_a_linear_field():
    """v = a x + b: every Euler step is affine, so their product is known in closed form."""
    times = flow.sampling_times(6, 2.0).astype(np.float64)
    out = run(linear, range(3), keep=False)
    x = np.asarray(start(np.arange(3)))
    factor = np.prod(1 + 0.8 * np.diff(times))
    fixed = -0.3 / 0.8
    expected = fixed + factor * (x.astype(np.float64) - fixed)
    np.testing.assert_allclose(out.latents[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-6)
    assert out.states is None and out.velocities is None and out.log_probs is None


def test_ode_rollout_converges_to_the_exact_flow():
    """For Gaussian data the ODE carries x_1 to MEAN + STD x_1."""
    out = run(gaussian_denoise, range(3), steps=2000, mask=None, keep=False)
    noise = np.asarray(start(np.arange(3)))
    np.testing.assert_allclose(out.latents, MEAN + STD * noise, atol=3e-3)


def test_sde_rollout_samples_the_same_distribution():
    out = run(gaussian_denoise, range(16), steps=200, shape=(4, 8, 8, 4), mask=None, eta=0.7)
    x = out.latents.ravel()
    np.testing.assert_allclose(x.mean(), MEAN, atol=0.02)
    np.testing.assert_allclose(x.std(), STD, rtol=0.03)
    # ... but not the ODE's clips: the way there was another.
    assert np.corrcoef(out.states[0].ravel(), x)[0, 1] < 0.9


@pytest.mark.parametrize("mask, eta", [(PINNED, 0.7), (PINNED, 0.0), (None, None)])
def test_rollout_is_the_plain_loop(mask, eta):
    """All of it again, in numpy and float64, with the noise drawn by its stated rule."""
    b, steps = 3, 6
    c, k = condition(b), keys(np.array([4, 9, 2]))
    out = run(wavy, [4, 9, 2], steps, mask=mask, eta=eta, c=c)
    times = flow.sampling_times(steps, 2.0)
    g = np.zeros(steps) if eta is None else sampling.flow_grpo_diffusion(times, eta)
    free = np.ones(3, bool) if mask is None else mask > 0
    normal = jax.jit(lambda key: jax.random.normal(key, SHAPE))

    def step_noise(step):
        rows = [normal(jax.random.fold_in(key, step)) for key in k]
        return np.stack(rows).astype(np.float64)

    x = step_noise(0)
    x[:, ~free] = c.scene["video"]
    hint = np.asarray(c.text["text"].states, np.float64).mean((1, 2))[:, None, None, None, None]
    for i in range(steps):
        t, t_next = float(times[i]), float(times[i + 1])
        v = 0.8 * np.sin(2 * x + hint + t) + 0.3 * x
        mean = x + (v + g[i] ** 2 / (2 * t) * (x + (1 - t) * v)) * (t_next - t)
        std = g[i] * np.sqrt(t - t_next)
        x_next = mean + std * step_noise(i + 1)
        np.testing.assert_allclose(out.states[i], x, atol=2e-5)
        np.testing.assert_allclose(out.velocities[i][:, free], v[:, free], atol=2e-5)
        np.testing.assert_array_equal(out.velocities[i][:, ~free], 0)
        if std > 0:
            dense = scipy.stats.norm.logpdf(x_next, mean, std)[:, free].mean((1, 2, 3, 4))
            np.testing.assert_allclose(out.log_probs[i], dense, atol=2e-5)
        else:
            np.testing.assert_array_equal(out.log_probs[i], 0)
        x = np.where(free[None, :, None, None, None], x_next, x)
    np.testing.assert_allclose(out.latents, x, atol=2e-5)
    assert out.states.shape == out.velocities.shape == (steps, b, *SHAPE)
    assert out.log_probs.shape == (steps, b)


def coarse_and_noisy(*inputs):
    """`wavy` in half precision, with nonsense in the pinned frame."""
    return wavy(*inputs).at[:, 0].set(jnp.nan).astype(jnp.bfloat16)


def test_pinned_frames_hold_the_scene_and_everything_stays_float32():
    c = condition(3)
    c = c.replace(scene={"video": c.scene["video"].astype(jnp.bfloat16)})
    out = run(coarse_and_noisy, range(3), eta=0.7, c=c)
    scene = np.asarray(c.scene["video"], np.float32)
    np.testing.assert_array_equal(out.states[:, :, :1], np.broadcast_to(scene, (6, *scene.shape)))
    np.testing.assert_array_equal(out.latents[:, :1], scene)
    for leaf in (out.latents, out.states, out.velocities, out.log_probs):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()  # the nonsense left no trace
    free = out.latents[:, 1:]
    assert (free != free.astype(jnp.bfloat16)).mean() > 0.9


def test_a_window_leaves_the_other_steps_deterministic():
    times = flow.sampling_times(6, 2.0)
    g = sampling.flow_grpo_diffusion(times, 0.7, window=(2, 2))
    ode, sde = run(wavy, range(3), eta=0.0), run(wavy, range(3), g=g)
    np.testing.assert_array_equal(sde.states[:3], ode.states[:3])
    assert (sde.states[3][:, 1:] != ode.states[3][:, 1:]).all()
    assert ((sde.log_probs != 0).all(axis=1) == (g > 0)).all()
    euler = sde.states[4] + sde.velocities[4] * (times[5] - times[4])
    np.testing.assert_allclose(sde.states[5], euler, atol=1e-6)


def test_rollout_of_a_sample_depends_neither_on_its_batch_nor_on_the_mesh():
    assert jax.device_count() == 8
    ids, c = np.array([5, 3, 8, 1, 0, 7, 2, 6]), jax.device_get(condition(8))
    whole = run(wavy, ids, eta=0.7, c=c)
    rows = np.array([2, 0, 7])
    part = run(wavy, ids[rows], eta=0.7, c=jax.tree.map(lambda leaf: leaf[rows], c))
    np.testing.assert_array_equal(part.latents, whole.latents[rows])
    np.testing.assert_array_equal(part.states, whole.states[:, rows])
    np.testing.assert_array_equal(part.log_probs, whole.log_probs[:, rows])

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    _, _, *rest = arguments(ids, eta=0.7)
    eight = of_video(compiled(wavy, jax.device_put(ids, spread), jax.device_put(c, spread), *rest))
    assert len(eight.latents.sharding.device_set) == 8
    np.testing.assert_array_equal(eight.latents, whole.latents)
    np.testing.assert_array_equal(eight.log_probs, whole.log_probs)


def test_the_denoiser_is_traced_as_often_for_many_steps_as_for_few():
    def count(steps):
        calls = []

        def denoise(*inputs):
            calls.append(1)
            return wavy(*inputs)

        ids, c, g, *rest = arguments(np.arange(3), steps)
        jax.eval_shape(lambda ids, c: compiled(denoise, ids, c, g, *rest), ids, c)
        return len(calls)

    assert count(2) == count(20) > 0


def test_diffusion_must_have_one_entry_a_step():
    with pytest.raises(ValueError, match="6 steps"):
        run(wavy, range(3), g=np.zeros(5, np.float32))
