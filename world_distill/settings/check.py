"""Refuses settings that have no effect together, or that cannot work together, each with its reason."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from world_distill.settings.objective import Objective, last_point
from world_distill.settings.rollout import DISTILL, RolloutSettings


@dataclasses.dataclass(frozen=True)
class _Rule:
    """`broken` says whether the settings break it; `reason` what to do."""

    broken: Callable[[Objective, RolloutSettings], bool | float]
    reason: str


def _rl(objective: Objective, settings: RolloutSettings) -> bool:
    return objective.rl != "none"


RULES = (
    _Rule(
        lambda o, c: _rl(o, c) and c.group < 2,
        "rollout.group = 1 leaves RL nothing to compare: every advantage is 0. Take 2 rollouts a task or more",
    ),
    _Rule(
        lambda o, c: _rl(o, c) and c.min_valid > c.group,
        "rollout.min_valid is above rollout.group, so RL would leave every group out",
    ),
    _Rule(
        lambda o, c: _rl(o, c) and not any(c.weights.values()),
        "every rollout.weights is 0, so RL has no reward: give one a weight, or set objective.rl = none",
    ),
    _Rule(
        lambda o, c: _rl(o, c) and not any(o.phase(step).rl for step in range(last_point(o.rl_weight) + 1)),
        "objective.rl_weight is 0 in every step: set objective.rl = none",
    ),
    _Rule(
        lambda o, c: not o.sft and not all(any(o.phase(step)) for step in range(_settled(o) + 1)),
        "in some training steps neither objective.beta_d nor RL has a weight, so they would learn nothing",
    ),
    _Rule(
        lambda o, c: (o.beta_old or o.beta_base) and o.rl not in ("awm", "nft"),
        "objective.beta_old and objective.beta_base belong to AWM and DiffusionNFT (objective.rl = awm or nft)",
    ),
    _Rule(
        lambda o, c: o.grpo_beta and o.rl != "flow_grpo",
        "objective.grpo_beta belongs to Flow-GRPO (objective.rl = flow_grpo); objective.beta_base is AWM's",
    ),
    _Rule(
        lambda o, c: o.rl == "awm" and o.awm_old == "current" and o.awm_ratio_temperature != 1,
        "objective.awm_ratio_temperature has no effect with objective.awm_old = current: the ratio is 1. Set it to 1",
    ),
    _Rule(
        lambda o, c: o.rl == "flow_grpo" and c.role == "demonstrator",
        "Flow-GRPO needs the Executor's own log-probabilities, and rollout.role = demonstrator rolls the Demonstrator",
    ),
    _Rule(
        lambda o, c: _rl(o, c) and c.weights.get(DISTILL, 0) > 0 and c.role == "demonstrator",
        "Eq. 9 (rollout.weights.distill) is about the Executor's rollouts: with rollout.role = demonstrator it is 0",
    ),
    _Rule(
        lambda o, c: c.guidance > 1 and o.rl == "flow_grpo",
        "rollout.guidance above 1 does not go with objective.rl = flow_grpo: its ratio would compare the Executor's own"
        " velocity with the guided one, which made the step",
    ),
    _Rule(
        lambda o, c: c.distill_min_time > 0 and not c.weights.get(DISTILL, 0),
        "rollout.distill_min_time bounds Eq. 9, which has no weight: set rollout.weights.distill, or the bound to 0",
    ),
    _Rule(
        lambda o, c: c.std_floor > 0 and c.std == "none",
        "rollout.std_floor has no effect with rollout.std = none, which divides by nothing",
    ),
    _Rule(
        lambda o, c: c.staleness and o.rl == "awm" and o.awm_old == "current",
        "rollout.staleness = 1 needs AWM's ratio: set objective.awm_old to start or ema",
    ),
    _Rule(
        lambda o, c: o.times != "index" and not (o.uses_visited or o.uses_renoised or o.sft),
        "objective.times has no effect without an anchor, AWM or DiffusionNFT: Flow-GRPO takes every stochastic step"
        " alike. Set it to index",
    ),
    _Rule(
        lambda o, c: o.sft and _rl(o, c),
        "objective.kind = sft learns from the records' clips, which nobody judges: set objective.rl = none",
    ),
    _Rule(
        lambda o, c: o.sft and o.anchored,
        "objective.kind = sft computes no Demonstrator, so that objective.beta_d has no effect: set it to 0",
    ),
    _Rule(
        lambda o, c: o.sft and c.role == "demonstrator",
        "objective.kind = sft rolls nothing out, so that rollout.role has no effect: set it to executor. To learn from"
        " the Demonstrator's clips, write them first (`world-distill demonstrate`)",
    ),
    _Rule(
        lambda o, c: o.sft and c.staleness > 0,
        "objective.kind = sft rolls nothing out, so that rollout.staleness has no effect: set it to 0",
    ),
    _Rule(
        lambda o, c: o.sft and o.sft_times != "grid" and (o.times != "index" or o.keep_fraction != 1),
        "objective.times and objective.keep_fraction are about the sampler's times: with objective.sft_times other than"
        " grid they have no effect. Set them to index and 1",
    ),
    _Rule(
        lambda o, c: o.sft and o.sft_times == "grid" and o.sft_shift != 1,
        "objective.sft_times = grid takes the sampler's times as they are: set objective.sft_shift = 1",
    ),
    _Rule(
        lambda o, c: not o.sft and (o.sft_times != "uniform" or o.sft_shift != 1 or o.sft_power != 0),
        "objective.sft_times, sft_shift and sft_power belong to objective.kind = sft: leave them at their defaults",
    ),
)


def uses_demonstrator(objective: Objective, settings: RolloutSettings) -> bool:
    """Whether training computes a velocity of the Demonstrator in any step."""
    rewarded = objective.rl != "none" and settings.weights.get(DISTILL, 0.0) != 0
    return objective.anchored or rewarded or settings.role == "demonstrator"


def check(
    objective: Objective,
    settings: RolloutSettings,
    *,
    stochastic: bool,
    guidance: float = 1.0,
    sde: str = "flow_grpo",
    window: Sequence[int] = (),
) -> None:
    """Raises ValueError, with all reasons, where settings go together badly.

    Args:
      objective: settings of the losses.
      settings: settings of the rollouts.
      stochastic: whether the sampler has noise.
      guidance: scale of the Demonstrator's guidance.
      sde: the sampler's stochastic step.
      window: (start, length) of the sampler's stochastic steps.
    """
    reasons = [rule.reason for rule in RULES if rule.broken(objective, settings)]
    if guidance > 1 and not uses_demonstrator(objective, settings):
        reasons.append(
            "demonstrator.guidance has no effect: no loss, reward or rollout of this config uses the Demonstrator"
            " (objective.beta_d, rollout.weights.distill, rollout.role)"
        )
    if stochastic and objective.rl != "flow_grpo":
        reasons.append("sampler.eta above 0 is for objective.rl = flow_grpo; the others sample the ODE")
    if not stochastic and objective.rl == "flow_grpo":
        reasons.append("objective.rl = flow_grpo needs stochastic steps: set sampler.eta above 0 (its authors: 0.7)")
    if not stochastic and sde != "flow_grpo":
        reasons.append(f"sampler.sde = {sde} has no effect without noise: set sampler.eta above 0, or sde = flow_grpo")
    if not stochastic and window:
        reasons.append(f"sampler.window = {tuple(window)} has no effect without noise: set sampler.eta above 0, or ()")
    if reasons:
        raise ValueError("settings that do not go together:\n  " + "\n  ".join(reasons))


def check_noise(times: np.ndarray, stds: np.ndarray, *, eta: float) -> None:
    """Raises ValueError where the noise of a step is above the noise level that it lands on.

    For grids that are listed (`sampler.explicit`): the model was distilled for these noise levels and knows no other.
    A grid of steps and shift, whose model knows all levels, is not looked at: Flow-GRPO's own setting (eta 0.7, ten
    steps, shift 3) has such a step at low noise.

    Args:
      times: the sampler's grid [k + 1].
      stds: standard deviations of its steps [k], see `sampling.step_stds`; 0 where a step has no noise.
      eta: `sampler.eta`.
    """
    levels = np.asarray(times[1:], np.float64)
    # CPS's greatest std is the level itself, rounded to float32.
    loud = np.flatnonzero(stds > levels * (1 + 1e-6))
    if not len(loud):
        return
    noisy = stds > 0
    most = np.floor(100 * eta * np.min(levels[noisy] / stds[noisy])) / 100  # the std is proportional to eta
    steps = "\n".join(f"    step {i}: std {stds[i]:.3g}, t_next {levels[i]:.3g}" for i in loud)
    raise ValueError(
        f"with sampler.eta = {eta:g}, steps of sampler.explicit (counted from 0) add noise above the noise level t_next"
        f" that they land on:\n{steps}\n  Set sampler.eta to {most:g} or less, set sampler.sde = cps, whose noise is"
        " never above it, or leave these steps out of sampler.window"
    )


def _settled(objective: Objective) -> int:
    """The step from which on both schedules are constant."""
    return max(last_point(objective.beta_d), last_point(objective.rl_weight))
