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

(1) is exact for short steps only. With e = x + (1 - t) v, the noise that v implies, it is the Euler step less
std^2 / (2 t) e. After a long step that is too little to make room for std z: x_next has more noise than t_next.
Coefficient-preserving sampling (CPS, arXiv 2509.05952) removes as much as it adds, so that the std of all noise in
x_next is t_next on any grid:

    std    = t_next sin(eta pi / 2),  0 <= eta <= 1                                       (5)
    mean   = (1 - t_next) (x - t v) + sqrt(t_next^2 - std^2) e
           = x + v dt - std^2 / (t_next + sqrt(t_next^2 - std^2)) e                       (6)
    log p  = mean over dims [ -(x_next - mean)^2 ]                                        (7)

(7) is (4) without its constants and without the factor 1 / (2 std^2), as in the code of the CPS paper, of Flow-GRPO and
of Flow-Factory: log-ratios are 2 std^2 times those of (4). The KL of `losses.flow_grpo_kl` is exact for both steps.

In a rollout, pinned places of a stream (`LatentSpec.moves`) hold the scene's latents at every step. Places that move
and do not count (`LatentSpec.counts`) get no noise: they take the Euler step.

States and log-probabilities are float32: with states rounded to bfloat16 the importance ratio of an
unchanged policy is already off 1.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from world_distill.core.flow import Latents, Places, broadcast_time, map_float32, masked_mean
from world_distill.structs import Condition, LatentSpec, PyTree, Rollout

# One number for the whole batch, or one an example.
Scalars = Float[ArrayLike, ""] | Float[ArrayLike, " b"]
Streams = Mapping[str, LatentSpec]
Sde = Literal["flow_grpo", "cps"]  # which stochastic step: equations (1) and (2), or (5) and (6)


def sde_step(
    x: Latents,
    v: Latents,
    t: Scalars,
    t_next: Scalars,
    g: Scalars,
    noise: Latents | None,
    counts: Places | None = None,
    sde: Sde = "flow_grpo",
) -> tuple[Latents, Latents, Float[Array, " b"]]:
    """One sampler step from `t` to `t_next`, equations (1) to (3) or (6), in float32.

    Args:
        x: latents at time `t`.
        v: velocity at `x`.
        t: time of `x`, in (0, 1].
        t_next: time to go to, in [0, t).
        g: diffusion coefficient, or the std of a CPS step; 0 is an Euler step.
        noise: standard normal z; None stops at the mean, which is what recomputing a
            log-probability needs.
        counts: of each stream [n], where g applies; other places take the Euler step. None: everywhere.
        sde: which stochastic step.

    Returns:
        (x_next, mean, std [b]).
    """
    rows = jax.tree.leaves(x)[0].shape[0]

    def mean_of(x, v, *mask):
        time, after, drift = (broadcast_time(value, x.ndim) for value in (t, t_next, g))
        if mask:
            drift = drift * _by_place(mask[0], x.ndim)
        if sde == "cps":
            kept = jnp.sqrt((after - drift) * (after + drift))
            # The step into t = 0 has no noise: 0 / tiny.
            removed = drift**2 / jnp.maximum(after + kept, jnp.finfo(jnp.float32).tiny)
            return x + v * (after - time) - removed * (x + (1 - time) * v)
        return x + (v + drift**2 / (2 * time) * (x + (1 - time) * v)) * (after - time)

    def add(mean, noise, *mask):
        spread = broadcast_time(std, mean.ndim)
        return mean + (spread * _by_place(mask[0], mean.ndim) if mask else spread) * noise

    masks = () if counts is None else (counts,)
    t_row, next_row, g_row = (jnp.asarray(value, jnp.float32).reshape(-1) for value in (t, t_next, g))
    std = g_row if sde == "cps" else g_row * jnp.sqrt(-(next_row - t_row))
    mean = map_float32(mean_of, x, v, *masks)
    x_next = mean if noise is None else map_float32(add, mean, noise, *masks)
    return x_next, mean, jnp.broadcast_to(std, (rows,))


def _by_place(mask: Any, ndim: int) -> Any:
    """A mask [n] as [1 n 1 ...] with `ndim` axes."""
    return mask.reshape(1, -1, *[1] * (ndim - 2))


