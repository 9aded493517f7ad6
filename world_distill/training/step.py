"""The RL and distillation step as one pure function: (state, base, batch) -> (state, metrics).

    L = w_RL L_RL + beta_d L_anchor [+ beta_old |v_E - v_old|^2] [+ beta_base |v_E - v_base|^2]
    L = t^p |v_E - (eps - x_0)|^2          on the records' clips: supervised fine-tuning (`objective.kind` = sft)

L_anchor is WMSD's Eq. 11 (on visited states) or the same on re-noised clips; L_RL is AWM, DiffusionNFT or Flow-GRPO.
The losses of one draw of times are in `step_losses.py`, their formulas in `core/losses.py`. Every variant of the paper
is a setting: without L_RL this is on-policy distillation, with rollouts of the Demonstrator (see `collect.py`) it is
off-policy distillation, with beta_d = 0 RL alone. `beta_d` and `rl_weight` may be schedules over training steps.

One step makes `updates` optimiser updates on one batch of rollouts, each on one of `minibatches` parts of the rows and
from `draws` random times (one gradient accumulation each, and one per micro-batch of rows). Large models on many chips
take the whole batch at one time after another, as AWM does; small ones learn faster from many updates on few rows
whose times are spread over the grid (`tied`). All randomness comes from fold_in(state.key, state.step).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from world_distill.core import sampling, schedules, times
from world_distill.interfaces import ModelFamily
from world_distill.settings.objective import Objective
from world_distill.structs import PyTree, TrainBatch, TrainState
from world_distill.training.step_losses import Draw, Losses, Policies, Weights


def init_state(
    family: ModelFamily, base: PyTree, optimizer, key: jax.Array, *, rank: int | None, ahead: bool = False
) -> TrainState:
    """A fresh Executor, equal to the Demonstrator's weights, with its averages and optimiser state.

    With `ahead`, the state has room for the Executor of a step ago (`TrainState.lora_rolled`).
    """
    lora = family.init_lora(jax.random.fold_in(key, 0), base, rank=rank)
    copy = lambda tree: jax.tree.map(lambda x: x + 0, tree)  # noqa: E731  (donation wants separate buffers)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        lora=lora,
        lora_ema=copy(lora),
        lora_old=copy(lora),
        opt_state=optimizer.init(lora),
        key=jax.random.fold_in(key, 1),
        lora_rolled=copy(lora) if ahead else None,
    )


class Carry(NamedTuple):
    """What one update hands to the next."""

    lora: PyTree
    lora_ema: PyTree
    opt_state: PyTree
    count: jax.Array  # [] int32, finished updates


class StepSums(NamedTuple):
    """A loss by the step of the sampler at which rows computed it: a mean over updates needs sums and counts."""

    total: jax.Array  # [k]
    count: jax.Array  # [k] int32, rows


def make_train_step(
    family: ModelFamily,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    grid: np.ndarray,
    diffusion: np.ndarray | None = None,
    guidance: float = 1.0,
    sde: sampling.Sde = "flow_grpo",
) -> Callable[[TrainState, PyTree, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` for one sampler grid [k + 1] (and its table [k] of `sampling.DIFFUSIONS[sde]`, for Flow-GRPO).

    `guidance` is the scale of the Demonstrator, which leads away from `TrainBatch.negative`. Every other velocity in
    the losses is without guidance, that of the base told the task, too.

    Raises:
      ValueError: Flow-GRPO without stochastic steps.
    """
    if objective.rl == "flow_grpo" and (diffusion is None or not np.any(diffusion)):
        raise ValueError("objective.rl = flow_grpo needs stochastic steps: set sampler.eta above 0")
    return functools.partial(train_step, Losses(family, objective, grid, diffusion, guidance, sde), optimizer)


