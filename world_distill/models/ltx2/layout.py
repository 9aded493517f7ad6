"""`interfaces.PublishedLayout` of LTX-2, and what there is to convert of a published model."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.ltx2.published import (
    CONNECTOR_LORA_NAMES,
    KNOWN_SIZES,
    LORA_NAMES,
    PROJECTION_LORA_NAMES,
    Naming,
    connector_config,
    connector_entries,
    lora_names,
    projection_entry,
    published_configs,
    transformer_config,
    transformer_entries,
)
from world_distill.models.ltx2.vae import VaeConfig
from world_distill.models.ltx2.vae_tensors import published_vae_config, vae_config, vae_entries
from world_distill.models.ltx2.versions import check_version
from world_distill.models.tensor_map import Entry, LoraRules, Published

# Not `audio`: a base with both streams serves the video stream alone.
_NETWORK = (
    "channels", "width", "audio_channels", "audio_width", "depth", "heads", "text_width", "time_width", "eps",
    "theta", "stride", "ranges", "audio_stride", "audio_hop", "audio_rate",
)  # fmt: skip
# What only both streams read.
AUDIO = r"connectors\.audio\..*|transformer\.(.*\.)?(audio|av_\w+|audio_to_video|video_to_audio)(\..*)?"
# Of published tensors, what is no part of the base: the projection of the text states belongs to `encode`.
IGNORED = {"connectors": r"text_proj_in\..*|aggregate_embed\..*"}
_CONNECTORS = ("width", "heads", "depth", "registers", "length", "states", "eps", "theta", "places")


def _lora_stops(tensors: Mapping[str, tuple[str, str]]) -> list[str]:
    if strange := sorted(name for name in tensors if "lora" not in name):
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        return [f"tensors have no `lora` in their names: {strange[0]}{more}"]
    return []


LORA_RULES = LoraRules(("diffusion_model.",), lambda name, kind: bool(re.search(r"\.lora_[AB]\b", name)), _lora_stops)


@dataclasses.dataclass(frozen=True)
class LTX2Published:
    """`interfaces.PublishedLayout` for networks of these sizes."""

    network: LTX2Config
    connectors: ConnectorConfig
    codec: VaeConfig

    @property
    def lora_names(self) -> Mapping[str, tuple[str, str]]:
        return lora_names(self.network)

    @property
    def all_lora_names(self) -> Mapping[str, Mapping[str, tuple[str, str]]]:
        """Of the connectors and the text projection too, which LTX-2's own LoRA from dev to distilled changes."""
        beside = {path: (f"connectors.{theirs}", original) for path, (theirs, original) in CONNECTOR_LORA_NAMES.items()}
        return {"transformer": self.lora_names, "connectors": beside, "text_projection": PROJECTION_LORA_NAMES}

    @property
    def absent_lora_names(self) -> Mapping[str, tuple[str, str]]:
        return {path: names for path, names in LORA_NAMES.items() if path not in self.lora_names}

    @property
    def lora_rules(self) -> LoraRules:
        return LORA_RULES

    @property
    def sizes(self) -> Mapping[str, Any]:
        """As in a config's section `model`, with what shapes do not show."""
        return {
            **{name: getattr(self.network, name) for name in _NETWORK},
            "connectors": {name: getattr(self.connectors, name) for name in _CONNECTORS},
            "vae": dataclasses.asdict(self.codec),
        }

    @property
    def float32(self) -> Mapping[str, str]:
        return {}  # published files hold bfloat16 throughout

    @property
    def unread(self) -> str:
        return "" if self.network.joint else AUDIO

    @property
    def known_sizes(self) -> Mapping[tuple[int, int], str]:
        return KNOWN_SIZES

    def entries(self, naming: Naming = "diffusers") -> dict[str, list[Entry]]:
        return {
            "transformer": list(transformer_entries(self.network, naming)),
            "connectors": list(connector_entries(self.connectors, naming)),
            "vae": list(vae_entries(self.codec, naming)),
        }

    def apart(self, naming: Naming = "diffusers") -> dict[str, list[Entry]]:
        return {"text_projection": [projection_entry(self.connectors, naming)]}

    def configs(self, read: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
        del read  # the autoencoder's statistics are tensors
        return published_configs(self.network, self.connectors) | {"vae": published_vae_config(self.codec)}


def describe(
    transformer: Mapping[str, Any],
    connectors: Mapping[str, Any],
    vae: Mapping[str, Any],
    index: Mapping[str, Any] | None = None,
) -> Published:
    """What there is to convert, from diffusers' config.json of each part.

    Raises:
      ValueError: a network that is not built here, such as LTX-2.3's, or sizes that do not fit together.
    """
    del index  # it names the parts' classes
    check_version("transformer/config.json", transformer)
    network, codec = transformer_config(transformer), vae_config(vae)
    if network.channels != codec.channels:
        raise ValueError(f"its transformer has {network.channels} latent channels, its vae {codec.channels}")
    layout = LTX2Published(network, connector_config(connectors), codec)
    return Published(layout, layout.entries(), ignored=IGNORED, apart=layout.apart())