def gaussian_log_prob(x_next: Latents, mean: Latents, std: Scalars, counts: Places | None) -> Float[Array, " b"]:
    """Log-probability of a step, equation (4): mean over the dims at the places that count, float32 [b].

    0 where `std` is 0. `x_next` is the action that was taken, so no gradient goes into it.
    """
    x_next = jax.lax.stop_gradient(x_next)
    std = jnp.broadcast_to(jnp.asarray(std, jnp.float32), jax.tree.leaves(x_next)[0].shape[:1])
    safe = jnp.where(std > 0, std, 1.0)  # the branch not taken stays finite, its gradient too
    square = map_float32(lambda x, mean: ((x - mean) / broadcast_time(safe, x.ndim)) ** 2, x_next, mean)
    log_prob = -masked_mean(square, counts) / 2 - jnp.log(safe) - math.log(2 * math.pi) / 2
    return jnp.where(std > 0, log_prob, 0.0)


def step_log_prob(x_next: Latents, mean: Latents, std: Scalars, counts: Places | None, sde: Sde) -> Float[Array, " b"]:
    """Log-probability of a step, float32 [b]: equation (4), or (7) of a CPS step. 0 where `std` is 0.

    `x_next` is the action that was taken, so no gradient goes into it.
    """
    if sde == "flow_grpo":
        return gaussian_log_prob(x_next, mean, std, counts)
    square = map_float32(lambda x, mean: (x - mean) ** 2, jax.lax.stop_gradient(x_next), mean)
    return jnp.where(jnp.asarray(std) > 0, -masked_mean(square, counts), 0.0)


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
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    t = times[:-1]
    # At t = 1 the formula is infinite; only 1 - t moves to the second grid point, as in the
    # authors' code.
    g = eta * np.sqrt(t / (1 - np.where(t == 1, times[1], t)))
    g[times[1:] == 0] = 0.0
    return _in_window(g, eta, window)


def cps_diffusion(
    times: Float[np.ndarray, " n"], eta: float, window: tuple[int, int] | None = None
) -> Float[np.ndarray, " k"]:
    """Standard deviations of CPS's steps for a grid [k + 1], equation (5): a float32 host table [k].

    Args:
        times: the sampler's grid, see `flow.sampling_times`.
        eta: noise level in [0, 1]; 0 is the ODE, 1 replaces all noise by fresh noise.
        window: see `flow_grpo_diffusion`.

    Raises:
        ValueError: eta outside of [0, 1], and see `flow_grpo_diffusion`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"CPS takes eta from 0 to 1, where all noise of a step is fresh; got {eta}")
    std = np.asarray(times, np.float64)[1:] * math.sin(eta * math.pi / 2)
    return _in_window(std, eta, window)


def _in_window(diffusion: np.ndarray, eta: float, window: tuple[int, int] | None) -> np.ndarray:
    """The table in float32, 0 outside of the window."""
    k = len(diffusion)
    if window is not None:
        start, length = window
        if start < 0 or length < 1 or start + length > k:
            raise ValueError(f"SDE window (start, length) = {window} does not fit {k} steps")
        inside = (np.arange(k) >= start) & (np.arange(k) < start + length)
        diffusion = np.where(inside, diffusion, 0.0)
    if eta > 0 and not diffusion.any():
        raise ValueError(f"no stochastic step is left of {k} steps with window {window}")
    return diffusion.astype(np.float32)


DIFFUSIONS: Mapping[str, Callable[..., np.ndarray]] = {"flow_grpo": flow_grpo_diffusion, "cps": cps_diffusion}


def step_stds(times: Float[np.ndarray, " n"], diffusion: Float[np.ndarray, " k"], sde: Sde) -> Float[np.ndarray, " k"]:
    """Standard deviations of a grid's steps [k], in float64 on the host, from their table of `DIFFUSIONS`."""
    diffusion = np.asarray(diffusion, np.float64)
    return diffusion if sde == "cps" else diffusion * np.sqrt(-np.diff(np.asarray(times, np.float64)))


def sample_keys(key: Key[Array, ""], sample_ids: Int[ArrayLike, " b"]) -> Key[Array, " b"]:
    """One key a sample, from (key, sample id) alone: noise does not depend on the batch layout."""
    return jax.vmap(lambda sample_id: jax.random.fold_in(key, sample_id))(jnp.asarray(sample_ids))


def draw_noise(keys: Key[Array, " b"], index: Int[ArrayLike, ""], streams: Streams) -> dict[str, Array]:
    """Standard normal noise [b n ...]: index 0 is where a rollout starts, index i + 1 belongs to step i.

    The noise of a stream depends on its place among the streams, not on the others.
    """

    def draw(key, number: int, shape: tuple[int, ...]):
        key = jax.random.fold_in(key, index)
        # A family's first stream draws from the key itself, so that one stream's noise is as it was without others.
        key = jax.random.fold_in(key, number) if number else key
        # Drawn flat: the same numbers, but XLA's CPU compiler takes a fourth of the time.
        return jax.random.normal(key, (math.prod(shape),), jnp.float32).reshape(shape)

    return {
        name: jax.vmap(lambda key, number=number, spec=spec: draw(key, number, spec.shape))(keys)
        for number, (name, spec) in enumerate(streams.items())
    }


