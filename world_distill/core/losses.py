"""Losses and rewards of distillation and RL: per example [b], float32; the caller averages.

World Model Self-Distillation (WMSD, arXiv 2606.12072) with E the Executor, D the Demonstrator and
sg[] no gradient:

    gap       = mean over dims (v_E - sg[v_D])^2
                Eq. 3 on states of the Demonstrator's rollouts, Eq. 5 and 11 on the Executor's
    r_distill = - integral over t of mean over dims (sg[v_E] - v_D)^2
                Eq. 9, on states of the Executor's rollouts; over t >= a bound, if one is set

Advantage Weighted Matching (AWM, arXiv 2509.25050), on a re-noised clip, where
m = mean over dims (v_E - (eps - x_0))^2 and d = 1e-10:

    l_uniform = -m        l_t = -t m        l_t2 = -t^2 m
    l_huber   = -t (sqrt(m + d) - sqrt(d))
    l_ghuber  = -(t / p) ((m + d)^p - d^p),  p = 1/4
    ratio     = exp((l - sg[l_old]) / T)                          T: temperature, 1 in AWM
    surrogate = T max(-A ratio, -A clip(ratio, 1 - c, 1 + c))     at ratio 1 its gradient is -A grad l

DiffusionNFT (arXiv 2509.16117), on the same re-noised clips, with r = (1 + A) / 2 and A in [-1, 1]:

    v+ = v_old + b (v_E - v_old)      v- = v_old - b (v_E - v_old)
    L  = 5 / b [ r D(v+) + (1 - r) D(v-) ],  D(v) = t mean (v - (eps - x_0))^2 / sg[mean |v - (eps - x_0)|]

Flow-GRPO (arXiv 2505.05470): AWM's surrogate at T = 1 with log-probabilities of SDE steps, and the exact
KL of two Gaussians with one std s: mean over dims (mu - mu_ref)^2 / (2 s^2).

The paper's squared norms are means over the dims of all places that count (`LatentSpec.counts`) here, as in the
released code of AWM and Flow-GRPO: weights then do not depend on the size of a clip.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from world_distill.core.flow import Latents, Places, broadcast_time, map_float32, masked_mean

_HUBER_DELTA = 1e-10  # d above: AWM's value
# exp(20) is far beyond any clip range; without a bound an overflowing ratio would turn the gradient
# of its clipped, harmless branch into 0 * inf = NaN.
_MAX_LOG_RATIO = 20.0
ADVANTAGE_CLIP = 5.0  # bound of the advantages before they are scaled to [-1, 1]: AWM's and DiffusionNFT's value
_NFT_LEAST = 1e-5  # lower bound of DiffusionNFT's adaptive weight: the released code's value


def velocity_gap(v: Latents, v_ref: Latents, counts: Places | None) -> Float[Array, " b"]:
    """Mean squared velocity difference at the places that count (WMSD Eq. 3, 5, 11).

    No gradient goes into `v_ref`.
    """
    return masked_mean(map_float32(lambda v, r: (v - jax.lax.stop_gradient(r)) ** 2, v, v_ref), counts)


def distillation_reward(
    v_e: PyTree[Float[Array, "k b ..."]],
    v_d: PyTree[Float[Array, "k b ..."]],
    times: Float[ArrayLike, " n"],
    counts: Places | None,
    min_time: float = 0.0,
) -> Float[Array, " b"]:
    """Minus the velocity gap integrated along a rollout (WMSD Eq. 9), without gradient.

    A Riemann sum whose widths are the sampler's steps, cut at `min_time`:
    sum_i -max(0, t_i - max(t_{i+1}, min_time)) gap(state i).

    Args:
        v_e: the Executor's velocities at the visited states, noisiest first.
        v_d: the Demonstrator's velocities there.
        times: the sampler's grid [k + 1].
        counts: of each stream [n], the places that count; None: all do.
        min_time: lower end of the integral; 0 is the paper's.
    """
    times = jnp.maximum(jnp.asarray(times, jnp.float32), min_time)
    gaps = jax.vmap(lambda e, d: velocity_gap(e, d, counts))(v_e, v_d)
    return jax.lax.stop_gradient(-jnp.sum((times[:-1] - times[1:])[:, None] * gaps, axis=0))


def decoupled_gap(v: Latents, v_ref: Latents, counts: Places | None) -> Float[Array, " b"]:
    """`velocity_gap` in value, with the gradients of length and direction taken apart.

        (|v| - |r|)^2 + 2 sg[|v|] |r| (1 - cos(v, r)),    |.| = root mean square where it counts

    Squared error is lowered by shrinking v wherever the direction of r cannot be foreseen, which
    shows as washed-out video. Here direction only turns v, and length is matched by itself (after
    the teacher matching of musubi-tuner). With unit vectors, 2 (1 - cos) = mean (v/|v| - r/|r|)^2,
    which does not cancel when v is near r. At v = 0, where no direction exists, value and gradient
    are those of `velocity_gap`.
    """
    r = jax.lax.stop_gradient(v_ref)

    def unit(x):
        square = masked_mean(map_float32(jnp.square, x), counts)
        length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        divisor = jnp.where(square > 0, length, 1.0)
        return length, map_float32(lambda x: x / broadcast_time(divisor, x.ndim), x)

    v_length, v_unit = unit(v)
    r_length, r_unit = unit(r)
    turn = jax.lax.stop_gradient(v_length) * r_length * velocity_gap(v_unit, r_unit, counts)
    split = (v_length - r_length) ** 2 + jnp.where(r_length > 0, turn, 0.0)
    return jnp.where(v_length > 0, split, velocity_gap(v, r, counts))


def awm_log_likelihood(
    m: Float[Array, " b"], t: Float[ArrayLike, " b"], weighting: str, p: float = 0.25
) -> Float[Array, " b"]:
    """AWM's pseudo log-likelihood of clips, from their matching errors.

    Args:
        m: mean squared error of the velocity against eps - x_0 at time t (see `velocity_gap`).
        t: the times, in [0, 1].
        weighting: "uniform", "t", "t2", "huber" or "ghuber" (AWM's released configs); formulas
            above.
        p: power of "ghuber". Its slope -t m^(p - 1) makes gradients nearly free of the error's
            magnitude.

    Raises:
        ValueError: for another weighting.
    """
    m, t = jnp.asarray(m, jnp.float32), jnp.asarray(t, jnp.float32)
    match weighting:
        case "uniform":
            return -m
        case "t":
            return -t * m
        case "t2":
            return -(t**2) * m
        case "huber":
            return -t * (jnp.sqrt(m + _HUBER_DELTA) - _HUBER_DELTA**0.5)
        case "ghuber":
            return -t / p * ((m + _HUBER_DELTA) ** p - _HUBER_DELTA**p)
    raise ValueError(f"weighting must be uniform, t, t2, huber or ghuber, got {weighting!r}")


def _clipped_surrogate(
    log_ratio: Float[Array, " b"], advantages: Float[Array, " b"], clip: float
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """(max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio)."""
    ratio = jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.maximum(-advantages * ratio, -advantages * clipped), ratio


def awm_surrogate(
    log_lik: Float[Array, " b"],
    log_lik_old: Float[Array, " b"],
    advantages: Float[Array, " b"],
    clip: float,
    temperature: float = 1.0,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """AWM's clipped policy loss: (loss [b], ratio [b]).

    `log_lik` and `log_lik_old` must come from the same (t, eps). While policy and old policy agree
    the ratio is 1, the clip idle and the gradient -A d(log_lik), whatever the temperature is.

    Args:
        log_lik: log-likelihoods under the policy (`awm_log_likelihood`).
        log_lik_old: those under the old policy; no gradient goes into them.
        advantages: A.
        clip: c of the clip range.
        temperature: divides the log-ratio and multiplies the loss. The log-likelihoods are means
            over all dims, so several updates move them by far less than any usual clip range; a
            temperature below 1 lets the clip engage.
    """
    log_ratio = (log_lik - jax.lax.stop_gradient(log_lik_old)) / temperature
    loss, ratio = _clipped_surrogate(log_ratio, advantages, clip)
    return temperature * loss, ratio


def nft_loss(
    v: Latents,
    v_old: Latents,
    target: Latents,
    t: Float[ArrayLike, " b"],
    advantages: Float[Array, " b"],
    beta: float,
    counts: Places | None,
) -> Float[Array, " b"]:
    """DiffusionNFT's loss on re-noised clips (arXiv 2509.16117); formula above.

    Clips with a positive advantage pull the policy towards themselves, the others push it to the far side of the old
    policy. At v = v_old the gradient is proportional to A.

    Args:
        v: the policy's velocities at time t.
        v_old: the old policy's; no gradient goes into them.
        target: eps - x_0.
        t: the times, in (0, 1].
        advantages: A, in [-1, 1].
        beta: how far v+ and v- lie from v_old, in units of v - v_old; positive.
        counts: of each stream [n], the places that count; None: all do.
    """
    t = jnp.asarray(t, jnp.float32)
    v_old = jax.lax.stop_gradient(v_old)

    def distance(velocity):
        # The released code compares clean latents, whose difference is t times that of the velocities.
        error = map_float32(lambda v, target: jnp.abs(v - target), velocity, target)
        scale = jax.lax.stop_gradient(t * masked_mean(error, counts))
        return t**2 * velocity_gap(velocity, target, counts) / jnp.maximum(scale, _NFT_LEAST)

    share = (1 + jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))) / 2
    towards = distance(map_float32(lambda v, old: old + beta * (v - old), v, v_old))
    away = distance(map_float32(lambda v, old: old - beta * (v - old), v, v_old))
    return ADVANTAGE_CLIP / beta * (share * towards + (1 - share) * away)


def flow_grpo_surrogate(
    log_prob: Float[Array, " b"],
    log_prob_old: Float[Array, " b"],
    advantages: Float[Array, " b"],
    clip: float,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Flow-GRPO's clipped policy loss for one SDE step: (loss [b], ratio [b]).

    Where a step was not stochastic both log-probabilities are 0 and the loss is -A without a
    gradient: leave such steps out. Log-probabilities are means over dims
    (`sampling.gaussian_log_prob`), hence clip ranges of 1e-5 to 1e-3.
    """
    return _clipped_surrogate(log_prob - jax.lax.stop_gradient(log_prob_old), advantages, clip)


def flow_grpo_kl(
    mean: Latents,
    mean_ref: Latents,
    std: Float[ArrayLike, ""] | Float[ArrayLike, " b"],
    counts: Places | None,
) -> Float[Array, " b"]:
    """Exact KL(policy | reference) of one SDE step, mean over the dims that count.

    `std` is the full standard deviation g sqrt(-dt) of the step, not g; where it is 0, so is the
    result. No gradient goes into `mean_ref`.
    """
    std = jnp.asarray(std, jnp.float32)
    safe = jnp.where(std > 0, std, 1.0)
    return jnp.where(std > 0, velocity_gap(mean, mean_ref, counts) / (2 * safe**2), 0.0)
