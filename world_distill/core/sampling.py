"""Sampling: one step function for ODE and SDE, its log-probability, and rollouts made of it.

With dt = t_next - t < 0 and a diffusion coefficient g(t) >= 0 (Flow-GRPO, arXiv 2505.05470):

    mean   = x + [ v + g^2 / (2 t) (x + (1 - t) v) ] dt                                   (1)
    std    = g sqrt(-dt)                                                                  (2)
    x_next = mean + std z,  z ~ N(0, I)                                                   (3)
    log p  = mean over dims [ -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 ]  (4)

x + (1 - t) v is the noise that v implies, and -noise / t is the score, so (1) adds g^2 / 2 times
the score to the ODE drift and the marginals of the ODE stay. g = 0 is the Euler step of the ODE.
(4) is a mean and not a sum, so that clip ranges do not depend on the size of a clip.

Flow-GRPO takes g = eta sqrt(t / (1 - t)), with 1 - t read at the second grid point where t = 1.

States and log-probabilities are float32: with states rounded to bfloat16 the importance ratio of an
unchanged policy is already off 1.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from world_distill.core.flow import FrameMask, broadcast_time, masked_mean
from world_distill.structs import Condition, PyTree, Rollout

# One number for the whole batch, or one an example.
Scalars = Float[ArrayLike, ""] | Float[ArrayLike, " b"]


def sde_step(
    x: Float[Array, "b f h w c"],
    v: Float[Array, "b f h w c"],
    t: Scalars,
    t_next: Scalars,
    g: Scalars,
    noise: Float[Array, "b f h w c"] | None,
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"], Float[Array, " b"]]:
    """One sampler step from `t` to `t_next`, equations (1) to (3), in float32.

    Args:
        x: latents at time `t`.
        v: velocity at `x`.
        t: time of `x`, in (0, 1].
        t_next: time to go to, in [0, t).
        g: diffusion coefficient; 0 is an Euler step.
        noise: standard normal z; None stops at the mean, which is what recomputing a
            log-probability needs.

    Returns:
        (x_next, mean, std [b]).
    """
    x, v = jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32)
    t, t_next, g = (broadcast_time(value, x.ndim) for value in (t, t_next, g))
    dt = t_next - t
    mean = x + (v + g**2 / (2 * t) * (x + (1 - t) * v)) * dt
    std = g * jnp.sqrt(-dt)
    x_next = mean if noise is None else mean + std * jnp.asarray(noise, jnp.float32)
    return x_next, mean, jnp.broadcast_to(std.reshape(-1), x.shape[:1])


def gaussian_log_prob(
    x_next: Float[Array, "b f h w c"],
    mean: Float[Array, "b f h w c"],
    std: Scalars,
    frame_mask: FrameMask | None,
) -> Float[Array, " b"]:
    """Log-probability of a step, equation (4): mean over the dims of free frames, float32 [b].

    0 where `std` is 0. `x_next` is the action that was taken, so no gradient goes into it.
    """
    x_next = jax.lax.stop_gradient(jnp.asarray(x_next, jnp.float32))
    std = jnp.broadcast_to(jnp.asarray(std, jnp.float32), x_next.shape[:1])
    safe = jnp.where(std > 0, std, 1.0)  # the branch not taken stays finite, its gradient too
    z = (x_next - mean) / broadcast_time(safe, x_next.ndim)
    log_prob = -masked_mean(z**2, frame_mask) / 2 - jnp.log(safe) - math.log(2 * math.pi) / 2
    return jnp.where(std > 0, log_prob, 0.0)


def flow_grpo_diffusion(
    times: Float[np.ndarray, " n"], eta: float, window: tuple[int, int] | None = None
) -> Float[np.ndarray, " k"]:
    """Flow-GRPO's diffusion coefficients for a grid [k + 1]: a float32 host table [k].

    The step into t = 0 has g = 0, so that a finished clip carries no fresh noise.

    Args:
        times: the sampler's grid, see `flow.sampling_times`.
        eta: noise level; 0 is the ODE.
        window: (start, length) of the steps that stay stochastic, the others get g = 0. Rollouts
            that are compared with each other (a group) must share it.

    Raises:
        ValueError: a negative eta, a window outside of the grid, or no stochastic step left
            although eta > 0.
    """
    times = np.asarray(times, np.float64)
    k = len(times) - 1
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    t = times[:-1]
    # At t = 1 the formula is infinite; only 1 - t moves to the second grid point, as in the
    # authors' code.
    g = eta * np.sqrt(t / (1 - np.where(t == 1, times[1], t)))
    g[times[1:] == 0] = 0.0
    if window is not None:
        start, length = window
        if start < 0 or length < 1 or start + length > k:
            raise ValueError(f"SDE window (start, length) = {window} does not fit {k} steps")
        inside = (np.arange(k) >= start) & (np.arange(k) < start + length)
        g = np.where(inside, g, 0.0)
    if eta > 0 and not g.any():
        raise ValueError(f"no stochastic step is left of {k} steps with window {window}")
    return g.astype(np.float32)


def sample_keys(key: Key[Array, ""], sample_ids: Int[ArrayLike, " b"]) -> Key[Array, " b"]:
    """One key a sample, from (key, sample id) alone: noise does not depend on the batch layout."""
    return jax.vmap(lambda sample_id: jax.random.fold_in(key, sample_id))(jnp.asarray(sample_ids))


def _step_noise(
    keys: Key[Array, " b"], index: Int[ArrayLike, ""], shape: tuple[int, int, int, int]
) -> Float[Array, "b f h w c"]:
    """Standard normal noise: index 0 is where a rollout starts, index i + 1 belongs to step i."""

    def draw(key):
        # Drawn flat: the same numbers, but XLA's CPU compiler takes a fourth of the time.
        flat = jax.random.normal(jax.random.fold_in(key, index), (math.prod(shape),), jnp.float32)
        return flat.reshape(shape)

    return jax.vmap(draw)(keys)


def pin_frames(
    x: Float[Array, "b f h w c"], scene: Float[Array, "b 1 h w c"], frame_mask: FrameMask | None
) -> Float[Array, "b f h w c"]:
    """`x` with its pinned frames (mask 0) replaced by the scene latents. None pins nothing."""
    if frame_mask is None:
        return x
    free = (jnp.asarray(frame_mask) > 0)[None, :, None, None, None]
    return jnp.where(free, x, jnp.asarray(scene, x.dtype))


def initial_noise(
    keys: Key[Array, " b"],
    scene: Float[Array, "b 1 h w c"],
    latent_shape: tuple[int, int, int, int],
    frame_mask: FrameMask | None,
) -> Float[Array, "b f h w c"]:
    """What a rollout with these keys starts from: noise, and the scene in the pinned frames."""
    return pin_frames(_step_noise(keys, 0, latent_shape), scene, frame_mask)


def rollout(
    denoise: Callable[..., Array],
    base: PyTree,
    lora: PyTree | None,
    condition: Condition,
    keys: Key[Array, " b"],
    *,
    times: Float[ArrayLike, " n"],
    latent_shape: tuple[int, int, int, int],
    frame_mask: FrameMask | None,
    diffusion: Float[ArrayLike, " k"] | None = None,
    keep_states: bool,
) -> Rollout:
    """Sample one clip per key. Traceable; the steps are one `lax.scan`.

    Pinned frames hold the scene latents at every step: they get no noise, do not move, and stay out
    of `log_probs`; `velocities` are 0 there.

    Args:
        denoise: (base, lora, x_t, t [b], condition) -> velocity, see `interfaces.Denoise`.
        base: frozen weights, handed on to `denoise`.
        lora: the Executor's weights, handed on to `denoise`; None samples from the Demonstrator.
        condition: scene and text of every row.
        keys: one typed PRNG key a sample, from `sample_keys`.
        times: the sampler's grid [k + 1], noisiest first, see `flow.sampling_times`.
        latent_shape: (f, h, w, c) of one clip.
        frame_mask: [f], 0 on pinned frames; None when nothing is pinned.
        diffusion: g of every step [k]; None samples the ODE and draws no step noise.
        keep_states: also return the visited states, velocities and log-probabilities.

    Raises:
        ValueError: if `diffusion` does not have one entry a step.
    """
    times = jnp.asarray(times, jnp.float32)
    k = times.shape[0] - 1
    stochastic = diffusion is not None
    g = jnp.asarray(diffusion, jnp.float32) if stochastic else jnp.zeros(k, jnp.float32)
    if g.shape != (k,):
        raise ValueError(f"diffusion has shape {g.shape}, but the grid has {k} steps")
    still = jnp.zeros_like(condition.scene, jnp.float32)

    def step(x, inputs) -> tuple[Array, Any]:
        t, t_next, g, index = inputs
        v = denoise(base, lora, x, jnp.broadcast_to(t, x.shape[:1]), condition)
        v = pin_frames(jnp.asarray(v, jnp.float32), still, frame_mask)
        noise = _step_noise(keys, index + 1, latent_shape) if stochastic else None
        x_next, mean, std = sde_step(x, v, t, t_next, g, noise)
        x_next = pin_frames(x_next, condition.scene, frame_mask)
        if not keep_states:
            return x_next, None
        return x_next, (x, v, gaussian_log_prob(x_next, mean, std, frame_mask))

    start = initial_noise(keys, condition.scene, latent_shape, frame_mask)
    latents, kept = jax.lax.scan(step, start, (times[:-1], times[1:], g, jnp.arange(k)))
    if not keep_states:
        return Rollout(latents=latents)
    states, velocities, log_probs = kept
    return Rollout(latents=latents, states=states, velocities=velocities, log_probs=log_probs)
