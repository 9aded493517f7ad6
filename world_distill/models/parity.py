"""How a part of a family's base is held to the published code that it comes from."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class PartParity(NamedTuple):
    """One part of the base, here and in the reference. Arrays by name, float32, in our layout.

    Attributes:
      inputs: family -> random inputs.
      ours: (family, weights of the part, **inputs) -> results.
      load: folder of the published model -> the reference's network, float32, on the CPU.
      theirs: (that network, **inputs) -> results of the same names.
    """

    inputs: Callable[[Any], dict[str, np.ndarray]]
    ours: Callable[..., dict[str, np.ndarray]]
    load: Callable[[pathlib.Path], Any]
    theirs: Callable[..., dict[str, np.ndarray]]
