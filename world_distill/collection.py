"""Settings of a batch of experience: how many rollouts, by whom, and how their rewards become advantages."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from world_distill.data.pipeline import Batch, concatenate

DISTILL = "distill"  # the reward of Eq. 9, which no judge gives


@dataclasses.dataclass(frozen=True)
class Collection:
    """Settings of a batch of experience.

    Attributes:
      tasks: tasks in a step.
      group: rollouts of each task.
      spread: while L_RL has no weight, give each of the `tasks` x `group` rollouts a task of its own: RL compares
        rollouts of one task, distillation learns the more from different ones.
      micro_batch: rollouts on their way at once, over all devices; 0: all of a step.
      staleness: 1: a step's clips are rolled before the update of the step before, so that the device need not wait
        for the judge (`experience`); 0: exactly on-policy.
      role: who rolls: "executor" (on-policy) or "demonstrator" (off-policy distillation).
      weights: reward name -> lambda of Eq. 10; questions of the rubric, and "distill" for Eq. 9. 0 leaves one out.
      distill_min_time: Eq. 9 is integrated over t from here to 1; 0 is the paper's integral.
      clip: log-odds are clipped to +-clip before anything else; 0 does not clip.
      normalise: divide each reward by its std over the "batch" or the "group", or by nothing ("none").
      std: what the advantage is divided by: std of the "batch" or of the "group", or nothing ("none").
      std_floor: least std that is divided by, in the unit of the weighted rewards.
      min_valid: groups with fewer valid judgments are left out.
      max_invalid: share of a step's clips without a judgment above which the run stops.
      negative_scale: factor on negative advantages; below 1 is steadier and learns less from failures.

    Raises:
      ValueError: a value out of its range.
    """

    tasks: int
    group: int
    spread: bool
    micro_batch: int
    staleness: int
    role: str
    weights: Mapping[str, float]
    distill_min_time: float
    clip: float
    normalise: str
    std: str
    std_floor: float
    min_valid: int
    max_invalid: float
    negative_scale: float

    def __post_init__(self):
        if self.role not in ("executor", "demonstrator"):
            raise ValueError(f"rollout.role must be executor or demonstrator, got {self.role!r}")
        if self.tasks < 1 or self.group < 1:
            raise ValueError(f"rollout.tasks and rollout.group are at least 1, got {self.tasks} and {self.group}")
        if self.staleness not in (0, 1) or not 0 <= self.max_invalid <= 1:
            raise ValueError(
                f"rollout.staleness is 0 or 1 and rollout.max_invalid 0 to 1, got {self.staleness}, {self.max_invalid}"
            )
        for field in ("normalise", "std"):
            if getattr(self, field) not in ("batch", "group", "none"):
                raise ValueError(f"rollout.{field} must be batch, group or none, got {getattr(self, field)!r}")
        amounts = {f"weights.{name}": weight for name, weight in self.weights.items()}
        amounts |= {name: getattr(self, name) for name in ("clip", "std_floor", "negative_scale", "micro_batch")}
        for name, value in amounts.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"rollout.{name} must not be negative, got {value}")
        if self.min_valid < 1 or not 0 <= self.distill_min_time < 1:
            raise ValueError(
                "rollout.min_valid is at least 1 and rollout.distill_min_time a time from 0 to below 1, got "
                f"{self.min_valid}, {self.distill_min_time}"
            )

    @property
    def questions(self) -> tuple[str, ...]:
        """Questions that the judge has to answer."""
        return tuple(name for name, weight in self.weights.items() if weight and name != DISTILL)

    def group_in(self, active: bool) -> int:
        """Rollouts of each task in a step in which L_RL has a weight (`active`) or has none."""
        return 1 if self.spread and not active else self.group

    def draw(self, batches: Iterator[Batch], active: bool) -> Batch:
        """The tasks of such a step, from batches of `tasks` tasks."""
        return concatenate([next(batches) for _ in range(self.group // self.group_in(active))])
