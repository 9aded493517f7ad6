"""How far two velocity fields are apart and in what way; means and rates with their uncertainty.

The gap alone misleads: part of it cannot be learnt (the Demonstrator is told more than the Executor
can infer), and the same size can mean a wrong direction, a shrunken length, or one constant colour
offset. With e = v - v_ref:

    cosine      <v, v_ref> / (|v| |v_ref|)
    norm_ratio  |v| / |v_ref|
    dc          share of the energy of e that lies in its per-channel means over frames and space

Intervals: Wilson's score interval for rates, Agresti and Min's for the difference of two rates of the
same things, Student's for means. Those of scores and of their differences are never empty, and stay
where such figures can lie.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from world_distill.core.flow import Latents, Places, average_streams, map_float32, masked_mean


def _ratio(top: Array, bottom: Array) -> Array:
    """The quotient, and 0 where `bottom` is 0."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), 0.0)


def velocity_diagnostics(v: Latents, v_ref: Latents, counts: Places | None) -> dict[str, Float[Array, " b"]]:
    """Cosine, norm ratio and dc share at the places that count, [b] each.

    The formulas stand above; where a denominator is 0, so is the value. With several streams, the dc share is that of
    each stream's channels, weighted as in `masked_mean`.
    """
    square = lambda x: masked_mean(map_float32(jnp.square, x), counts)  # noqa: E731
    length, length_ref = jnp.sqrt(square(v)), jnp.sqrt(square(v_ref))
    error = map_float32(jnp.subtract, v, v_ref)
    product = masked_mean(map_float32(jnp.multiply, v, v_ref), counts)
    return {
        "cosine": _ratio(product, length * length_ref),
        "norm_ratio": _ratio(length, length_ref),
        "dc": _ratio(average_streams(_offset, error, counts), square(error)),
    }


def _offset(error: Array, mask: np.ndarray) -> Float[Array, " b"]:
    """Mean square of each channel's mean error, in one stream."""
    # masked_mean averages channels as well, so each channel goes through it alone: [b c].
    offset = jax.vmap(lambda e: masked_mean(e[..., None], mask), -1, -1)(error)
    return jnp.mean(offset**2, axis=-1)


def binned_by_time(
    values: Float[np.ndarray, " n"], t: Float[np.ndarray, " n"], edges: Sequence[float | int] | np.ndarray
) -> tuple[Float[np.ndarray, " m"], np.ndarray]:
    """Mean of `values` in bins of their times: (means [m], counts [m]).

    Bin i is [edges[i], edges[i + 1]), the last one closed. An empty bin has mean NaN and count 0.

    Raises:
        ValueError: edges do not rise strictly, or a time lies outside of them.
    """
    values, t = np.asarray(values, np.float64), np.asarray(t, np.float64)
    edges = np.asarray(edges, np.float64)
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges must rise strictly, got {edges.tolist()}")
    if not ((t >= edges[0]) & (t <= edges[-1])).all():
        raise ValueError(f"times outside of [{edges[0]}, {edges[-1]}]")
    bins = np.minimum(np.searchsorted(edges, t, side="right") - 1, len(edges) - 2)
    counts = np.bincount(bins, minlength=len(edges) - 1)
    sums = np.bincount(bins, weights=values, minlength=len(edges) - 1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), counts


def wilson_interval(successes: float | int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a rate; (0, 1) when nothing was counted.

    `successes` may be a sum of scores in [0, 1]. They vary less than verdicts of 0 and 1 with the same mean, so the
    interval is wide enough.

    Raises:
        ValueError: unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_rate_interval(
    a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"], z: float = 1.96
) -> tuple[float, float, float]:
    """(difference, low, high) of the rates of a and b, rate(a) - rate(b), for paired verdicts.

    Agresti and Min's interval (Statistics in Medicine 24, 2005): half a pair is added to each of the four cells, so
    that it holds for few pairs, and is never empty.

    Raises:
        ValueError: if the two do not pair up, or are empty.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    _check_pairs(a, b)
    return float(a.mean() - b.mean()), *_agresti_min(a.astype(np.float64) - b, z)


def mean_interval(values: Float[np.ndarray, " n"], z: float = 1.96) -> tuple[float, float, float]:
    """(mean, low, high): the mean and z standard errors to either side.

    The bounds of a single value are NaN.

    Raises:
        ValueError: without values, or if one is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"need finite values, got {values.size}, not all finite or none")
    mean = float(values.mean())
    half = z * float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.nan
    return mean, mean - half, mean + half


