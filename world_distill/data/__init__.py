"""Tasks on disk: annotating scene images, encoding them for a model family, and reading them in training."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from world_distill.data.annotation.local import LocalAnnotator as LocalAnnotator
    from world_distill.data.annotation.server import ServerAnnotator as ServerAnnotator

_HOMES = {
    "ServerAnnotator": "world_distill.data.annotation.server",
    "LocalAnnotator": "world_distill.data.annotation.local",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
