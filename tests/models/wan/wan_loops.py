"""Our sampling loops on the inputs of `make_goldens.loops`, to be held against its clips."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.wan.small_wan import CONFIG, network
from world_distill.core import flow, sampling, unipc
from world_distill.core.guidance import guided
from world_distill.models.params import assemble
from world_distill.models.wan.params import transformer_entries
from world_distill.structs import Condition

NETWORK = network(CONFIG)
CASES = [(name, scale) for name in ("euler", "unipc") for scale in (1.0, 5.0)]
ATOL = 5e-5


def denoise(base, lora, x, t, condition):
    """The velocity; the first frame is told that it is clean."""
    free = jnp.arange(x.shape[1]) > 0
    return NETWORK(base, x, t[:, None] * free, condition.text)


def sample(solver, weights, condition, keys, negative, latent_shape, scale, steps=8):
    """Latents by one of the two solvers, with guidance."""
    call = guided(denoise, scale, negative, jnp.ones(len(negative), bool))
    common = {"latent_shape": latent_shape, "frame_mask": np.float32([0] + [1] * (latent_shape[0] - 1))}
    if solver == "unipc":
        schedule = unipc.unipc_schedule(steps, 5.0)
        return unipc.unipc_rollout(call, weights, None, condition, keys, schedule=schedule, **common).latents
    times = flow.sampling_times(steps, 5.0)
    return sampling.rollout(call, weights, None, condition, keys, times=times, keep_states=False, **common).latents


def compare(solver, scale, seed, arrays, theirs):
    """Fails unless our loop ends where that of diffusers ends, on the same noise."""
    noise, clip = (np.moveaxis(arrays[name], 1, -1) for name in ("noise", f"{solver}_{scale:g}"))
    scene, text, negative = (jnp.asarray(x) for x in (clip[:, :1], arrays["text"], arrays["negative"]))
    condition = Condition(text=text, text_mask=jnp.ones(text.shape[:2], bool), scene=scene)
    keys = sampling.sample_keys(jax.random.key(seed, impl="threefry2x32"), np.arange(len(noise)))
    start = sampling.initial_noise(keys, scene, noise.shape[1:], None)
    np.testing.assert_allclose(start, noise, atol=1e-6, err_msg="other noise than when the file was written")
    weights = jax.tree.map(jnp.asarray, assemble(transformer_entries(CONFIG), theirs))
    run = jax.jit(sample, static_argnames=["solver", "latent_shape", "scale"])
    ours = run(solver, weights, condition, keys, negative, latent_shape=noise.shape[1:], scale=scale)
    np.testing.assert_array_equal(ours[:, :1], scene)
    assert np.abs(clip[:, 1:] - noise[:, 1:]).max() > 1  # it went somewhere
    np.testing.assert_allclose(ours, clip, atol=ATOL)
