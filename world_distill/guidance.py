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

import jax
import numpy as np

from world_distill import hosts
from world_distill.config import UserError
from world_distill.data.negative import NegativeText, negative_path, read_negative
from world_distill.data.pipeline import pad_texts
from world_distill.data.records import RecordError, RecordReader
from world_distill.sharding import replicated
from world_distill.structs import Negative


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


def load_negative(
    reader: RecordReader, guidance: Guidance, text_length: int, mesh: jax.sharding.Mesh
) -> Negative | None:
    """The states of the config's negative text, from beside the records, on every device; None without guidance.

    Raises:
      RecordError: the records have no negative text, another one, or one that does not fit them.
    """
    if not guidance.used:
        return None
    kept = _kept(reader, guidance.negative, text_length)
    hosts.agree("negative text", kept.fingerprint)
    states, mask = pad_texts([kept.states], text_length)
    place = lambda x: hosts.place(x[0], replicated(mesh))  # noqa: E731
    return Negative(place(states), place(mask))


def _kept(reader: RecordReader, text: str, text_length: int) -> NegativeText:
    folder, name = reader.index_path.parent, reader.index_path.stem
    path, kept = negative_path(folder, name), read_negative(folder, name)
    again = (
        "call `world-distill encode` with the flags that the records were encoded with and the config of this run, "
        "which keeps the records and encodes the negative text"
    )
    if kept is None:
        raise RecordError(f"guidance needs the states of a negative text, and there is no {path}: {again}")
    if kept.text != text:
        raise RecordError(
            f"{path} is of the negative text {kept.text!r}, and config.demonstrator.negative is {text!r}: {again}"
        )
    encoder, states = reader.metadata.get("text_encoder", ""), reader[0].task_text
    if kept.text_encoder != encoder or kept.states.shape[1] != states.shape[1] or kept.states.dtype != states.dtype:
        raise RecordError(
            f"{path} has states by text encoder {kept.text_encoder!r} ({kept.states.shape[1]} wide, "
            f"{kept.states.dtype}), the records by {encoder!r} ({states.shape[1]} wide, {states.dtype}): {again}"
        )
    if len(kept.states) > text_length:
        raise RecordError(
            f"the negative text in {path} has {len(kept.states)} tokens, and text_length is {text_length}: raise it"
        )
    return kept


def abstract_negative(guidance: Guidance, text_length: int, width: int, dtype, mesh) -> Negative | None:
    """Shapes and shardings of `load_negative`'s result."""
    if not guidance.used:
        return None
    make = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=replicated(mesh))  # noqa: E731
    return Negative(make((text_length, width), dtype), make((text_length,), np.bool_))
