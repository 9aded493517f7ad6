"""Settings of the optimiser of the Executor's weights."""

import dataclasses

from world_distill.settings.objective import Schedule


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser of the Executor's weights.

    Attributes:
      name: adam, adamw or muon.
      learning_rate: a number, or (training step, value) points joined by straight lines.
      weight_decay: of adamw and muon.
      grad_clip: limit of the gradient's global norm.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    name: str = "adamw"
    learning_rate: Schedule = ((0, 1e-4),)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    b2: float = 0.999
    eps: float = 1e-8
