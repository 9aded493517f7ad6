"""Video models. A family is a folder with `build(**sizes)`, which returns an `interfaces.ModelFamily`.

A family of another package is named by the address of its function, `package.module:function`.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

FAMILIES = ("ltx2", "tiny", "wan")


def build(family: str, **sizes):
    """The `ModelFamily` called `family`, made to the given sizes.

    Raises:
      ValueError: there is no such family.
    """
    if family in FAMILIES:
        return importlib.import_module(f"world_distill.models.{family}").build(**sizes)
    module, separator, name = family.partition(":")
    if not separator:
        raise ValueError(
            f"unknown model family {family!r}; there are: {', '.join(FAMILIES)}, and package.module:function names that"
            " of another package"
        )
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model family {family!r} cannot be imported: {error}") from error
    return make(**sizes)


def parity_of(family: str, sizes: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A small float32 family of these sizes, and the `models.parity.PartParity` of each part of its base.

    Raises:
      ValueError: the family has no published code to compare with.
    """
    name = f"world_distill.models.{family}.verify"
    if family not in FAMILIES or importlib.util.find_spec(name) is None:
        raise ValueError(f"model family {family!r} has no published code to compare with")
    return importlib.import_module(name).parity(sizes)


def documented(family: str, part: str = "") -> tuple[Any, ...]:
    """The functions and classes whose docstrings explain a config's section `model`, or its section `part`."""
    if family not in FAMILIES:
        return ()
    return importlib.import_module(f"world_distill.models.{family}").EXPLAINED_BY.get(part, ())
