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

Everything here returns float32, whatever comes in: targets rounded to bfloat16 would carry an error
as large as the gap between two close policies.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

# 1 where a latent frame is generated, 0 where it is pinned to the scene.
FrameMask = Float[ArrayLike, " f"]


def broadcast_time(t: Float[ArrayLike, ""] | Float[ArrayLike, " b"], ndim: int) -> Float[Array, "..."]:
    """Times [b], or one time for all, as float32 [b 1 1 ...] (or [1 1 ...]) with `ndim` axes."""
    return jnp.reshape(jnp.asarray(t, jnp.float32), (-1,) + (1,) * (ndim - 1))


def interpolate(
    x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], t: Float[ArrayLike, " b"]
) -> Float[Array, "b ..."]:
    """Noisy latents x_t, equation (1)."""
    t = broadcast_time(t, x0.ndim)
    return (1 - t) * jnp.asarray(x0, jnp.float32) + t * jnp.asarray(eps, jnp.float32)


def velocity(x0: Float[Array, "b ..."], eps: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """The velocity of the straight line from data to noise, equation (2)."""
    return jnp.asarray(eps, jnp.float32) - jnp.asarray(x0, jnp.float32)


def clean_from_velocity(
    x_t: Float[Array, "b ..."], v: Float[Array, "b ..."], t: Float[ArrayLike, " b"]
) -> Float[Array, "b ..."]:
    """The clean latents that a velocity points at, equation (3)."""
    t = broadcast_time(t, x_t.ndim)
    return jnp.asarray(x_t, jnp.float32) - t * jnp.asarray(v, jnp.float32)


def noise_from_velocity(
    x_t: Float[Array, "b ..."], v: Float[Array, "b ..."], t: Float[ArrayLike, " b"]
) -> Float[Array, "b ..."]:
    """The noise that a velocity comes from, equation (4)."""
    t = broadcast_time(t, x_t.ndim)
    return jnp.asarray(x_t, jnp.float32) + (1 - t) * jnp.asarray(v, jnp.float32)


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


def masked_mean(x: Float[Array, "b f h w c"], frame_mask: FrameMask | None) -> Float[Array, " b"]:
    """Mean over all entries of the free frames, float32 [b].

    Pinned frames do not enter, even if they are not finite.

    Args:
        x: values to average.
        frame_mask: [f], 1 on free frames and 0 on pinned ones; None when every frame is free. At
            least one is free.
    """
    per_frame = jnp.mean(jnp.asarray(x, jnp.float32), axis=(2, 3, 4))
    if frame_mask is None:
        return jnp.mean(per_frame, axis=1)
    free = (jnp.asarray(frame_mask) > 0)[None, :]
    return jnp.sum(jnp.where(free, per_frame, 0.0), axis=1) / jnp.sum(free, dtype=jnp.float32)
