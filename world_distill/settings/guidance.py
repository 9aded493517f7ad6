"""Settings of classifier-free guidance in training and evaluation, and the negative text that a record set brings.

    who                         told      scale
    Demonstrator                solution  demonstrator.guidance: target of the anchor, Eq. 9, its rollouts and clips
    Executor that is sampled    task      rollout.guidance: rollouts in training, clips at evaluation; the base, too
    Executor that is trained    task      none: all its losses take its own velocity

So with demonstrator.guidance above 1 and rollout.guidance at 1 the Executor learns to make without guidance what the
Demonstrator makes with it. `core.guidance` has the formula; a velocity with guidance costs two forward passes.
"""

import dataclasses
import math

from world_distill.errors import UserError


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Scales, at least 1 (no guidance), and the text that guidance leads away from.

    Attributes:
      demonstrator: of the Demonstrator, wherever it is computed.
      rollout: of the Executor where it is sampled.
      negative: one text for both.
    """

    demonstrator: float = 1.0
    rollout: float = 1.0
    negative: str = ""

    def __post_init__(self):
        for name, scale in (("demonstrator", self.demonstrator), ("rollout", self.rollout)):
            if not 1 <= scale < math.inf:
                raise ValueError(f"{name}.guidance is at least 1, which is no guidance, and finite; got {scale}")
        if self.negative and not self.used:
            raise ValueError(
                "demonstrator.negative has no effect without guidance: empty it (--config.demonstrator.negative=), or "
                "set demonstrator.guidance or rollout.guidance above 1"
            )

    @classmethod
    def of(cls, config) -> "Guidance":
        """Of a config's sections `demonstrator` and `rollout`.

        Raises:
          UserError: the config is of an earlier version, which knew no guidance.
          ValueError: settings that do not go together.
        """
        if "demonstrator" not in config or "guidance" not in config.rollout:
            raise UserError("the config lacks demonstrator.guidance, demonstrator.negative or rollout.guidance")
        section = config.demonstrator
        return cls(float(section.guidance), float(config.rollout.guidance), section.negative)

    @property
    def used(self) -> bool:
        """Whether any velocity is guided, so that the states of the negative text are needed."""
        return self.demonstrator > 1 or self.rollout > 1

    def scale(self, text: str) -> float:
        """Of clips at evaluation: of the Demonstrator, told the "solution", or of whoever is told the "task"."""
        return {"solution": self.demonstrator, "task": self.rollout}[text]