def pin(x: Mapping[str, Array], scene: Mapping[str, ArrayLike], streams: Streams) -> dict[str, Array]:
    """`x` [b n ...] with its pinned places replaced by the scene's latents, which broadcast along n."""
    return {
        name: jnp.where(_by_place(spec.moves, x[name].ndim), x[name], jnp.asarray(scene[name], x[name].dtype))
        if spec.pinned
        else x[name]
        for name, spec in streams.items()
    }


def still(v: Mapping[str, Array], streams: Streams) -> dict[str, Array]:
    """Velocities [b n ...] with 0 at pinned places."""
    return pin(v, dict.fromkeys(streams, 0.0), streams)


def counted(streams: Streams) -> dict[str, np.ndarray]:
    """Of each stream [n], the places that count."""
    return {name: spec.counts for name, spec in streams.items()}


def initial_noise(keys: Key[Array, " b"], scene: Mapping[str, ArrayLike], streams: Streams) -> dict[str, Array]:
    """What a rollout with these keys starts from: noise, and the scene at the pinned places."""
    return pin(draw_noise(keys, 0, streams), scene, streams)


def rollout(
    denoise: Callable[..., PyTree],
    base: PyTree,
    lora: PyTree | None,
    condition: Condition,
    keys: Key[Array, " b"],
    *,
    times: Float[ArrayLike, " n"],
    streams: Streams,
    diffusion: Float[ArrayLike, " k"] | None = None,
    sde: Sde = "flow_grpo",
    keep_states: bool,
) -> Rollout:
    """Sample one clip per key. Traceable; the steps are one `lax.scan`.

    Pinned places hold the scene's latents at every step: they get no noise, do not move, and stay out of `log_probs`;
    `velocities` are 0 there.

    Args:
        denoise: (base, lora, x_t, t [b], condition) -> velocity, see `interfaces.Denoise`.
        base: frozen weights, handed on to `denoise`.
        lora: the Executor's weights, handed on to `denoise`; None samples from the Demonstrator.
        condition: scene and text of every row.
        keys: one typed PRNG key a sample, from `sample_keys`.
        times: the sampler's grid [k + 1], noisiest first, see `flow.sampling_times`.
        streams: the model's latents, `interfaces.ModelFamily.latents`.
        diffusion: g, or CPS's std, of every step [k]; None samples the ODE and draws no step noise.
        sde: which stochastic step.
        keep_states: also return the visited states, velocities and log-probabilities.

    Raises:
        ValueError: if `diffusion` does not have one entry a step.
    """
    times = jnp.asarray(times, jnp.float32)
    k, rows = times.shape[0] - 1, keys.shape[0]
    stochastic = diffusion is not None
    g = jnp.asarray(diffusion, jnp.float32) if stochastic else jnp.zeros(k, jnp.float32)
    if g.shape != (k,):
        raise ValueError(f"diffusion has shape {g.shape}, but the grid has {k} steps")
    counts = counted(streams)
    # Pinned places need no mask in the step: they are set afterwards.
    quiet = any((spec.moves & ~spec.counts).any() for spec in streams.values())
    noisy = counts if stochastic and quiet else None

    def step(x, inputs) -> tuple[dict[str, Array], Any]:
        t, t_next, g, index = inputs
        v = denoise(base, lora, x, jnp.broadcast_to(t, (rows,)), condition)
        v = still(map_float32(lambda v: v, v), streams)
        noise = draw_noise(keys, index + 1, streams) if stochastic else None
        x_next, mean, std = sde_step(x, v, t, t_next, g, noise, noisy, sde)
        x_next = pin(x_next, condition.scene, streams)
        if not keep_states:
            return x_next, None
        return x_next, (x, v, step_log_prob(x_next, mean, std, counts, sde))

    start = initial_noise(keys, condition.scene, streams)
    latents, kept = jax.lax.scan(step, start, (times[:-1], times[1:], g, jnp.arange(k)))
    if not keep_states:
        return Rollout(latents=latents)
    states, velocities, log_probs = kept
    return Rollout(latents=latents, states=states, velocities=velocities, log_probs=log_probs)
