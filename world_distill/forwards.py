"""Compute of a training step in forward passes of the model: what equal compute means, and what a step cost.

A backward pass counts as two forwards. Decoding and judging are not counted. Everything else in a step is a forward of
the same network on one clip, so the count is exact; `tests/test_forwards.py` holds it against the calls that a step
makes.
"""

from world_distill.collection import DISTILL, Collection
from world_distill.objective_settings import Objective, Phase


def per_rollout(objective: Objective, settings: Collection, steps: int, phase: Phase) -> float:
    """Forward passes that one rollout of a training step costs.

    Args:
      objective: settings of the losses.
      settings: settings of the rollouts.
      steps: of the sampler.
      phase: which losses have a weight in the training step.
    """
    objective = objective.in_phase(phase)
    visited, renoised = objective.uses_visited, objective.uses_renoised
    return steps + _shown(objective, settings, steps, phase) + objective.reads * (
        3 * (visited + renoised + (objective.rl == "flow_grpo"))  # the Executor, forward and backward
        + (objective.anchored and objective.anchor_states == "renoised")
        + objective.uses_old_policy
        + renoised * (bool(objective.beta_old) + bool(objective.beta_base))
        + bool(objective.grpo_beta)
    )  # fmt: skip


def per_step(objective: Objective, settings: Collection, steps: int, phase: Phase) -> float:
    """Forward passes that a training step costs: `per_rollout` times its rollouts."""
    return settings.tasks * settings.group * per_rollout(objective, settings, steps, phase)


def shows_all(objective: Objective, settings: Collection, steps: int, phase: Phase) -> bool:
    """Whether the Demonstrator's velocities are made at all states of a rollout, before the updates of a step.

    If not, an update computes them at the states that it reads.
    """
    if rewards_distillation(settings, phase):
        return True
    if not (phase.anchor and objective.uses_visited):
        return False
    # Of its own rollouts they are known; and updates may read more states than there are.
    return settings.role == "demonstrator" or objective.reads >= steps


def rewards_distillation(settings: Collection, phase: Phase) -> bool:
    """Whether Eq. 9 is part of the reward in a step."""
    return phase.rl and settings.weights.get(DISTILL, 0.0) != 0


def _shown(objective: Objective, settings: Collection, steps: int, phase: Phase) -> float:
    """The Demonstrator's forwards at visited states."""
    if settings.role == "demonstrator":
        return 0.0
    if shows_all(objective, settings, steps, phase):
        return steps
    return objective.reads if objective.uses_visited else 0.0
