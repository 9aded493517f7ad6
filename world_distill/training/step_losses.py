"""The losses of one draw of times, by the pass of the Executor that they share.

    anchor on visited states    |v_E - v_D|^2 on states of the rollout (WMSD Eq. 11)
    RL on re-noised clips       AWM or DiffusionNFT on x_t = (1 - t) x_0 + t eps; the anchor too, if it looks there
    RL on sampler steps         Flow-GRPO on the stochastic steps of the rollout
    fine-tuning                 flow matching on the records' clips, in place of all of these

Every function returns the weighted sum of its losses over rows, and the losses [r] by name. The optimiser step divides
the sum by the number of rows. RL's losses are weighted so that this makes them a mean over rows with a judgment; the
others need no judgment and are means over all rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.core import flow, losses, metrics, sampling
from world_distill.core.guidance import with_guidance
from world_distill.interfaces import ModelFamily
from world_distill.settings.objective import Objective
from world_distill.structs import Latents, LatentSpec, PyTree, TrainBatch


class Draw(NamedTuple):
    """What one row looks at: indices [r] into the sampler's grid, keys of the noise, weights of RL's losses."""

    keys: jax.Array  # [r] typed PRNG keys
    visited: jax.Array  # [r] int32, of visited states
    renoised: jax.Array  # [r] int32, of re-noised clips
    steps: jax.Array  # [r] int32, of stochastic sampler steps
    judged: jax.Array  # [r] float32: rows / judged rows of the update; 0 without a judgment
    # [r] float32 of fine-tuning, whose times need not be the sampler's; `renoised` is then the step that each lies in.
    times: jax.Array | None = None


class Policies(NamedTuple):
    """Executors that losses compare with."""

    start: PyTree  # that made the rollouts
    old: PyTree  # fast average: the trust region


class Weights(NamedTuple):
    """Weights of the two losses in this training step."""

    beta_d: jax.Array
    rl: jax.Array


class Pass(NamedTuple):
    """(lora, base, policies, rows, draw, weights) -> (weighted sum, losses [r] by name)."""

    name: str  # whose gradient it gives: "anchor", "rl", or "both" where one forward pass serves both
    at: str  # the field of `Draw` that has the steps of the sampler that it looks at
    loss_fn: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of an objective, as pure functions.

    Attributes:
      family: the model.
      objective: settings.
      grid: the sampler's times [k + 1].
      diffusion: its table [k] of `sampling.DIFFUSIONS`, for Flow-GRPO.
      guidance: scale of the Demonstrator's classifier-free guidance; 1: none.
      sde: its stochastic step.
    """

    family: ModelFamily
    objective: Objective
    grid: np.ndarray
    diffusion: np.ndarray | None
    guidance: float = 1.0
    sde: sampling.Sde = "flow_grpo"

    def passes(self) -> list[Pass]:
        """The passes that the objective needs."""
        objective, found = self.objective, []
        if objective.sft:
            return [Pass("sft", "renoised", self.fine_tuning)]
        renoised_anchor = objective.anchored and objective.anchor_states == "renoised"
        if objective.uses_visited:
            found.append(Pass("anchor", "visited", self.anchor_on_visited))
        if objective.rl in ("awm", "nft"):
            found.append(Pass("both" if renoised_anchor else "rl", "renoised", self.on_renoised))
        elif renoised_anchor:
            found.append(Pass("anchor", "renoised", self.on_renoised))
        if objective.rl == "flow_grpo":
            found.append(Pass("rl", "steps", self.flow_grpo_on_steps))
        return found

    def anchor_on_visited(
        self, lora: PyTree, base: PyTree, policies: Policies, rows: TrainBatch, draw: Draw, weights: Weights
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The anchor on the rollout's own states."""
        assert rows.states is not None
        x, t = self._latents(rows.states, draw.visited), self._times(draw.visited)
        v = self.family.denoise(base, lora, x, t, rows.task)
        if rows.demonstrator is None:
            v_d = self._demonstrator(base, x, t, rows)
        else:
            v_d = self._latents(rows.demonstrator, draw.visited)
        return self._total(self._anchor(v, v_d), weights, draw)

    def on_renoised(
        self, lora: PyTree, base: PyTree, policies: Policies, rows: TrainBatch, draw: Draw, weights: Weights
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """AWM or DiffusionNFT, and all anchors that look at re-noised clips."""
        objective, mask = self.objective, self._counts
        t = self._times(draw.renoised)
        x_t, target = self._noised(rows, draw, t)

        def executor(weights_):
            return self.family.denoise(base, weights_, x_t, t, rows.task)

        v, out = executor(lora), {}
        if objective.anchored and objective.anchor_states == "renoised":
            out |= self._anchor(v, self._demonstrator(base, x_t, t, rows))
        if objective.rl == "awm":
            out |= self._awm(v, target, t, rows.advantages, lambda: executor(self._old_policy(policies)))
        elif objective.rl == "nft":
            v_old = executor(self._old_policy(policies))
            assert rows.advantages is not None
            out["rl"] = losses.nft_loss(v, v_old, target, t, rows.advantages, objective.nft_beta, mask)
            out["policy_gap"] = losses.velocity_gap(v, v_old, mask)
        if objective.beta_old:
            out["old"] = losses.velocity_gap(v, executor(policies.old), mask)
        if objective.beta_base:
            out["base"] = losses.velocity_gap(v, executor(None), mask)
        return self._total(out, weights, draw)

    def fine_tuning(
        self, lora: PyTree, base: PyTree, policies: Policies, rows: TrainBatch, draw: Draw, weights: Weights
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Flow matching on the records' clips: t^p |v_E - (eps - x_0)|^2, the scene pinned as in sampling."""
        assert draw.times is not None  # `draw_rows` draws them
        x_t, target = self._noised(rows, draw, draw.times)
        v = self.family.denoise(base, lora, x_t, draw.times, rows.task)
        gap = losses.velocity_gap(v, target, self._counts)
        return (draw.times**self.objective.sft_power * gap).sum(), {"sft": gap}

    def flow_grpo_on_steps(
        self, lora: PyTree, base: PyTree, policies: Policies, rows: TrainBatch, draw: Draw, weights: Weights
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Flow-GRPO on the rollout's own stochastic steps, with its exact KL to the base told the task."""
        assert rows.states is not None and rows.log_probs is not None and rows.advantages is not None
        objective, at, mask = self.objective, draw.steps, self._counts
        t, t_next = self._times(at), self._times(at + 1)
        g = jnp.asarray(self.diffusion, jnp.float32)[at]
        x, x_next = self._latents(rows.states, at), self._latents(rows.states, at + 1)
        v = self.family.denoise(base, lora, x, t, rows.task)
        _, mean, std = sampling.sde_step(x, v, t, t_next, g, None, sde=self.sde)
        log_prob = sampling.step_log_prob(x_next, mean, std, mask, self.sde)
        out = {}
        out["rl"], out["ratio"] = losses.flow_grpo_surrogate(
            log_prob, each(rows.log_probs, at), rows.advantages, objective.grpo_clip
        )
        if objective.grpo_beta:
            v_base = jax.lax.stop_gradient(self.family.denoise(base, None, x, t, rows.task))
            _, mean_base, _ = sampling.sde_step(x, v_base, t, t_next, g, None, sde=self.sde)
            out["kl"] = losses.flow_grpo_kl(mean, mean_base, std, mask)
        return self._total(out, weights, draw)

    def _noised(self, rows: TrainBatch, draw: Draw, t: jax.Array) -> tuple[Latents, Latents]:
        """(clips with fresh noise at times t [r], the scene pinned; the velocities eps - x_0 that lead there)."""
        streams = self.family.latents
        eps = sampling.initial_noise(draw.keys, rows.task.scene, streams)
        x_t = sampling.pin(flow.interpolate(rows.latents, eps, t), rows.task.scene, streams)
        return x_t, flow.velocity(rows.latents, eps)

    def _awm(self, v, target, t, advantages, v_old: Callable[[], Latents]) -> dict[str, jax.Array]:
        objective, mask = self.objective, self._counts

        def likelihood(velocity):
            m = losses.velocity_gap(velocity, target, mask)
            return losses.awm_log_likelihood(m, t, objective.awm_weighting, objective.awm_power)

        new = likelihood(v)
        # With the current policy for the old one the ratio is 1, and nothing has to be computed for it.
        old = new if objective.awm_old == "current" else likelihood(v_old())
        loss, ratio = losses.awm_surrogate(new, old, advantages, objective.awm_clip, objective.awm_ratio_temperature)
        return {"rl": loss, "ratio": ratio}

    def _old_policy(self, policies: Policies) -> PyTree:
        named = self.objective.awm_old if self.objective.rl == "awm" else self.objective.nft_old
        return policies.old if named == "ema" else policies.start

    def _demonstrator(self, base: PyTree, x_t: Latents, t: jax.Array, rows: TrainBatch) -> Latents:
        """The Demonstrator's velocity [r n ...], without gradient."""
        demonstrate = with_guidance(self.family.denoise, self.guidance, rows.negative)
        return jax.lax.stop_gradient(demonstrate(base, None, x_t, t, rows.solution))

    def _anchor(self, v: Latents, v_d: Latents) -> dict[str, jax.Array]:
        mask = self._counts
        gap = losses.velocity_gap if self.objective.anchor_loss == "mse" else losses.decoupled_gap
        diagnostics = metrics.velocity_diagnostics(v, v_d, mask)
        return {"anchor": gap(v, v_d, mask)} | {f"velocity_{name}": value for name, value in diagnostics.items()}

    def _total(self, out: dict[str, jax.Array], weights: Weights, draw: Draw) -> tuple[jax.Array, dict]:
        if "rl" in out:
            out["rl"] = draw.judged * out["rl"]
        factors = {
            "anchor": weights.beta_d, "rl": weights.rl, "old": self.objective.beta_old,
            "base": self.objective.beta_base, "kl": self.objective.grpo_beta,
        }  # fmt: skip
        total: Any = sum(factor * out[name] for name, factor in factors.items() if name in out)
        return total.sum(), out

    def _times(self, at: jax.Array) -> jax.Array:
        return jnp.asarray(self.grid, jnp.float32)[at]

    @property
    def _counts(self) -> dict[str, np.ndarray]:
        return sampling.counted(self.family.latents)

    def _latents(self, values: Latents, at: jax.Array) -> Latents:
        """Latents [r n ...] of values [k r n p], each row's at its own index."""
        return in_shape({name: each(x, at) for name, x in values.items()}, self.family.latents)


def in_shape(values: Latents, streams: Mapping[str, LatentSpec]) -> dict[str, jax.Array]:
    """Latents [... n ...] of the flat form in which they are kept, [... n p]."""
    return {name: values[name].reshape(*values[name].shape[:-2], *spec.shape) for name, spec in streams.items()}


def each(values: jax.Array, indices: jax.Array) -> jax.Array:
    """values[indices[r], r] for every row r, of values [k r ...]."""
    return jax.vmap(lambda x, i: x[i], in_axes=(1, 0))(values, indices)
