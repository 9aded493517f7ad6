"""LTX-2 (2.0): video and audio from one transformer of two streams, or the video alone (arXiv 2601.03233)."""

from world_distill.models.clip_family import ClipFamily
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.ltx2.family import LTX2Family, build
from world_distill.models.ltx2.vae import VaeConfig

__all__ = ["LTX2Family", "build"]

# Sections `model`, `model.vae` and `model.connectors` of a config.
EXPLAINED_BY = {
    "": (build, LTX2Family, ClipFamily, LTX2Config), "vae": (VaeConfig,), "connectors": (ConnectorConfig,),
}  # fmt: skip
