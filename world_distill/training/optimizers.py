"""Optimisers by name, with a gradient clip and a learning-rate schedule around them."""

import math

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from world_distill.structs import PyTree

OPTIMISERS = ("adam", "adamw", "muon")
# Logical axes along which independent matrices are stacked.
STACKED_AXES = ("layers",)


def make_schedule(
    learning_rate: float | optax.Schedule, *, warmup_steps: int = 0, decay_steps: int | None = None
) -> optax.Schedule:
    """Update number (from 0) to learning rate.

    Linear from `learning_rate / warmup_steps` at the first update to `learning_rate` at the last of the warm-up; then
    constant, or with `decay_steps` (counted from the first update) by a half cosine to 0 there. A schedule is
    returned as it is.

    Raises:
      ValueError: a learning rate that is not finite and positive, steps out of order, or steps beside a schedule.
    """
    if callable(learning_rate):
        if warmup_steps or decay_steps is not None:
            raise ValueError("learning_rate is a schedule already: give no warmup_steps or decay_steps beside it")
        return learning_rate
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate {learning_rate} is not a positive number")
    if warmup_steps < 0 or (decay_steps is not None and decay_steps <= warmup_steps):
        raise ValueError(f"warmup_steps {warmup_steps} and decay_steps {decay_steps} are not 0 <= warm-up < decay")
    if decay_steps is None:
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(learning_rate, decay_steps - warmup_steps)
    if warmup_steps == 0:
        return after
    # Not from 0: an update with learning rate 0 would waste a whole batch of rollouts.
    first = learning_rate / warmup_steps
    warmup = optax.linear_schedule(first, learning_rate + first, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    *,
    name: str,
    learning_rate: float | optax.Schedule,
    weight_decay: float = 0.0,
    grad_clip: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    axes: PyTree | None = None,
) -> optax.GradientTransformation:
    """The optimiser `name`, one of `OPTIMISERS`.

    Args:
      name: "adam", "adamw", or "muon" (with Nesterov's Adam for what is not a matrix).
      learning_rate: number, or schedule from the number of updates.
      weight_decay: decoupled, times the learning rate. On every weight with adamw, on the matrices with muon.
      grad_clip: largest global norm of the gradient; None does not clip.
      b1: decay of Adam's first moment; Muon's own momentum is 0.95.
      b2: decay of Adam's second moment.
      eps: added to denominators.
      warmup_steps: see `make_schedule`.
      decay_steps: see `make_schedule`.
      axes: for muon, logical axis names like the weights' tree (`ModelFamily.base_axes`, `lora_axes`); an axis in
        `STACKED_AXES` counts matrices, and the last two others are the matrix. Without it shapes must tell: [i o] is a
        matrix, and [... i o] a stack of them.

    Raises:
      ValueError: an unknown name, a value out of range, weight decay with adam; and on `init` with muon, `axes` that do
        not fit the weights, or weights whose shapes alone do not tell stacked vectors from matrices.
    """
    if name not in OPTIMISERS:
        raise ValueError(f"unknown optimiser {name!r}; there are: {', '.join(OPTIMISERS)}")
    if weight_decay < 0 or (grad_clip is not None and not grad_clip > 0):
        raise ValueError(
            f"weight_decay {weight_decay} is negative, or grad_clip {grad_clip} not positive (None: no clip)"
        )
    schedule = make_schedule(learning_rate, warmup_steps=warmup_steps, decay_steps=decay_steps)
    if name == "adam":
        if weight_decay:
            raise ValueError(f"adam has no weight decay (asked for {weight_decay}): use adamw")
        update = optax.adam(schedule, b1=b1, b2=b2, eps=eps)
    elif name == "adamw":
        update = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    else:
        update = optax.contrib.muon(
            schedule,
            eps=eps,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=lambda weights: muon_dimensions(weights, axes),
        )
    return update if grad_clip is None else optax.chain(optax.clip_by_global_norm(grad_clip), update)


def muon_dimensions(weights: PyTree, axes: PyTree | None = None) -> PyTree:
    """Which two axes of each weight make the matrix that Muon orthogonalises; None where there is none.

    The other axes are a stack of matrices. `weights` are arrays or shapes; `axes` as in `make_optimizer`. Optax's own
    rule, all weights of two axes and no others, leaves stacked matrices [layers i o] out and takes stacked vectors
    [layers d] in.
    """
    named = None if axes is None else _by_path(axes)
    if named is None:
        _check_unambiguous(weights)

    def dimensions(path, weight) -> MuonDimensionNumbers | None:
        rank = len(weight.shape)
        names = (None,) * rank
        if named is not None:
            key = jax.tree_util.keystr(path)
            if key not in named or (named[key] is not None and len(named[key]) != rank):
                raise ValueError(f"axes for weight {key} {weight.shape}: {named.get(key, 'none given')}")
            names = names if named[key] is None else tuple(named[key])
        free = [i for i, axis in enumerate(names) if axis not in STACKED_AXES]
        return MuonDimensionNumbers(reduction_axis=free[-2], output_axis=free[-1]) if len(free) >= 2 else None

    return jax.tree_util.tree_map_with_path(dimensions, weights)


def _by_path(axes: PyTree) -> dict:
    names = jax.tree_util.tree_flatten_with_path(
        axes, is_leaf=lambda x: x is None or isinstance(x, tuple | jax.sharding.PartitionSpec)
    )[0]
    return {jax.tree_util.keystr(path): value for path, value in names}


def _check_unambiguous(weights: PyTree) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(weights)[0]
    stacks = {leaf.shape[0] for _, leaf in leaves if len(leaf.shape) > 2}
    doubtful = [jax.tree_util.keystr(p) for p, leaf in leaves if len(leaf.shape) == 2 and leaf.shape[0] in stacks]
    if doubtful:
        raise ValueError(
            f"muon cannot tell from their shapes whether {', '.join(doubtful)} are matrices, or vectors stacked by"
            " layer as other weights of as many layers are: give `axes`"
        )
