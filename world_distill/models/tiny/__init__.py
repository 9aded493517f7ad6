"""The sandbox's model family: a small video DiT, a lossless codec and a frozen text encoder without weights."""

from world_distill.models.tiny.family import TinyFamily, build

__all__ = ["TinyFamily", "build"]

EXPLAINED_BY = {"": (build,)}  # section `model` of a config
