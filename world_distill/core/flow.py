"""Rectified flow: the time convention of the whole project, stated here and nowhere else.

    t = 1 is noise, t = 0 is data
    x_t = (1 - t) x_0 + t eps                     (1) interpolation, eps ~ N(0, I)
    v   = d x_t / d t = eps - x_0                 (2) velocity
    x_0 = x_t - t v                               (3) clean latents, from (1) and (2)
    eps = x_t + (1 - t) v                         (4) noise, from (1) and (2)
    t'  = s t / (1 + (s - 1) t)                   (5) time shift: s > 1 dwells near the noise

Sampling goes *down* in t, so a sampler's step `t_next - t` is negative. WMSD (arXiv 2606.12072)
writes time the other way round: its time is 1 - t and its velocity is -v. Squared differences of
velocities are the same in both.

Latents are one array [b n ...], or a mapping of streams to such arrays (`{"video": [b f h w c], "audio": [b l c]}`); n
are a stream's places: latent frames, or moments of a sound track. Functions of latents work on each stream alike.

Everything here returns float32, whatever comes in: targets rounded to bfloat16 would carry an error
as large as the gap between two close policies.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree, Shaped

Latents = PyTree[Float[ArrayLike, "b ..."]]
# Of each stream [n]: True, or 1, at the places that are meant. A tree like the latents.
Places = PyTree[Shaped[ArrayLike, " _"]]


def broadcast_time(t: Float[ArrayLike, ""] | Float[ArrayLike, " b"], ndim: int) -> Float[Array, "..."]:
    """Times [b], or one time for all, as float32 [b 1 1 ...] (or [1 1 ...]) with `ndim` axes."""
    return jnp.reshape(jnp.asarray(t, jnp.float32), (-1,) + (1,) * (ndim - 1))


def map_float32(function: Callable[..., Array], *latents: Any) -> Any:
    """`function` of each stream of latents, or of masks, in float32."""
    return jax.tree.map(lambda *x: function(*(jnp.asarray(array, jnp.float32) for array in x)), *latents)


def interpolate(x0: Latents, eps: Latents, t: Float[ArrayLike, " b"]) -> Latents:
    """Noisy latents x_t, equation (1)."""

    def one(x0, eps):
        time = broadcast_time(t, x0.ndim)
        return (1 - time) * x0 + time * eps

    return map_float32(one, x0, eps)


def velocity(x0: Latents, eps: Latents) -> Latents:
    """The velocity of the straight line from data to noise, equation (2)."""
    return map_float32(lambda x0, eps: eps - x0, x0, eps)


def clean_from_velocity(x_t: Latents, v: Latents, t: Float[ArrayLike, " b"]) -> Latents:
    """The clean latents that a velocity points at, equation (3)."""
    return map_float32(lambda x_t, v: x_t - broadcast_time(t, x_t.ndim) * v, x_t, v)


def noise_from_velocity(x_t: Latents, v: Latents, t: Float[ArrayLike, " b"]) -> Latents:
    """The noise that a velocity comes from, equation (4)."""
    return map_float32(lambda x_t, v: x_t + (1 - broadcast_time(t, x_t.ndim)) * v, x_t, v)


def shift_times(t: Float[ArrayLike, "..."], shift: float) -> Float[ArrayLike, "..."]:
    """Times moved by `shift` > 0, equation (5); 0 and 1 stay in place, numpy stays numpy."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(
    steps: int | None, shift: float = 1.0, explicit: Sequence[float] | None = None
) -> Float[np.ndarray, " n"]:
    """The sampler's grid: a float32 host table [steps + 1], falling strictly to exactly 0.

    Args:
        steps: number of sampler steps; may be None when `explicit` is given.
        shift: time shift of the even grid from 1 to 0, equation (5).
        explicit: the grid itself (a distilled sampler's), used as it is. Its closing 0 may be left
            out.

    Raises:
        ValueError: fewer than one step, a shift that is not positive, or an explicit grid that does
            not fall strictly inside (0, 1], disagrees with `steps`, or comes with a shift.
    """
    if explicit is None:
        if steps is None or steps < 1:
            raise ValueError(f"a sampler needs at least one step, got steps={steps}")
        if not shift > 0:
            raise ValueError(f"the time shift must be positive, got {shift}")
        times = np.asarray(shift_times(np.linspace(1.0, 0.0, steps + 1, dtype=np.float64), shift))
    else:
        if shift != 1.0:
            raise ValueError(f"explicit times are used as they are, but shift={shift} was given")
        times = np.asarray(explicit, np.float64)
        if times.ndim != 1 or times.size == 0:
            raise ValueError(f"explicit times must be a non-empty list, got shape {times.shape}")
        if times[-1] != 0.0:
            times = np.append(times, 0.0)
        if steps is not None and len(times) != steps + 1:
            raise ValueError(f"explicit times make {len(times) - 1} steps, but steps={steps}")
    # Checked after rounding: two times that meet in float32 would make a step of length 0.
    times = times.astype(np.float32)
    if len(times) < 2 or not times[0] <= 1.0 or not (np.diff(times) < 0).all():
        raise ValueError(f"times must fall strictly, from at most 1 to 0, got {times.tolist()}")
    return times


def masked_mean(x: Latents, counts: Places | None) -> Float[Array, " b"]:
    """Mean over all entries at the places that count, float32 [b].

    Entries of all streams weigh the same, so a large stream weighs more than a small one. Other places do not enter,
    even if they are not finite.

    Args:
        x: values to average.
        counts: of each stream [n], positive at the places that count; None: all do. Not traced.

    Raises:
        ValueError: no place counts, or `counts` has other streams than `x`.
    """
    return average_streams(_mean, x, counts)


def average_streams(
    of_stream: Callable[[Array, np.ndarray], Array], x: Latents, counts: Places | None
) -> Float[Array, " b"]:
    """Values [b] of each stream, averaged with its entries at the places that count as weights.

    Args:
        of_stream: (stream [b n ...] float32, places that count [n] bool) -> [b]; called where any place counts.
        x: latents.
        counts: see `masked_mean`.

    Raises:
        ValueError: see `masked_mean`.
    """
    streams, structure = jax.tree.flatten(x)
    if counts is None:
        masks = [np.ones(stream.shape[1], bool) for stream in streams]
    elif jax.tree.structure(counts) == structure:
        masks = [np.asarray(mask) > 0 for mask in jax.tree.leaves(counts)]
    else:
        raise ValueError(f"places {jax.tree.structure(counts)} of latents {structure}: the streams are not the same")
    means, sizes = [], []
    for stream, mask in zip(streams, masks, strict=True):
        if mask.any():
            means.append(of_stream(jnp.asarray(stream, jnp.float32), mask))
            sizes.append(int(mask.sum()) * math.prod(stream.shape[2:]))
    if not means:
        raise ValueError("no place of any stream counts: there is nothing to average")
    if len(means) == 1:
        return means[0]
    return jnp.asarray(sum(mean * (size / sum(sizes)) for mean, size in zip(means, sizes, strict=True)))


def _mean(x: Float[Array, "b n ..."], mask: Shaped[np.ndarray, " n"]) -> Float[Array, " b"]:
    by_place = jnp.mean(x, axis=tuple(range(2, x.ndim)))
    if mask.all():
        return jnp.mean(by_place, axis=1)
    return jnp.sum(jnp.where(jnp.asarray(mask)[None], by_place, 0.0), axis=1) / jnp.float32(mask.sum())
