"""Wan2.2-TI2V-5B: the first family with real weights."""

from world_distill.models.wan.family import WanFamily, build

__all__ = ["WanFamily", "build"]
