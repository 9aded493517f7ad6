"""Numbers that change with the training step, and exponential moving averages of weights.

    average <- decay average + (1 - decay) new

The old policy of AWM (arXiv 2509.25050) is a fast average, decay = min(0.3, 0.001 step), that
keeps close behind the policy and serves as a trust region.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from world_distill.structs import PyTree


def piecewise_linear(
    points: Sequence[Sequence[float | int]] | float | int,
) -> Callable[[Num[ArrayLike, ""]], Float[Array, ""]]:
    """A schedule of straight lines through (step, value) points, constant outside of them.

    The schedule can be traced in its step.

    Args:
        points: steps must rise strictly. A bare number is a constant schedule.

    Raises:
        ValueError: no points, a point that is not a finite pair, or steps that do not rise.
    """
    pairs: Any = [(0.0, points)] if np.ndim(points) == 0 else points
    table = np.asarray(pairs, np.float64)
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] != 2:
        raise ValueError(f"need (step, value) pairs, got {pairs!r}")
    steps, values = table.T.astype(np.float32)
    if not np.isfinite(table).all() or not (np.diff(steps) > 0).all():
        raise ValueError(f"need finite points with strictly rising steps, got {pairs!r}")

    def schedule(step: Num[ArrayLike, ""]) -> Float[Array, ""]:
        return jnp.interp(jnp.asarray(step, jnp.float32), steps, values)

    return schedule


def ema_decay_linear(step: Num[ArrayLike, ""], slope: float = 0.001, maximum: float = 0.3) -> Float[Array, ""]:
    """Decay that grows with the finished steps: min(maximum, slope step)."""
    return jnp.minimum(maximum, slope * jnp.asarray(step, jnp.float32))


def ema_update(avg_tree: PyTree, new_tree: PyTree, decay: Float[ArrayLike, ""]) -> PyTree:
    """The average moved towards `new_tree`, leaf by leaf: float32 inside, the average's dtype out.

    Decay 0 gives the new tree, and a tree that has not moved stays, both bit for bit.
    """
    decay = jnp.asarray(decay, jnp.float32)

    def move(avg, new):
        # Not decay * avg + (1 - decay) * new: that would round even where both are equal.
        avg32, new32 = jnp.asarray(avg, jnp.float32), jnp.asarray(new, jnp.float32)
        return (new32 + decay * (avg32 - new32)).astype(avg.dtype)

    return jax.tree.map(move, avg_tree, new_tree)
