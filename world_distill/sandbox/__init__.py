"""A small world with an exact physics and an oracle in the VLM's place, to run the whole method on a laptop CPU."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from world_distill.sandbox.factories import make_benchmark as make_benchmark
    from world_distill.sandbox.factories import make_clips as make_clips
    from world_distill.sandbox.factories import make_oracle as make_oracle
    from world_distill.sandbox.scenes import write_scenes as write_scenes

_HOMES = {
    "make_oracle": "world_distill.sandbox.factories",
    "make_benchmark": "world_distill.sandbox.factories",
    "make_clips": "world_distill.sandbox.factories",
    "write_scenes": "world_distill.sandbox.scenes",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
