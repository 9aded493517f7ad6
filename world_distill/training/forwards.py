"""Compute of a training step in forward passes of the model: what equal compute means, and what a step cost.

A backward pass counts as two forwards, and so does a velocity with guidance. Decoding and judging are not counted.
Everything else in a step is a forward of the same network on one clip, so the count is exact:
`tests/training/test_forwards.py` compares it with the calls that a step makes.
"""

from world_distill.settings.objective import Objective, Phase
from world_distill.settings.rollout import DISTILL, RolloutSettings


def per_rollout(
    objective: Objective, settings: RolloutSettings, steps: int, phase: Phase, guidance: float = 1.0
) -> float:
    """Forward passes that one rollout of a training step costs.

    Args:
      objective: settings of the losses.
      settings: settings of the rollouts.
      steps: of the sampler.
      phase: which losses have a weight in the training step.
      guidance: scale of the Demonstrator's guidance.
    """
    if objective.sft:
        return 3 * objective.reads
    shown, rolled = _forwards_of(guidance), _forwards_of(settings.guidance)
    if settings.role == "demonstrator":
        rolled = shown
    objective = objective.in_phase(phase)
    visited, renoised = objective.uses_visited, objective.uses_renoised
    return steps * rolled + shown * _shown(objective, settings, steps, phase) + objective.reads * (
        3 * (visited + renoised + (objective.rl == "flow_grpo"))  # the Executor, forward and backward
        + shown * (objective.anchored and objective.anchor_states == "renoised")
        + objective.uses_old_policy
        + renoised * (bool(objective.beta_old) + bool(objective.beta_base))
        + bool(objective.grpo_beta)
    )  # fmt: skip


def per_step(objective: Objective, settings: RolloutSettings, steps: int, phase: Phase, guidance: float = 1.0) -> float:
    """Forward passes that a training step costs: `per_rollout` times its rollouts."""
    return settings.tasks * settings.group * per_rollout(objective, settings, steps, phase, guidance)


def demonstrates_all(objective: Objective, settings: RolloutSettings, steps: int, phase: Phase) -> bool:
    """Whether the Demonstrator's velocities are made at all states of a rollout, before the updates of a step.

    If not, an update computes them at the states that it reads.
    """
    if rewards_distillation(settings, phase):
        return True
    if not (phase.anchor and objective.uses_visited):
        return False
    # Of its own rollouts they are known; and updates may read more states than there are.
    return settings.role == "demonstrator" or objective.reads >= steps


def rewards_distillation(settings: RolloutSettings, phase: Phase) -> bool:
    """Whether Eq. 9 is part of the reward in a step."""
    return phase.rl and settings.weights.get(DISTILL, 0.0) != 0


def _forwards_of(scale: float) -> int:
    """Forward passes of a velocity with guidance of this scale."""
    return 2 if scale > 1 else 1


def _shown(objective: Objective, settings: RolloutSettings, steps: int, phase: Phase) -> float:
    """Visited states at which the Demonstrator's velocity is computed."""
    if settings.role == "demonstrator":
        return 0.0
    if demonstrates_all(objective, settings, steps, phase):
        return steps
    return objective.reads if objective.uses_visited else 0.0
