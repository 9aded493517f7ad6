"""Video models. A family is a folder with `build(**sizes)`, which returns an `interfaces.ModelFamily`."""

import importlib

FAMILIES = ("tiny", "wan")


def build(family: str, **sizes):
    """The `ModelFamily` called `family`, made to the given sizes.

    Raises:
      ValueError: there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; there are: {', '.join(FAMILIES)}")
    return importlib.import_module(f"world_distill.models.{family}").build(**sizes)
