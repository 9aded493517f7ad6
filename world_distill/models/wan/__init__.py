"""Wan2.2-TI2V-5B: the first family with real weights."""

from world_distill.models.clip_family import ClipFamily
from world_distill.models.wan.family import WanFamily, build
from world_distill.models.wan.modeling import WanConfig
from world_distill.models.wan.vae import VaeConfig

__all__ = ["WanFamily", "build"]

# Sections `model` and `model.vae` of a config.
EXPLAINED_BY = {"": (build, WanFamily, ClipFamily, WanConfig), "vae": (VaeConfig,)}
