"""How a part of a family's base is held to the published code that it comes from."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class PartParity(NamedTuple):
    """One part of the base, here and in the reference. Arrays by name, float32, in our layout.

    Attributes:
      inputs: family -> random inputs.
      ours: (family, weights of the part, **inputs) -> results.
      load: folder of the part in the reference's layout -> its network, float32, on the CPU.
      build: (config in the reference's layout, tensors by their original names) -> the same network.
      theirs: (that network, **inputs) -> results of the same names.
    """

    inputs: Callable[[Any], dict[str, np.ndarray]]
    ours: Callable[..., dict[str, np.ndarray]]
    load: Callable[[pathlib.Path], Any]
    build: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], Any]
    theirs: Callable[..., dict[str, np.ndarray]]
