"""The RL and distillation step as one pure function: (state, base, batch) -> (state, metrics).

    L = w_RL L_RL + beta_d L_anchor [+ beta_old |v_E - v_old|^2] [+ beta_base |v_E - v_base|^2]

L_anchor is WMSD's Eq. 11 (on visited states) or the same on re-noised clips; L_RL is AWM or Flow-GRPO; both are in
`core/losses.py`. Every variant of the paper is a setting: without L_RL this is on-policy distillation, with rollouts of
the Demonstrator (see `collect.py`) it is off-policy distillation, with beta_d = 0 RL alone. `beta_d` and `rl_weight`
may be schedules over training steps.

One step makes `updates` optimiser updates on one batch of rollouts, each on one of `minibatches` parts of the rows and
from `draws` random times (one gradient accumulation each, and one per micro-batch of rows). Large models on many chips
take the whole batch at one time after another, as AWM does; small ones learn faster from many updates on few rows
whose times are spread over the grid (`tied`). All randomness comes from fold_in(state.key, state.step).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from world_distill.core import flow, losses, metrics, sampling, schedules, times
from world_distill.core.guidance import with_guidance
from world_distill.interfaces import ModelFamily
from world_distill.structs import PyTree, TrainBatch, TrainState

Schedule = float | tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Settings of a training step.

    Attributes:
      rl: "awm", "flow_grpo" or "none".
      rl_weight: weight of L_RL; a number, or (step, value) points joined by straight lines.
      beta_d: weight of the anchor; likewise.
      anchor_states: "visited" (states of the rollout) or "renoised" (the AWM states; one forward serves both losses).
      anchor_loss: "mse" (Eq. 11) or "decoupled" (length and direction apart, see `losses.decoupled_gap`).
      updates: optimiser updates on one batch of rollouts.
      minibatches: parts that the rows are dealt out to; each update takes the next one, with rollouts of every group.
      draws: random times in one update, for each row.
      tied: neighbouring rows of an update that share their times; 0: all. Rows of one group should: what their losses
        have in common at one time cancels in a policy gradient.
      micro_batch: rows in one forward; 0 takes all.
      skip_first, keep_fraction: which part of the sampler's grid AWM's times are drawn from.
      awm_weighting, awm_power: see `losses.awm_log_likelihood`.
      awm_clip, awm_temperature: clip range of the ratio, and what divides its logarithm.
      awm_old: policy in the ratio's denominator: "current" (ratio 1, plain gradient; exact with one update per batch),
        "start" (the policy that made the rollouts, a step ago where they run ahead) or "ema" (the fast average
        `lora_old`).
      beta_old: weight of the squared distance to `lora_old`; its decay is min(old_maximum, old_slope step).
      beta_base: weight of the squared distance to the base given the task.
      grpo_clip, grpo_beta: Flow-GRPO's clip range, and weight of its exact KL to the base given the task.
      ema_decay: of `lora_ema`, per update, warmed up as min(ema_decay, (1 + n) / (10 + n)).
    """

    rl: str
    rl_weight: Schedule
    beta_d: Schedule
    anchor_states: str
    anchor_loss: str
    updates: int
    minibatches: int
    draws: int
    tied: int
    micro_batch: int
    skip_first: bool
    keep_fraction: float
    awm_weighting: str
    awm_power: float
    awm_clip: float
    awm_temperature: float
    awm_old: str
    beta_old: float
    old_slope: float
    old_maximum: float
    beta_base: float
    grpo_clip: float
    grpo_beta: float
    ema_decay: float

    def __post_init__(self):
        for field, allowed in {
            "rl": ("awm", "flow_grpo", "none"),
            "anchor_states": ("visited", "renoised"),
            "anchor_loss": ("mse", "decoupled"),
            "awm_old": ("current", "start", "ema"),
        }.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"objective.{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field, least in {"updates": 1, "minibatches": 1, "draws": 1, "tied": 0, "micro_batch": 0}.items():
            if getattr(self, field) < least:
                raise ValueError(f"objective.{field} must be at least {least}, got {getattr(self, field)}")

    def rl_active(self, step: int) -> bool:
        """Whether L_RL has a weight in this training step: if not, nothing needs to be judged."""
        if self.rl == "none":
            return False
        points = self.rl_weight if np.ndim(self.rl_weight) else [(0, self.rl_weight)]
        # By NumPy: an operation of JAX would wait for the device, which is busy with the step before.
        return bool(np.interp(step, *np.transpose(points)) != 0)

    @property
    def anchored(self) -> bool:
        """Whether the anchor ever has a weight."""
        weights = [weight for _, weight in self.beta_d] if np.ndim(self.beta_d) else [self.beta_d]
        return any(weights)

    @property
    def uses_visited(self) -> bool:
        """Whether the step reads the rollout's states and the Demonstrator's velocities there."""
        return self.anchor_states == "visited" and self.anchored

    @property
    def uses_renoised(self) -> bool:
        """Whether the step looks at the rollouts' clips noised anew."""
        return self.rl == "awm" or (self.anchor_states == "renoised" and self.anchored)


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


