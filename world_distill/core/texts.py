"""The part of a forward pass that reads the texts alone, made once for all steps of a sampler."""

import dataclasses
from collections.abc import Callable

import jax

from world_distill.structs import Condition, Texts


def read_once(
    read: Callable[[Texts], Texts], condition: Condition, negative: Texts | None = None
) -> tuple[Condition, Texts | None]:
    """The condition and the negative text with texts as `denoise` takes them at every step (traceable).

    Args:
      read: `ModelFamily.read_texts` with the base.
      condition: with texts of encoded records.
      negative: the negative text without a batch axis, or None.
    """
    condition = dataclasses.replace(condition, text=read(condition.text))
    if negative is not None:
        one = read(jax.tree.map(lambda x: x[None], negative))
        negative = jax.tree.map(lambda x: x[0], one)
    return condition, negative
