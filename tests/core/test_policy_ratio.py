"""New and old policy agree: the ratio of a real rollout is 1, whichever program computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import one_stream, told, video

from world_distill.core import flow, losses, sampling

PINNED = np.float32([0, 1, 1])
LATENT = (3, 4, 4, 8)


def draw(seed, shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def denoise(base, lora, x, t, condition):
    """A small non-linear network over channels."""
    hidden = jnp.tanh(x @ base + t[:, None, None, None, None])
    return hidden @ (base.T + lora) + condition.scene["video"]


@pytest.fixture(scope="module", params=["flow_grpo", "cps"])
def policy(request):
    lora = draw(6, (8, 8), 0.1)
    c = told(draw(4, (4, 2, 3)), jnp.asarray(np.ones((4, 2), bool)), draw(5, (4, 1, 4, 4, 8)))
    times = flow.sampling_times(8, 3.0)
    sde = request.param
    g = sampling.DIFFUSIONS[sde](times, 0.7)
    base = draw(3, (8, 8), 0.3)

    @jax.jit
    def sample(base, lora, c):
        keys = sampling.sample_keys(jax.random.key(0), np.arange(4))
        return sampling.rollout(
            one_stream(denoise),
            base,
            lora,
            c,
            keys,
            times=times,
            streams=video(LATENT, PINNED),
            diffusion=g,
            sde=sde,
            keep_states=True,
        )

    return base, lora, c, times, (sde, g), sample(base, lora, c)


def grpo_ratios(policy, lora):
    """Ratios [k b] of policy `lora` to the one that sampled, from the stored trajectory."""
    base, _, c, times, (sde, g), out = policy
    states = jnp.concatenate([out.states["video"], out.latents["video"][None]])

    @jax.jit
    def ratio(lora, x, x_next, t, t_next, g, old):
        v = denoise(base, lora, x, jnp.full(4, t), c)
        _, mean, std = sampling.sde_step(x, v, t, t_next, g, None, sde=sde)
        new = sampling.step_log_prob(x_next, mean, std, PINNED, sde)
        return losses.flow_grpo_surrogate(new, old, jnp.asarray(np.ones(4, np.float32)), 1e-3)[1]

    rows = [ratio(lora, states[i], states[i + 1], times[i], times[i + 1], g[i], out.log_probs[i]) for i in range(8)]
    return np.stack(rows)


def test_flow_grpo_ratio_is_1_for_the_policy_that_sampled(policy):
    np.testing.assert_allclose(grpo_ratios(policy, policy[1]), 1, atol=1e-6)
    moved = grpo_ratios(policy, policy[1] + 0.02)
    assert (np.abs(moved[:-1] - 1) > 5e-6).all()  # the last step is deterministic
    np.testing.assert_array_equal(moved[-1], 1)


def test_awm_ratio_is_1_for_the_policy_that_sampled(policy):
    base, lora, c, _, _, out = policy
    latents = out.latents["video"]
    eps = draw(9, latents.shape)

    @jax.jit
    def log_likelihood(lora, t):
        x_t = {"video": flow.interpolate(latents, eps, t)}
        x_t = sampling.pin(x_t, c.scene, video(LATENT, PINNED))["video"]
        v = denoise(base, lora, x_t, t, c)
        m = losses.velocity_gap(v, flow.velocity(latents, eps), PINNED)
        return losses.awm_log_likelihood(m, t, "ghuber")

    t = np.float32([0.1, 0.4, 0.7, 0.95])
    stored = jax.device_get(log_likelihood(lora, t))
    advantages = jnp.asarray(np.ones(4, np.float32))
    # Another program than the one that stored the values, as in several updates on one batch.
    again = jax.jit(lambda lora: losses.awm_surrogate(log_likelihood(lora, t), jnp.asarray(stored), advantages, 0.2)[1])
    np.testing.assert_allclose(again(lora), 1, atol=1e-6)
    assert (np.abs(again(lora + 0.02) - 1) > 1e-5).all()
