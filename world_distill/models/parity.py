"""How a part of a family's base is held to the published code that it comes from."""

import pathlib
from collections.abc import Callable, Collection, Mapping
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


def filled(network: Any, tensors: Mapping[str, np.ndarray], without: Collection[str] = ()) -> Any:
    """A network of PyTorch with these weights by its own names, float32, ready to compute.

    Args:
      network: of any weights.
      tensors: by name.
      without: names of weights that are not compared and stay as they are.

    Raises:
      ValueError: names that do not fit.
    """
    import torch

    weights = {name: torch.from_numpy(np.array(tensor, np.float32)) for name, tensor in tensors.items()}
    network = network.float()
    found = network.load_state_dict(weights, strict=False)
    if strange := sorted({*found.missing_keys, *found.unexpected_keys} - set(without)):
        raise ValueError(f"the published network and its file differ in {', '.join(strange)}")
    return network.eval()
