"""Our sampling loops on the inputs of `make_goldens.loops`, to be held against its clips."""

import jax
import jax.numpy as jnp
import numpy as np
from streams import tokens, told, video

from tests.models.wan.small_wan import CONFIG, network
from world_distill.core import flow, sampling, unipc
from world_distill.core.guidance import guided, with_guidance
from world_distill.models.tensor_map import assemble
from world_distill.models.wan.codec import WanCodec
from world_distill.models.wan.family import WanFamily
from world_distill.models.wan.published import transformer_entries
from world_distill.models.wan.vae import VaeConfig
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.structs import TrainBatch
from world_distill.training.step_losses import Losses

NETWORK = network(CONFIG)
CASES = [(name, scale) for name in ("euler", "unipc") for scale in (1.0, 5.0)]
ATOL = 5e-5


def denoise(base, lora, x, t, condition):
    """The velocity; the first frame is told that it is clean."""
    free = jnp.arange(x["video"].shape[1]) > 0
    return {"video": NETWORK(base, x["video"], t[:, None] * free, condition.text["text"].states)}


def sample(solver, weights, condition, keys, negative, latent_shape, scale, steps=8):
    """Latents by one of the two solvers, with guidance."""
    call = guided(denoise, scale, tokens(negative))
    streams = video(latent_shape, np.arange(latent_shape[0]))
    if solver == "unipc":
        schedule = unipc.unipc_schedule(steps, 5.0)
        out = unipc.unipc_rollout(call, weights, None, condition, keys, schedule=schedule, streams=streams)
    else:
        times = flow.sampling_times(steps, 5.0)
        out = sampling.rollout(call, weights, None, condition, keys, times=times, keep_states=False, streams=streams)
    return out.latents["video"]


def inputs(name, seed, arrays):
    """Noise, the clip that diffusers made of it, the condition, keys, and the states of the negative text."""
    noise, clip = (np.moveaxis(arrays[key], 1, -1) for key in ("noise", name))
    scene, text, negative = (jnp.asarray(x) for x in (clip[:, :1], arrays["text"], arrays["negative"]))
    condition = told(text, jnp.ones(text.shape[:2], bool), scene)
    keys = sampling.sample_keys(jax.random.key(seed, impl="threefry2x32"), np.arange(len(noise)))
    start = sampling.draw_noise(keys, 0, video(noise.shape[1:]))["video"]
    np.testing.assert_allclose(start, noise, atol=1e-6, err_msg="other noise than when the file was written")
    return noise, clip, condition, keys, negative


def compare(solver, scale, seed, arrays, theirs):
    """Fails unless our loop ends where that of diffusers ends, on the same noise."""
    noise, clip, condition, keys, negative = inputs(f"{solver}_{scale:g}", seed, arrays)
    weights = jax.tree.map(jnp.asarray, assemble(transformer_entries(CONFIG), theirs))
    run = jax.jit(sample, static_argnames=["solver", "latent_shape", "scale"])
    ours = run(solver, weights, condition, keys, negative, latent_shape=noise.shape[1:], scale=scale)
    np.testing.assert_array_equal(ours[:, :1], condition.scene["video"])
    assert np.abs(clip[:, 1:] - noise[:, 1:]).max() > 1  # it went somewhere
    np.testing.assert_allclose(ours, clip, atol=ATOL)


def compare_demonstrator(seed, arrays, theirs, scale=5.0, steps=8):
    """Fails unless the guided Demonstrator of training leads where diffusers' guided pipeline goes.

    Its rollout ends in diffusers' clip, and its velocities, as a loss computes them, are those of the rollout.
    """
    noise, clip, condition, keys, negative = inputs(f"euler_{scale:g}", seed, arrays)
    f, h, w, c = noise.shape[1:]
    family = WanFamily(
        CONFIG, WanCodec(VaeConfig(channels=c)), size=(16 * h, 16 * w), frames=4 * f - 3, fps=8.0,
        dtype=jnp.dtype("float32"), text_encoder="words",
    )  # fmt: skip
    base = {"transformer": jax.tree.map(jnp.asarray, assemble(transformer_entries(CONFIG), theirs))}
    grid = flow.sampling_times(steps, 5.0)
    objective = section(load_config("wan22_5b").objective, Objective)
    rows = TrainBatch(None, condition, *[None] * 6, negative=tokens(negative))

    @jax.jit
    def make(base, rows, keys):
        rollout = sampling.rollout(
            with_guidance(family.denoise, scale, rows.negative), base, None, rows.solution, keys, times=grid,
            streams=family.latents, keep_states=True,
        )  # fmt: skip
        losses = Losses(family, objective, grid, None, scale)
        shown = [
            losses._demonstrator(base, {"video": x}, jnp.full(len(x), t, jnp.float32), rows)["video"]
            for x, t in zip(rollout.states["video"], grid[:-1], strict=True)
        ]
        return rollout, jnp.stack(shown)

    rollout, shown = make(base, rows, keys)
    np.testing.assert_allclose(rollout.latents["video"], clip, atol=ATOL)
    np.testing.assert_allclose(shown, rollout.velocities["video"], atol=ATOL)