def make_train_step(
    family: ModelFamily,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    grid: np.ndarray,
    diffusion: np.ndarray | None = None,
    guidance: float = 1.0,
) -> Callable[[TrainState, PyTree, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step for one sampler grid [k + 1] (and its diffusion coefficients [k], for Flow-GRPO).

    `guidance` is the scale of the Demonstrator, who leads away from `TrainBatch.negative`. Every other velocity of the
    losses, the base's given the task too, is without guidance.

    Raises:
      ValueError: Flow-GRPO without stochastic steps.
    """
    if objective.rl == "flow_grpo" and (diffusion is None or not np.any(diffusion)):
        raise ValueError("objective.rl = flow_grpo needs stochastic steps: set sampler.eta above 0")
    mask = family.free_frames
    grid = jnp.asarray(grid, jnp.float32)
    stochastic = np.flatnonzero(diffusion) if diffusion is not None else np.arange(0)
    beta_d = schedules.piecewise_linear(objective.beta_d)
    rl_weight = schedules.piecewise_linear(objective.rl_weight)
    gap = losses.velocity_gap if objective.anchor_loss == "mse" else losses.decoupled_gap

    def anchor_terms(v, v_d):
        return gap(v, v_d, mask), metrics.velocity_diagnostics(v, v_d, mask)

    def frames_at(values, at):
        """Latents [b f h w c] of [k b f p], each row's at its own index."""
        return _each(values, at).reshape(-1, *family.latent_shape)

    # The losses of one draw of times, by the pass of the Executor that they are made of. Each function gives their
    # weighted sum over rows, and them [rows] by name; `at` is an array [rows] of indices of the grid.

    def on_visited(lora, base, others, rows: TrainBatch, key, at, weights):
        """The anchor on the rollout's states."""
        v = family.denoise(base, lora, frames_at(rows.states, at), grid[at], rows.task)
        return total({}, weights, rows, anchor=anchor_terms(v, frames_at(rows.demonstrator, at)))

    def on_renoised(lora, base, others, rows: TrainBatch, key, at, weights):
        """AWM, anchors on the same noised clips."""
        start, old = others
        t = grid[at]
        eps = sampling.initial_noise(key, rows.task.scene, family.latent_shape, mask)
        x_t = flow.interpolate(rows.latents, eps, t)
        x_t = sampling.pin_frames(x_t, rows.task.scene, mask)

        def v_of(weights_):
            return family.denoise(base, weights_, x_t, t, rows.task)

        v = v_of(lora)
        out, anchor = {}, None
        if objective.anchor_states == "renoised" and objective.anchored:
            demonstrate = with_guidance(family.denoise, guidance, rows.negative)
            anchor = anchor_terms(v, jax.lax.stop_gradient(demonstrate(base, None, x_t, t, rows.solution)))
        if objective.rl == "awm":
            target = flow.velocity(rows.latents, eps)

            def likelihood(velocity):
                m = losses.velocity_gap(velocity, target, mask)
                return losses.awm_log_likelihood(m, t, objective.awm_weighting, objective.awm_power)

            new = likelihood(v)
            reference = {"current": lambda: new, "start": lambda: likelihood(v_of(start)),
                         "ema": lambda: likelihood(v_of(old))}[objective.awm_old]()  # fmt: skip
            out["rl"], out["ratio"] = losses.awm_surrogate(
                new, reference, rows.advantages, objective.awm_clip, objective.awm_temperature
            )
        if objective.beta_old:
            out["old"] = losses.velocity_gap(v, v_of(old), mask)
        if objective.beta_base:
            out["base"] = losses.velocity_gap(v, v_of(None), mask)
        return total(out, weights, rows, anchor=anchor)

    def on_steps(lora, base, others, rows: TrainBatch, key, at, weights):
        """Flow-GRPO on the sampler's steps."""
        t, t_next = grid[at], grid[at + 1]
        g = jnp.asarray(diffusion, jnp.float32)[at]
        x, x_next = frames_at(rows.states, at), frames_at(rows.states, at + 1)
        v = family.denoise(base, lora, x, t, rows.task)
        _, mean, std = sampling.sde_step(x, v, t, t_next, g, None)
        log_prob = sampling.gaussian_log_prob(x_next, mean, std, mask)
        out = {}
        out["rl"], out["ratio"] = losses.flow_grpo_surrogate(
            log_prob, _each(rows.log_probs, at), rows.advantages, objective.grpo_clip
        )
        if objective.grpo_beta:
            v_base = jax.lax.stop_gradient(family.denoise(base, None, x, t, rows.task))
            _, mean_base, _ = sampling.sde_step(x, v_base, t, t_next, g, None)
            out["kl"] = losses.flow_grpo_kl(mean, mean_base, std, mask)
        return total(out, weights, rows)

    def total(out, weights, rows: TrainBatch, anchor=None):
        if anchor is not None:
            out["anchor"], diagnostics = anchor
            out |= {f"velocity_{name}": value for name, value in diagnostics.items()}
        # The anchor needs no judgment.
        factors = {
            "old": objective.beta_old, "base": objective.beta_base, "kl": objective.grpo_beta,
            "anchor": weights["beta_d"], "rl": weights["rl"] * rows.valid.astype(jnp.float32),
        }  # fmt: skip
        return sum(factor * out[name] for name, factor in factors.items() if name in out).sum(), out

    passes = [
        jax.grad(function, has_aux=True) if used else None
        for function, used in (
            (on_visited, objective.uses_visited),
            (on_renoised, objective.uses_renoised),
            (on_steps, objective.rl == "flow_grpo"),
        )
    ]

    def gradient(lora, base, others, rows: TrainBatch, key, indices, weights):
        """Of the sum of all losses; `indices` are three arrays [rows], of visited states, re-noised ones and steps."""
        grads, out = None, {}
        for one_pass, at in zip(passes, indices, strict=True):
            if one_pass is None:
                continue
            if grads is not None:
                # One after the other, so that only one pass's activations are in memory.
                lora, grads = jax.lax.optimization_barrier((lora, grads))
            more, seen = one_pass(lora, base, others, rows, key, at, weights)
            grads = more if grads is None else jax.tree.map(jnp.add, grads, more)
            out |= seen
        return grads, out

    def draw_times(keys, rows: int):
        """Grid indices [draws rows] of visited states, of re-noised states and of stochastic sampler steps."""
        draws, tied = objective.draws, objective.tied or rows
        if rows % tied:
            raise ValueError(f"objective.tied = {tied} does not divide the {rows} rollouts of an update")
        blocks = rows // tied
        count = draws * blocks

        def spread(key, indices):
            # Strata rise with their number: dealt out in order, one task would only ever see noise.
            indices = jax.random.permutation(key, indices) if blocks > 1 else indices
            return jnp.repeat(indices.reshape(draws, blocks), tied, axis=1)

        visited = times.stratified_times(keys[0], grid, count, skip_first=False, keep_fraction=1.0)
        visited = renoised = spread(keys[1], visited)
        if objective.uses_renoised:
            renoised = times.stratified_times(
                keys[2], grid, count, skip_first=objective.skip_first, keep_fraction=objective.keep_fraction
            )
            renoised = spread(keys[3], renoised)
        steps = stochastic if len(stochastic) else np.arange(grid.shape[0] - 1)
        chosen = jnp.resize(jax.random.permutation(keys[4], jnp.asarray(steps)), (count,))
        return visited, renoised, spread(keys[5], chosen)

    def update(carry, job, base, batch: TrainBatch, start, old, weights):
        lora, lora_ema, opt_state, count = carry
        key, index = job
        rows, parts = batch.advantages.shape[0], objective.minibatches
        if rows % parts:
            raise ValueError(f"objective.minibatches = {parts} does not divide the {rows} rollouts of a step")
        if parts > 1:
            # Every parts-th row, and so rollouts of every group (and, on many devices, of every device).
            batch = _rows(batch, lambda x, axis: _deal(x, axis, parts, index % parts))
            rows //= parts
        micro = objective.micro_batch or rows
        if rows % micro:
            raise ValueError(f"objective.micro_batch = {micro} does not divide the {rows} rollouts of an update")
        draws, pieces = objective.draws, rows // micro
        keys = jax.random.split(key, 7)
        indices = draw_times(keys, rows)
        noise_keys = sampling.sample_keys(keys[6], jnp.arange(rows))

        def one(accumulated, job):
            draw, part = job
            # Rows of every device: neighbours lie on one, and would have to be sent to all the others.
            take = lambda x, axis: _deal(x, axis, pieces, part)  # noqa: E731
            piece = batch if pieces == 1 else _rows(batch, take)
            key = jax.vmap(lambda k: jax.random.fold_in(k, draw))(noise_keys)
            at = tuple(index[draw] for index in indices)
            key, at = (key, at) if pieces == 1 else jax.tree.map(lambda x: take(x, 0), (key, at))
            grads, out = gradient(lora, base, (start, old), piece, key, at, weights)
            return jax.tree.map(jnp.add, accumulated, grads), out

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), lora)
        jobs = (jnp.repeat(jnp.arange(draws), pieces), jnp.tile(jnp.arange(pieces), draws))
        grads, out = jax.lax.scan(one, zeros, jobs)
        grads = jax.tree.map(lambda g: g / (rows * draws), grads)
        changes, opt_state = optimizer.update(grads, opt_state, lora)
        lora = optax.apply_updates(lora, changes)
        decay = jnp.minimum(objective.ema_decay, (1.0 + count) / (10.0 + count))
        lora_ema = schedules.ema_update(lora_ema, lora, decay)
        seen = {name: value.mean() for name, value in out.items()}
        if "ratio" in out:
            clip = objective.awm_clip if objective.rl == "awm" else objective.grpo_clip
            seen["ratio_max"] = out["ratio"].max()
            seen["clip_fraction"] = (jnp.abs(out["ratio"] - 1) > clip).mean()
        seen["gradient_norm"] = optax.tree.norm(grads)
        seen["update_norm"] = optax.tree.norm(changes)
        return (lora, lora_ema, opt_state, count + 1), seen

    def train_step(state: TrainState, base: PyTree, batch: TrainBatch):
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), objective.updates)
        weights = {"beta_d": beta_d(state.step), "rl": rl_weight(state.step)}
        ahead = state.lora_rolled is not None
        start, old = state.lora_rolled if ahead else state.lora, state.lora_old
        carry = (state.lora, state.lora_ema, state.opt_state, state.step * objective.updates)
        jobs = (keys, jnp.arange(objective.updates))
        carry, seen = jax.lax.scan(lambda c, job: update(c, job, base, batch, start, old, weights), carry, jobs)
        lora, lora_ema, opt_state, _ = carry
        step = state.step + 1
        old_decay = schedules.ema_decay_linear(step, objective.old_slope, objective.old_maximum)
        seen = {f"train/{name}": value.mean() for name, value in seen.items()}
        seen |= {f"train/{name}": value for name, value in weights.items()}
        seen["train/lora_norm"] = optax.tree.norm(lora)
        new = TrainState(
            step=step,
            lora=lora,
            lora_ema=lora_ema,
            lora_old=schedules.ema_update(old, lora, old_decay),
            opt_state=opt_state,
            key=state.key,
            lora_rolled=state.lora if ahead else None,
        )
        return new, seen

    return train_step


def _each(values: jax.Array, indices: jax.Array) -> jax.Array:
    """values[indices[b], b] for every row b, of values [k b ...]."""
    return jax.vmap(lambda x, i: x[i], in_axes=(1, 0))(values, indices)


def _deal(x: jax.Array, axis: int, parts: int, index: jax.Array) -> jax.Array:
    """Every `parts`-th entry along an axis, from the index-th on."""
    shape = x.shape[:axis] + (x.shape[axis] // parts, parts) + x.shape[axis + 1 :]
    return jax.lax.dynamic_index_in_dim(x.reshape(shape), index, axis + 1, keepdims=False)


def _rows(batch: TrainBatch, take: Callable) -> TrainBatch:
    """A part of the batch's rows; `take(array, axis)` cuts along the batch axis."""

    def first(tree):
        return jax.tree.map(lambda x: take(x, 0), tree)

    def second(x):
        return None if x is None else take(x, 1)

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