def train_step(
    losses: Losses, optimizer: optax.GradientTransformation, state: TrainState, base: PyTree, batch: TrainBatch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: (the next state, metrics).

    Metrics, all float32 scalars: `train/LOSS` of each loss (RL's over judged rows), `train/gradient_norm` of the whole
    gradient, `train/anchor_gradient_norm` and `train/rl_gradient_norm` of its two parts as they are weighted (not where
    one pass serves both) and `train/anchor_to_rl`, the first over the second. With `objective.log_by_step` also
    `train/LOSS/step_I`, the mean over the rows that looked at the sampler's step I, counted from 0; NaN if none did.
    """
    objective = losses.objective
    weights = Weights(
        beta_d=schedules.piecewise_linear(objective.beta_d)(state.step),
        rl=schedules.piecewise_linear(objective.rl_weight)(state.step),
    )
    ahead = state.lora_rolled is not None
    policies = Policies(start=state.lora_rolled if ahead else state.lora, old=state.lora_old)
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), objective.updates)
    first = Carry(state.lora, state.lora_ema, state.opt_state, state.step * objective.updates)
    last, (seen, by_step) = jax.lax.scan(
        lambda carry, job: update(losses, optimizer, carry, *job, base, batch, policies, weights),
        first,
        (keys, jnp.arange(objective.updates)),
    )
    step = state.step + 1
    old_decay = schedules.ema_decay_linear(step, objective.old_slope, objective.old_maximum)
    metrics = {f"train/{name}": value.mean() for name, value in seen.items()}
    for name, (total, count) in by_step.items():
        total, count = total.sum(axis=0), count.sum(axis=0)
        mean = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
        metrics |= {f"train/{name}/step_{i}": mean[i] for i in range(mean.size)}
    metrics |= {"train/beta_d": weights.beta_d, "train/rl_weight": weights.rl}
    metrics["train/lora_norm"] = optax.tree.norm(last.lora)
    new = TrainState(
        step=step,
        lora=last.lora,
        lora_ema=last.lora_ema,
        lora_old=schedules.ema_update(policies.old, last.lora, old_decay),
        opt_state=last.opt_state,
        key=state.key,
        lora_rolled=state.lora if ahead else None,
    )
    return new, metrics


def update(
    losses: Losses,
    optimizer: optax.GradientTransformation,
    carry: Carry,
    key: jax.Array,
    index: jax.Array,
    base: PyTree,
    batch: TrainBatch,
    policies: Policies,
    weights: Weights,
) -> tuple[Carry, tuple[dict[str, jax.Array], dict[str, StepSums]]]:
    """One optimiser update, the step's `index`-th, on its part of the rows.

    Returns (what the next update needs, (metrics, losses by the sampler's step)).
    """
    objective = losses.objective
    batch = _minibatch(batch, objective.minibatches, index)
    draws = draw_rows(key, objective, batch, losses.grid, losses.diffusion)
    grads, found, looked = gradients(losses, carry.lora, base, batch, policies, weights, draws)
    total = _sum(grads)
    changes, opt_state = optimizer.update(total, carry.opt_state, carry.lora)
    lora = optax.apply_updates(carry.lora, changes)
    decay = jnp.minimum(objective.ema_decay, (1.0 + carry.count) / (10.0 + carry.count))
    lora_ema = schedules.ema_update(carry.lora_ema, lora, decay)
    by_step = {name: _step_sums(found[name], at, len(losses.grid) - 1) for name, at in looked.items()}
    after = Carry(lora, lora_ema, opt_state, carry.count + 1)
    return after, (_measures(objective, found, grads, total, changes), by_step)


def gradients(
    losses: Losses,
    lora: PyTree,
    base: PyTree,
    batch: TrainBatch,
    policies: Policies,
    weights: Weights,
    draws: Draw,
) -> tuple[dict[str, PyTree], dict[str, jax.Array], dict[str, jax.Array]]:
    """Gradients of the mean loss over rows and draws, by name of the pass; every row's losses [jobs r] by name.

    And with `objective.log_by_step`, the step of the sampler at which each of them was computed, [jobs r]; else {}.
    """
    objective, passes, rows = losses.objective, losses.passes(), batch.rows
    micro = objective.micro_batch or rows
    if rows % micro:
        raise ValueError(f"objective.micro_batch = {micro} does not divide the {rows} rollouts of an update")
    pieces = rows // micro

    def accumulate(accumulated, job):
        number, part = job
        # Rows of every device: neighbours lie on one, and would have to be sent to all the others.
        take = lambda x, axis: _deal(x, axis, pieces, part)  # noqa: E731
        piece, draw = batch, jax.tree.map(lambda x: x[number], draws)
        if pieces > 1:
            piece, draw = _rows(batch, take), jax.tree.map(lambda x: take(x, 0), draw)
            # Else the compiler would round all states to the model's dtype before the loop, and keep both.
            piece = jax.lax.optimization_barrier(piece)
        grads, found, looked = {}, {}, {}
        for name, at, loss_fn in passes:
            # One after the other, so that only one pass's activations are in memory.
            executor, grads = jax.lax.optimization_barrier((lora, grads)) if grads else (lora, grads)
            grads[name], of_pass = jax.grad(loss_fn, has_aux=True)(executor, base, policies, piece, draw, weights)
            found |= of_pass
            if objective.log_by_step:
                looked |= dict.fromkeys(of_pass, getattr(draw, at))
        return jax.tree.map(jnp.add, accumulated, grads), (found, looked)

    zeros = {name: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), lora) for name, _, _ in passes}
    jobs = (jnp.repeat(jnp.arange(objective.draws), pieces), jnp.tile(jnp.arange(pieces), objective.draws))
    grads, (found, looked) = jax.lax.scan(accumulate, zeros, jobs)
    return jax.tree.map(lambda g: g / (rows * objective.draws), grads), found, looked


def draw_rows(
    key: jax.Array, objective: Objective, batch: TrainBatch, grid: np.ndarray, diffusion: np.ndarray | None
) -> Draw:
    """What every row of an update looks at, in each of its draws: a `Draw` of arrays [draws r].

    Raises:
      ValueError: `tied` does not divide the rows.
    """
    rows, draws = batch.rows, objective.draws
    tied = objective.tied or rows
    if rows % tied:
        raise ValueError(f"objective.tied = {tied} does not divide the {rows} rollouts of an update")
    blocks, keys = rows // tied, jax.random.split(key, 7)

    def spread(key, indices):
        # Strata rise with their number: dealt out in order, one task would only ever see noise.
        indices = jax.random.permutation(key, indices) if blocks > 1 else indices
        return jnp.repeat(indices.reshape(draws, blocks), tied, axis=1)

    count, by_dt = draws * blocks, objective.times == "by_dt"
    visited = times.stratified_times(keys[0], grid, count, skip_first=False, keep_fraction=1.0, by_dt=by_dt)
    visited = renoised = spread(keys[1], visited)
    at = None
    if objective.sft:
        at = spread(keys[3], _fine_tuning_times(keys[2], objective, grid, count))
        renoised = (at[..., None] <= jnp.asarray(grid[1:], jnp.float32)).sum(axis=-1)
    elif objective.uses_renoised:
        renoised = times.stratified_times(
            keys[2], grid, count, skip_first=objective.skip_first, keep_fraction=objective.keep_fraction, by_dt=by_dt
        )
        renoised = spread(keys[3], renoised)
    stochastic = np.flatnonzero(diffusion) if diffusion is not None else np.arange(len(grid) - 1)
    steps = spread(keys[5], jnp.resize(jax.random.permutation(keys[4], jnp.asarray(stochastic)), (count,)))
    # Noise belongs to a row and a draw, wherever the row lies and whoever shares its time.
    row_keys = sampling.sample_keys(keys[6], jnp.arange(rows))
    noise = jax.vmap(lambda draw: jax.vmap(lambda k: jax.random.fold_in(k, draw))(row_keys))(jnp.arange(draws))
    assert batch.valid is not None  # the clips are judged
    valid = batch.valid.astype(jnp.float32)
    judged = jnp.broadcast_to(valid * rows / jnp.maximum(valid.sum(), 1.0), (draws, rows))
    return Draw(noise, visited, renoised, steps, judged, at)


def _fine_tuning_times(key: jax.Array, objective: Objective, grid: np.ndarray, count: int) -> jax.Array:
    """Times [count] of fine-tuning, one from each of as many strata."""
    if objective.sft_times == "uniform":
        return times.uniform_times(key, count, objective.sft_shift, 0.0)
    if objective.sft_times == "logit_normal":
        return times.logit_normal_times(key, count, objective.sft_shift)
    if objective.sft_times == "stretched":
        return times.stretched_times(key, count, objective.sft_shift)
    indices = times.stratified_times(
        key, grid, count, skip_first=objective.skip_first, keep_fraction=objective.keep_fraction,
        by_dt=objective.times == "by_dt",
    )  # fmt: skip
    return jnp.asarray(grid, jnp.float32)[indices]


def _minibatch(batch: TrainBatch, parts: int, index: jax.Array) -> TrainBatch:
    """Every parts-th row, and so rollouts of every group (and, on many devices, of every device)."""
    rows = batch.rows
    if rows % parts:
        raise ValueError(f"objective.minibatches = {parts} does not divide the {rows} rollouts of a step")
    return batch if parts == 1 else _rows(batch, lambda x, axis: _deal(x, axis, parts, index % parts))


def _sum(grads: dict[str, PyTree]) -> PyTree:
    return jax.tree.map(lambda *parts: sum(parts), *grads.values())


def _measures(
    objective: Objective, losses: dict[str, jax.Array], grads: dict[str, PyTree], total: PyTree, changes: PyTree
) -> dict[str, jax.Array]:
    """An update's metrics."""
    seen = {name: value.mean() for name, value in losses.items()}
    if "ratio" in losses:
        clip = objective.awm_clip if objective.rl == "awm" else objective.grpo_clip
        seen["ratio_max"] = losses["ratio"].max()
        seen["clip_fraction"] = (jnp.abs(losses["ratio"] - 1) > clip).mean()
    norms = {name: optax.tree.norm(part) for name, part in grads.items() if name != "both"}
    seen |= {f"{name}_gradient_norm": norm for name, norm in norms.items()}
    if len(norms) == 2:
        seen["anchor_to_rl"] = norms["anchor"] / jnp.maximum(norms["rl"], jnp.finfo(jnp.float32).tiny)
    seen["gradient_norm"] = optax.tree.norm(total)
    seen["update_norm"] = optax.tree.norm(changes)
    return seen


def _step_sums(losses: jax.Array, at: jax.Array, steps: int) -> StepSums:
    """Of losses [jobs r] that were computed at these steps of the sampler."""
    here = at[..., None] == jnp.arange(steps)
    return StepSums(jnp.where(here, losses[..., None], 0.0).sum(axis=(0, 1)), here.sum(axis=(0, 1)))


def _deal(x: jax.Array, axis: int, parts: int, index: jax.Array) -> jax.Array:
    """Every `parts`-th entry along an axis, from the index-th on."""
    shape = x.shape[:axis] + (x.shape[axis] // parts, parts) + x.shape[axis + 1 :]
    return jax.lax.dynamic_index_in_dim(x.reshape(shape), index, axis + 1, keepdims=False)


def _rows(batch: TrainBatch, take: Callable) -> TrainBatch:
    """A part of the batch's rows; `take(array, axis)` cuts along the batch axis."""

    def first(tree):
        return jax.tree.map(lambda x: take(x, 0), tree)

    def second(tree):
        return jax.tree.map(lambda x: take(x, 1), tree)

    return TrainBatch(
        task=first(batch.task),
        solution=first(batch.solution),
        latents=first(batch.latents),
        states=second(batch.states),
        demonstrator=second(batch.demonstrator),
        log_probs=second(batch.log_probs),
        advantages=first(batch.advantages),
        valid=first(batch.valid),
        negative=batch.negative,
    )