def student_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(mean, low, high) at 95 % by Student's t.

    The bounds of a single value are NaN.

    Raises:
        ValueError: see `mean_interval`.
    """
    from scipy.special import stdtrit

    return mean_interval(values, z=float(stdtrit(np.size(values) - 1, 0.975)) if np.size(values) > 1 else 0.0)


def score_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(mean, low, high) of scores in [0, 1], with 0 <= low < high <= 1.

    Wilson's interval for verdicts of 0 and 1, and where the values do not vary, which says nothing of their spread at
    small n. Otherwise Student's, cut to [0, 1].

    Raises:
        ValueError: without values, or if one is not in [0, 1].
    """
    values = np.asarray(values, np.float64)
    if values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"need scores in [0, 1], got {values.size}, not all of them there or none")
    if np.isin(values, (0.0, 1.0)).all() or np.ptp(values) == 0:
        return float(values.mean()), *wilson_interval(min(float(values.sum()), values.size), values.size)
    mean, low, high = student_interval(values)
    return mean, max(low, 0.0), min(high, 1.0)


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation of paired values, ties given their mean rank; NaN where one of the two never changes.

    Raises:
        ValueError: if the two do not pair up, or are not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"need two finite lists of one length, got {a.shape} and {b.shape}")
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    from scipy.stats import rankdata  # half a second to import, and seldom needed

    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def within_group_correlations(
    values: Mapping[str, Float[np.ndarray, " b"]], groups: Int[np.ndarray, " b"], valid: Bool[np.ndarray, " b"]
) -> dict[tuple[str, str], float]:
    """Pearson's correlation of each pair of values inside groups, pooled over groups.

    Every value is taken relative to its group's mean, as a group-relative advantage takes it: two
    rewards that rank tasks alike and rollouts of a task at random have a correlation of 0 here.
    NaN where one of the two never changes inside a group.

    Args:
        values: name -> one number a rollout, finite where `valid`.
        groups: label of each rollout's group.
        valid: rollouts that count.
    """
    valid = np.asarray(valid, bool)
    ids = np.unique(np.asarray(groups)[valid], return_inverse=True)[1]
    size = np.maximum(np.bincount(ids), 1)

    def centred(value):
        value = np.asarray(value, np.float64)[valid]
        value = value - (np.bincount(ids, weights=value) / size)[ids]
        # Equal values may differ from their mean by rounding.
        return np.where(np.abs(value) > 1e-12 * np.abs(value).max(initial=0.0) + 1e-15, value, 0.0)

    parts = {name: centred(value) for name, value in values.items()}
    found = {}
    for a, b in itertools.combinations(parts, 2):
        power = math.sqrt(float(parts[a] @ parts[a]) * float(parts[b] @ parts[b]))
        found[a, b] = float(parts[a] @ parts[b]) / power if power > 0 else math.nan
    return found


def sign_flip_p(difference: Float[np.ndarray, " n"], *, samples: int = 4096, seed: int = 0) -> float:
    """Two-sided p of the hypothesis that paired differences are as likely to have the other sign.

    Fisher's randomisation test (The Design of Experiments, 1935, section 21): the share of all choices of signs whose
    sum is as far from 0. For verdicts of 0 and 1 it is McNemar's exact test. Above `samples` choices, that many are
    drawn from a fixed seed, and the given one is counted as one more (Phipson and Smyth 2010). Pairs that do not
    differ have no part in it.
    """
    moved = np.asarray(difference, np.float64)
    moved = moved[np.abs(moved) > 1e-12]  # but for rounding
    n, far = len(moved), abs(moved.sum()) * (1 - 1e-9)
    if 2**n <= samples:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ moved) >= far).mean())
    rng = np.random.default_rng(seed)
    # One choice at a time: all at once would need samples * n numbers.
    beyond = sum(abs(rng.choice((-1.0, 1.0), n) @ moved) >= far for _ in range(samples))
    return (1 + beyond) / (1 + samples)


def score_difference(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(difference, low, high) of mean(a - b) for paired scores in [0, 1], with -1 <= low < high <= 1 at 95 %.

    Agresti and Min's interval for verdicts of 0 and 1, and where the differences do not vary. Otherwise Student's, cut
    to [-1, 1]. Both reach 0 unless `sign_flip_p` is at most 0.05: fewer than 6 pairs that differ show no sign.

    Raises:
        ValueError: if the two do not pair up, are empty, or one is not in [0, 1].
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    _check_pairs(a, b)
    if not ((a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)).all():
        raise ValueError("scores are in [0, 1]")
    difference = a - b
    if np.isin(difference, (-1.0, 0.0, 1.0)).all() or np.ptp(difference) < 1e-9:  # but for rounding
        low, high = _agresti_min(difference)
    else:
        _, low, high = student_interval(difference)
    if (low > 0 or high < 0) and sign_flip_p(difference) > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return float(difference.mean()), max(low, -1.0), min(high, 1.0)


def _check_pairs(a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(f"need two lists of one length, got {a.shape} and {b.shape}")


def _agresti_min(difference: np.ndarray, z: float = 1.96) -> tuple[float, float]:
    """Agresti and Min's bounds for the mean of paired differences in [-1, 1].

    Half a pair is added to each of the four cells of verdicts: half a difference of 1, half a one of -1, and one of 0.
    """
    n, total = len(difference) + 2, difference.sum()
    centre = total / n
    half = z * math.sqrt(difference @ difference + 1 - total**2 / n) / n
    return max(-1.0, float(centre - half)), min(1.0, float(centre + half))
