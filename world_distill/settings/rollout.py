"""Settings of the rollouts of a training step: how many, by whom, and how rewards become advantages."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from world_distill.settings import ranges

DISTILL = "distill"  # the reward of Eq. 9, which no judge gives
WEIGHTS = {"task": 1.0, "agent": 1.0, "consistency": 1.0, DISTILL: 0.0}  # lambdas of Eq. 10, by default


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Rollouts of a training step, and how their rewards become advantages.

    Attributes:
      tasks: tasks of a training step.
      group: rollouts of each task. The paper has 24.
      spread: while L_RL has no weight, give each of the `tasks` x `group` rollouts a task of its own. RL compares
        rollouts of one task; distillation learns more from different tasks.
      role: who makes the rollouts: executor (on-policy) or demonstrator (off-policy distillation).
      micro_batch: rollouts sampled at once, over all devices; 0: all of a step; None: as `sharding.rows_at_once` says.
        With guidance, the network sees twice as many rows.
      guidance: scale of classifier-free guidance of the Executor's clips, in training and evaluation; 1: none.
      staleness: 1 rolls a step's clips before the update of the step before, so that devices need not wait for the
        judge; 0 is exactly on-policy.
      weights: lambda of each reward (Eq. 10): the questions of the rubric, and `distill` for Eq. 9. 0 leaves one out.
      distill_min_time: Eq. 9 is integrated over t from here to 1; 0 is the paper's integral.
      clip: log-odds are clipped to +-clip; 0 does not clip.
      normalise: each reward is divided by its std over the batch, over the group, or by nothing: batch, group or none.
      std: advantages are divided by the std of the batch, of the group, or by nothing: batch, group or none.
      std_floor: least std that advantages are divided by, in the unit of the weighted rewards.
      min_valid: groups with fewer valid judgments are left out.
      max_invalid: share of a step's clips without a judgment, 0 to 1, above which the run stops.
      negative_scale: factor on negative advantages; below 1 is steadier and learns less from failures.

    Raises:
      SettingError: a value out of its range (`settings.ranges`).
    """

    tasks: int = 8
    group: int = 8
    spread: bool = True
    role: str = "executor"
    micro_batch: int | None = 0
    guidance: float = 1.0
    staleness: int = 0
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(WEIGHTS))
    distill_min_time: float = 0.0
    clip: float = 0.0
    normalise: Literal["batch", "group", "none"] = "batch"
    std: Literal["batch", "group", "none"] = "batch"
    std_floor: float = 0.0
    min_valid: int = 2
    max_invalid: float = 0.5
    negative_scale: float = 1.0

    def __post_init__(self):
        ranges.check("rollout", self)

    @property
    def questions(self) -> tuple[str, ...]:
        """Questions that the judge has to answer."""
        return tuple(name for name, weight in self.weights.items() if weight and name != DISTILL)

    def group_in(self, active: bool) -> int:
        """Rollouts of each task in a step in which L_RL has a weight (`active`) or has none."""
        return 1 if self.spread and not active else self.group
