"""Tasks on disk: annotating scene images, encoding them for a model family, and reading them in training."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from world_distill.data.annotation.local import LocalAnnotator
    from world_distill.data.annotation.server import ServerAnnotator

__all__ = ["LocalAnnotator", "ServerAnnotator"]
