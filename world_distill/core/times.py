"""Training times: where on the way from noise to data the losses look.

AWM (arXiv 2509.25050) draws T times a step, one from each of T strata, so that every step sees the
whole range:

    discrete      indices lo .. hi - 1 of the sampler's own grid of N steps: lo = 1 leaves out pure
                  noise, hi = floor(fraction N) the low-noise tail. Index lo + floor(u (hi - lo)),
                  u = (i + U) / T, so every index is equally likely for every T. (The released code
                  cuts at whole indices, which is the same only where T divides hi - lo.)
    by dt         the same indices, each as likely as its step t_j - t_{j+1} is long: the largest j with
                  sum of the shares of lo .. j - 1 <= u. On an even grid the law is that of `discrete`.
    logit-normal  u = (i + U) / T,  t = sigmoid(ndtri(u)), shifted, at least 0.01
    uniform       u = (i + U) / T,  t = low + (1 - low) u, shifted
    stretched     the shifted logit-normal law, stretched so that its quantiles .005 and .999 become 0 and 1; below
                  e = 0.001 reflected at e; one in ten replaced by a uniform one in [e, 1] (LTX-2's trainer)

A draw is shared by a batch (the noise is not); a batch that is spread over hosts must draw with the
same key.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from world_distill.core.flow import shift_times

_MIN_TIME = 0.01  # AWM's lower bound of logit-normal times
_UNIT_MARGIN = 1e-6  # keeps the normal quantile finite
_STRETCH = (-2.5758, 3.0902)  # quantiles .005 and .999 of the standard normal: LTX-2's values, as the two below
_STRETCH_LEAST, _STRETCH_UNIFORM = 1e-3, 0.1


def stratified_times(
    key: Key[Array, ""],
    times: Float[ArrayLike, " n"],
    count: int,
    *,
    skip_first: bool,
    keep_fraction: float,
    by_dt: bool = False,
) -> Int[Array, " count"]:
    """Indices into the sampler's grid, rising (noisiest first), one from each of `count` strata.

    Each of the n indices is drawn `count` / n times on average, and at least floor(`count` / n) - 1
    times in every draw; `by_dt`, `count` times its share of the steps' lengths.

    Args:
        key: one typed PRNG key.
        times: the sampler's grid [N + 1], on the host; without `by_dt` only its length counts.
        count: number of strata, T.
        skip_first: leave out index 0, where the latents are pure noise.
        keep_fraction: share of the grid's indices to keep, from the noisy end, in (0, 1].
        by_dt: draw an index by the length of the step from it, t_j - t_{j+1}.

    Raises:
        ValueError: if nothing of the grid is left, or an argument is out of range.
    """
    steps = np.shape(times)[0] - 1
    if count < 1 or not 0 < keep_fraction <= 1:
        raise ValueError(f"need count >= 1 and 0 < keep_fraction <= 1: {count=}, {keep_fraction=}")
    low = int(skip_first)
    high = math.floor(keep_fraction * steps + 1e-9)  # 0.29 * 100 is 28.999... in binary
    if high - low < 1:
        raise ValueError(f"no index left of {steps} steps: {skip_first=}, {keep_fraction=}")
    if by_dt:
        lengths = -np.diff(np.asarray(times, np.float64))[low:high]
        ends = np.cumsum(lengths)[:-1] / lengths.sum()
        return low + jnp.sum(_stratified_units(key, count)[:, None] >= jnp.asarray(ends, jnp.float32), axis=1)
    # Whole numbers only: stratum i holds n of the n `count` equal pieces, and each index `count` neighbours of them.
    pieces = (high - low) * np.arange(count)
    drawn = jax.random.randint(key, (count,), jnp.asarray(pieces), jnp.asarray(pieces + high - low))
    return low + drawn // count


def _stratified_units(key: Key[Array, ""], count: int) -> Float[Array, " count"]:
    if count < 1:
        raise ValueError(f"need count >= 1, got {count}")
    return (jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(key, (count,))) / count


def logit_normal_times(key: Key[Array, ""], count: int, shift: float) -> Float[Array, " count"]:
    """Shifted logit-normal times in [0.01, 1), rising, from `count` equally likely strata."""
    units = jnp.clip(_stratified_units(key, count), _UNIT_MARGIN, 1 - _UNIT_MARGIN)
    t = jax.nn.sigmoid(jax.scipy.special.ndtri(units))
    return jnp.maximum(shift_times(t, shift), _MIN_TIME)


def uniform_times(key: Key[Array, ""], count: int, shift: float, low: float) -> Float[Array, " count"]:
    """Shifted times of uniform ones in [low, 1], rising, from `count` equal strata."""
    return jnp.asarray(shift_times(low + (1 - low) * _stratified_units(key, count), shift))


def stretched_times(key: Key[Array, ""], count: int, shift: float) -> Float[Array, " count"]:
    """Stretched logit-normal times in [0, 1] from `count` equally likely strata, of which some become uniform."""
    normal, uniform, chosen = jax.random.split(key, 3)
    units = jnp.clip(_stratified_units(normal, count), _UNIT_MARGIN, 1 - _UNIT_MARGIN)
    low, high = (1 / (1 + math.exp(-quantile) / shift) for quantile in _STRETCH)  # shifted sigmoids
    t = (jnp.asarray(shift_times(jax.nn.sigmoid(jax.scipy.special.ndtri(units)), shift)) - low) / (high - low)
    t = jnp.clip(jnp.where(t >= _STRETCH_LEAST, t, 2 * _STRETCH_LEAST - t), 0, 1)
    flat = _STRETCH_LEAST + (1 - _STRETCH_LEAST) * jax.random.uniform(uniform, (count,))
    return jnp.where(jax.random.bernoulli(chosen, _STRETCH_UNIFORM, (count,)), flat, t)
