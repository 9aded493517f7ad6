"""Our sampling loops on the inputs of `make_goldens.loops`, to be held against its clips."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.wan.small_wan import CONFIG, network
from world_distill.core import flow, sampling, unipc
from world_distill.core.guidance import guided, with_guidance
from world_distill.models.tensor_map import assemble
from world_distill.models.wan.family import WanFamily
from world_distill.models.wan.params import transformer_entries
from world_distill.models.wan.vae import VaeConfig
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.structs import Condition, Negative, TrainBatch
from world_distill.training.passes import Losses

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


def inputs(name, seed, arrays):
    """Noise, the clip that diffusers made of it, the condition, keys, and the states of the negative text."""
    noise, clip = (np.moveaxis(arrays[key], 1, -1) for key in ("noise", name))
    scene, text, negative = (jnp.asarray(x) for x in (clip[:, :1], arrays["text"], arrays["negative"]))
    condition = Condition(text=text, text_mask=jnp.ones(text.shape[:2], bool), scene=scene)
    keys = sampling.sample_keys(jax.random.key(seed, impl="threefry2x32"), np.arange(len(noise)))
    start = sampling.initial_noise(keys, scene, noise.shape[1:], None)
    np.testing.assert_allclose(start, noise, atol=1e-6, err_msg="other noise than when the file was written")
    return noise, clip, condition, keys, negative


def compare(solver, scale, seed, arrays, theirs):
    """Fails unless our loop ends where that of diffusers ends, on the same noise."""
    noise, clip, condition, keys, negative = inputs(f"{solver}_{scale:g}", seed, arrays)
    weights = jax.tree.map(jnp.asarray, assemble(transformer_entries(CONFIG), theirs))
    run = jax.jit(sample, static_argnames=["solver", "latent_shape", "scale"])
    ours = run(solver, weights, condition, keys, negative, latent_shape=noise.shape[1:], scale=scale)
    np.testing.assert_array_equal(ours[:, :1], condition.scene)
    assert np.abs(clip[:, 1:] - noise[:, 1:]).max() > 1  # it went somewhere
    np.testing.assert_allclose(ours, clip, atol=ATOL)


def compare_demonstrator(seed, arrays, theirs, scale=5.0, steps=8):
    """Fails unless the guided Demonstrator of training leads where diffusers' guided pipeline goes.

    Its rollout ends in diffusers' clip, and its velocities, as a loss computes them, are those of the rollout.
    """
    noise, clip, condition, keys, negative = inputs(f"euler_{scale:g}", seed, arrays)
    f, h, w, c = noise.shape[1:]
    family = WanFamily(
        CONFIG, VaeConfig(channels=c), size=(16 * h, 16 * w), frames=4 * f - 3, fps=8.0, dtype="float32",
        vae_dtype="float32", piece=0, rows=0, text_encoder="words", lora_targets="", lora_scale=1.0,
    )  # fmt: skip
    base = {"transformer": jax.tree.map(jnp.asarray, assemble(transformer_entries(CONFIG), theirs))}
    grid = flow.sampling_times(steps, 5.0)
    objective = section(load_config("wan22_5b").objective, Objective)
    rows = TrainBatch(None, condition, *[None] * 6, negative=Negative(negative, jnp.ones(len(negative), bool)))

    @jax.jit
    def make(base, rows, keys):
        rollout = sampling.rollout(
            with_guidance(family.denoise, scale, rows.negative), base, None, rows.solution, keys, times=grid,
            latent_shape=family.latent_shape, frame_mask=family.free_frames, keep_states=True,
        )  # fmt: skip
        losses = Losses(family, objective, grid, None, scale)
        shown = [
            losses._demonstrator(base, x, jnp.full(len(x), t, jnp.float32), rows)
            for x, t in zip(rollout.states, grid[:-1], strict=True)
        ]
        return rollout, jnp.stack(shown)

    rollout, shown = make(base, rows, keys)
    np.testing.assert_allclose(rollout.latents, clip, atol=ATOL)
    np.testing.assert_allclose(shown, rollout.velocities, atol=ATOL)
