"""Questions to a vision-language model about a clip, and a memory of its answers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from world_distill.judges.brightness import Brightness as Brightness
    from world_distill.judges.local import LocalJudge as LocalJudge
    from world_distill.judges.server import ServerJudge as ServerJudge

_HOMES = {
    "ServerJudge": "world_distill.judges.server",
    "LocalJudge": "world_distill.judges.local",
    "Brightness": "world_distill.judges.brightness",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
