"""Settings of a training step, and in which steps which loss has a weight."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from world_distill.settings import ranges

Schedule = float | tuple[tuple[float, float], ...]


class Phase(NamedTuple):
    """Which losses have a weight in a training step; passes of the others are left out."""

    rl: bool
    anchor: bool


@dataclasses.dataclass(frozen=True)
class Objective:
    """Settings of a training step.

    Weights have the unit of the paper and of the released codes: at `rl_weight` 1 the gradient of AWM before any update
    is that of -A l, averaged over rows with a judgment, whatever the clip range and the temperature are.

    Attributes:
      kind: "wmsd" (the Executor's or the Demonstrator's rollouts, with the losses below) or "sft": supervised
        fine-tuning, plain flow matching on clips that the records bring, told the task. Nothing is rolled out or
        judged, and the Demonstrator is not computed. `world-distill import-videos` and `demonstrate` make such records.
      sft_times: times of fine-tuning: "uniform" in [0, 1]; "logit_normal", the sigmoid of a normal number;
        "stretched", the same over the whole range, as LTX-2's trainer draws them (`core.times`); or "grid", the
        sampler's times, drawn as `times`, `skip_first` and `keep_fraction` say: a distilled model knows no others.
      sft_shift: shift of these times, but for those of the grid; above 1 there is more noise.
      sft_power: fine-tuning weighs the squared velocity error at time t by t to this power. 0 weighs all alike.
      rl: "awm", "nft" (DiffusionNFT), "flow_grpo" or "none".
      rl_weight: weight of L_RL; a number, or (step, value) points joined by straight lines.
      beta_d: weight of the Demonstrator's anchor (WMSD Eq. 12; the paper's best is .01); a number or points, as
        `rl_weight`.
      anchor_states: "visited" (states of the rollout) or "renoised" (RL's re-noised clips; one forward serves both
        losses, and their gradients are not logged apart).
      anchor_loss: "mse" (Eq. 11) or "decoupled" (length and direction apart, see `losses.decoupled_gap`).
      times: how the sampler's times of visited states and of re-noised clips are drawn: "index" (all alike, as in
        Eq. 11 and AWM) or "by_dt" (each by the length of the step from it, as Eq. 9 weighs them). On LTX-2's distilled
        grid the first four of eight steps are half of the draws by index, and 2.5 % by dt.
      updates: optimiser updates on one batch of rollouts.
      minibatches: parts that the rows are dealt out to; each update takes the next one, with rollouts of every group.
      draws: random times in one update, for each row.
      tied: neighbouring rows of an update that share their times; 0: all. Rows of one group should: what their losses
        have in common at one time cancels in a policy gradient.
      micro_batch: rows in one forward; 0 takes all; None: as `sharding.rows_at_once` says.
      skip_first: leave pure noise out of the times of re-noised clips.
      keep_fraction: share of the sampler's grid, noisiest first, that these times are drawn from (for 14 steps: 0.9).
        It counts times, not their distances: 0.9 of 8 leaves out the last one.
      awm_weighting: weight over t of AWM's log-likelihood: uniform, t, t2, huber or ghuber
        (`losses.awm_log_likelihood`).
      awm_power: exponent of ghuber.
      awm_clip: clip range of AWM's ratio.
      awm_ratio_temperature: divides the logarithm of AWM's ratio, so that the clip engages; 1 in the released code. The
        gradient at ratio 1 does not depend on it.
      awm_old: policy in the ratio's denominator: "current" (ratio 1, plain gradient; exact with one update per batch),
        "start" (the policy that made the rollouts, a step ago where they run ahead) or "ema" (the fast average
        `lora_old`).
      nft_beta: how far DiffusionNFT's two implicit policies lie from the old one.
      nft_old: DiffusionNFT's old policy: "start" or "ema", as above.
      beta_old: weight of the squared distance to the fast average of the Executor, a trust region. AWM's authors: 1.
      old_slope: the decay of that average grows by this each step.
      old_maximum: largest decay of that average.
      beta_base: weight of the squared distance to the base given the task.
      grpo_clip: clip range of Flow-GRPO's ratio.
      grpo_beta: weight of Flow-GRPO's exact KL to the base given the task.
      ema_decay: decay, per update, of the slow average of the trained weights, which is evaluated and exported; warmed
        up as min(ema_decay, (1 + n) / (10 + n)).
      log_by_step: log what is computed for each row (losses, ratios, cosines) by the sampler's step, too:
        `train/NAME/step_I`, counted from 0, one more figure for each step.

    Raises:
      SettingError: a value out of its range (`settings.ranges`).
    """

    kind: str = "wmsd"
    sft_times: str = "uniform"
    sft_shift: float = 1.0
    sft_power: float = 0.0
    rl: str = "awm"
    rl_weight: Schedule = ((0, 1.0),)
    beta_d: Schedule = ((0, 0.01),)
    anchor_states: str = "visited"
    anchor_loss: str = "mse"
    times: str = "index"
    updates: int = 4
    minibatches: int = 4
    draws: int = 2
    tied: int = 1
    micro_batch: int | None = 0
    skip_first: bool = True
    keep_fraction: float = 1.0
    awm_weighting: str = "uniform"
    awm_power: float = 0.25
    awm_clip: float = 0.2
    awm_ratio_temperature: float = 0.005
    awm_old: str = "start"
    nft_beta: float = 1.0
    nft_old: str = "start"
    beta_old: float = 0.0
    old_slope: float = 0.001
    old_maximum: float = 0.3
    beta_base: float = 0.0
    grpo_clip: float = 1e-3
    grpo_beta: float = 0.0
    ema_decay: float = 0.98
    log_by_step: bool = False

    def __post_init__(self):
        ranges.check("objective", self)

    def phase(self, step: int) -> Phase:
        """Which losses have a weight in training step `step`."""
        return Phase(rl=self.rl != "none" and _value(self.rl_weight, step) != 0, anchor=_value(self.beta_d, step) != 0)

    def rl_active(self, step: int) -> bool:
        """Whether L_RL has a weight in this training step: if not, nothing needs to be judged."""
        return self.phase(step).rl

    def in_phase(self, phase: Phase) -> "Objective":
        """The objective without what has no weight in the phase."""
        reduced = self if phase.anchor else dataclasses.replace(self, beta_d=0.0)
        if phase.rl:
            return reduced
        return dataclasses.replace(reduced, rl="none", beta_old=0.0, beta_base=0.0, grpo_beta=0.0)

    @property
    def sft(self) -> bool:
        """Whether clips of the records are learnt from, and no rollouts."""
        return self.kind == "sft"

    @property
    def anchored(self) -> bool:
        """Whether the anchor ever has a weight."""
        return any(value for _, value in _points(self.beta_d))

    @property
    def uses_visited(self) -> bool:
        """Whether the step reads the rollout's states and the Demonstrator's velocities there."""
        return self.anchor_states == "visited" and self.anchored

    @property
    def uses_renoised(self) -> bool:
        """Whether the step looks at the rollouts' clips noised anew."""
        return self.rl in ("awm", "nft") or (self.anchor_states == "renoised" and self.anchored)

    @property
    def uses_old_policy(self) -> bool:
        """Whether RL computes the velocity of an older policy."""
        return self.rl == "nft" or (self.rl == "awm" and self.awm_old != "current")

    @property
    def reads(self) -> float:
        """States of a rollout that its updates look at, the same one counted each time."""
        return self.updates * self.draws / self.minibatches


def last_point(schedule: Schedule) -> int:
    """The training step from which on a schedule is constant."""
    return int(_points(schedule)[-1][0])


def _points(schedule: Schedule) -> Sequence[tuple[float, float]]:
    points: Any = schedule if np.ndim(schedule) else [(0, schedule)]
    return points


def _value(schedule: Schedule, step: int) -> float:
    # By NumPy: an operation of JAX would wait for the device, which is busy with the step before.
    return float(np.interp(step, *np.transpose(_points(schedule))))
