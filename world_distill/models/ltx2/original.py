"""LTX-2's original layout: Lightricks' single files, and those of ComfyUI, which keep their names.

The header's `config` says what shapes do not show; where there is none, published values are taken, as ComfyUI does.
Sizes are read from shapes, and a header of other sizes is an error. The keys are those of Lightricks' `ltx_core`.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.ltx2.layout import LTX2Published
from world_distill.models.ltx2.published import Naming, connector_entries, transformer_entries
from world_distill.models.ltx2.vae import VaeConfig
from world_distill.models.ltx2.vae_tensors import UNUSED, original_vae_config, vae_entries
from world_distill.models.ltx2.versions import check_version
from world_distill.models.tensor_map import Published

Shapes = Mapping[str, tuple[int, ...]]

HEAD = 128  # width of an attention head of the picture's stream, and of the connectors, in all published models

# Where each part begins in a file. The first that fits a name has it, and all other names are the transformer's.
PARTS = {
    "connectors": r"(?:model\.diffusion_model\.|diffusion_model\.|)(?=(?:video|audio)_embeddings_connector\.)",
    "text_projection": r"text_embedding_projection\.",
    "vae": r"vae\.|(?=(?:encoder|decoder|per_channel_statistics)\.)",
    "audio_vae": r"audio_vae\.",
    "vocoder": r"vocoder\.",
    "text_encoder": r"text_encoders\.",
    "transformer": r"model\.diffusion_model\.|diffusion_model\.|",
}
BESIDE = ("audio_vae", "vocoder", "text_encoder")  # parts that are never converted: no sound is decoded here
# By part: a name that only it has, and whose it is.
MARKS: dict[str, dict[str, Naming]] = {
    "transformer": {"audio_patchify_proj.weight": "original", "audio_proj_in.weight": "diffusers"},
    "vae": {"decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": "original"},
    "connectors": {"video_embeddings_connector.learnable_registers": "original"},
}

# What the networks here are built with, in the header's words; another value is another network.
_FIXED: dict[str, dict[str, Any]] = {
    "transformer": {
        "rope_type": "split", "frequencies_precision": "float64", "positional_embedding_type": "rope",
        "use_middle_indices_grid": True, "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000,
        "activation_fn": "gelu-approximate", "qk_norm": "rms_norm", "standardization_norm": "rms_norm",
        "norm_elementwise_affine": False, "attention_bias": True, "audio_ff_bias": True, "share_ff": False,
        "use_audio_video_cross_attention": True, "av_cross_ada_norm": True, "use_embeddings_connector": True,
        "connector_apply_gated_attention": False, "connector_ff_bias": True,
    },
    "vae": {
        "_class_name": "CausalVideoAutoencoder", "causal_decoder": False, "timestep_conditioning": False,
        "norm_layer": "pixel_norm", "latent_log_var": "uniform", "spatial_padding_mode": "reflect",
        "encoder_spatial_padding_mode": "zeros",
    },
}  # fmt: skip
_STEPS = {"compress_space_res": "spatial", "compress_time_res": "temporal", "compress_all_res": "spatiotemporal"}


def describe(header: Mapping[str, str], shapes: Mapping[str, Shapes], naming: Naming = "original") -> Published:
    """What there is to convert, from a file's header and the shapes of its parts.

    Args:
      header: of the file that has the transformer; `config` is JSON.
      shapes: part -> name -> shape, without the part's beginning.
      naming: whose names the transformer has.

    Raises:
      ValueError: a later version, a network that is not built here, or a header that does not fit the tensors.
    """
    config, names = check(header, shapes["transformer"]), shapes["transformer"]
    settings = config.get("transformer") or {}
    _check_fixed("transformer", settings)
    codec = original_vae_config(shapes["vae"])
    _check_vae(config.get("vae") or {}, codec)
    network = _transformer_config(names, settings, codec, naming)
    if network.channels != codec.channels:
        raise ValueError(f"its transformer has {network.channels} latent channels, its autoencoder {codec.channels}")
    connectors = _connector_config(shapes["connectors"], settings, shapes.get("text_projection", {}))
    if connectors.width != network.text_width:
        raise ValueError(f"its transformer takes text {network.text_width} wide, its connectors {connectors.width}")
    layout = LTX2Published(network, connectors, codec)
    return Published(
        layout,
        {
            "transformer": list(transformer_entries(network, naming)),
            "connectors": list(connector_entries(connectors, "original")),
            "vae": list(vae_entries(codec, "original")),
        },
        ignored={"vae": UNUSED},
        apart=layout.apart("original") if "text_projection" in shapes else {},
    )


def check(header: Mapping[str, str], names: Collection[str]) -> dict[str, Any]:
    """The config in a file's header; {} where there is none.

    Raises:
      ValueError: no config, or by header or names of tensors a later version.
    """
    try:
        config = json.loads(header.get("config", "{}"))
    except ValueError as error:
        raise ValueError(f"the config in its header is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the config in its header is no config: its JSON is a {type(config).__name__}")
    settings = config.get("transformer") or {}
    check_version("its header", settings, names=names, declared=header.get("model_version", ""))
    return config


def _check_fixed(part: str, settings: Mapping[str, Any]) -> None:
    for key, value in _FIXED[part].items():
        if (found := settings.get(key, value)) != value:
            raise ValueError(f"the config in its header has {part}.{key} = {found}; only {value} is built here")


def _check_sizes(part: str, settings: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError where a header says other sizes than the tensors have."""
    if other := [f"{part}.{k} = {settings[k]}, not {v}" for k, v in expected.items() if settings.get(k, v) != v]:
        raise ValueError(f"the config in its header does not fit its tensors: {', '.join(other)}")


def _transformer_config(shapes: Shapes, settings: Mapping[str, Any], codec: VaeConfig, naming: Naming) -> LTX2Config:
    names = {entry.path: entry.names[0] for entry in transformer_entries(LTX2Config(depth=1), naming)}
    try:
        kernel = {path: shapes[names[f"{path}.kernel"]] for path in (
            "video.patch", "audio.patch", "video.text_in", "video.time.input"
        )}  # fmt: skip
    except KeyError as error:
        raise ValueError(f"its transformer lacks {error}") from error
    (width, channels), (audio_width, audio_channels) = kernel["video.patch"], kernel["audio.patch"]
    text_width, time_width = kernel["video.text_in"][1], kernel["video.time.input"][1]
    depth = 1 + max((int(m[1]) for key in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.", key))), default=-1)
    heads = settings.get("num_attention_heads", width // HEAD)
    if not heads or width % heads or audio_width % heads:
        raise ValueError(f"its streams are {width} and {audio_width} wide, which {heads} heads do not divide")
    ranges = tuple(settings.get("positional_embedding_max_pos", LTX2Config.ranges))
    _check_sizes("transformer", settings, {
        "num_layers": depth, "in_channels": channels, "out_channels": channels, "attention_head_dim": width // heads,
        "cross_attention_dim": width, "caption_channels": text_width, "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio_width // heads, "audio_in_channels": audio_channels,
        "audio_out_channels": audio_channels, "audio_cross_attention_dim": audio_width,
        "audio_positional_embedding_max_pos": [ranges[0]],
    })  # fmt: skip
    return LTX2Config(
        channels=channels, width=width, audio_channels=audio_channels, audio_width=audio_width, depth=depth,
        heads=heads, text_width=text_width, time_width=time_width, eps=settings.get("norm_eps", LTX2Config.eps),
        theta=settings.get("positional_embedding_theta", LTX2Config.theta), ranges=ranges,
        stride=(codec.time, codec.space, codec.space),
    )  # fmt: skip


def _connector_config(shapes: Shapes, settings: Mapping[str, Any], projection: Shapes) -> ConnectorConfig:
    try:
        registers, width = shapes["video_embeddings_connector.learnable_registers"]
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    place = re.compile(r"video_embeddings_connector\.transformer_1d_blocks\.(\d+)\.")
    depth = 1 + max((int(match[1]) for key in shapes if (match := place.match(key))), default=-1)
    heads = settings.get("connector_num_attention_heads", width // HEAD)
    head = width // heads if heads else 0
    _check_sizes("transformer", settings, {
        "connector_num_layers": depth, "connector_num_learnable_registers": registers,
        "connector_attention_head_dim": head, "audio_connector_num_attention_heads": heads,
        "audio_connector_attention_head_dim": head, "audio_connector_num_layers": depth,
    })  # fmt: skip
    states = ConnectorConfig.states
    if (shape := projection.get("aggregate_embed.weight")) is not None:
        states = shape[1] // width
    places = settings.get("connector_positional_embedding_max_pos", [ConnectorConfig.places])
    return ConnectorConfig(
        width=width, heads=heads, depth=depth, registers=registers, states=states, places=places[0]
    )  # fmt: skip


def _check_vae(settings: Mapping[str, Any], codec: VaeConfig) -> None:
    _check_fixed("vae", settings)
    _check_sizes("vae", settings, {"latent_channels": codec.channels, "patch_size": codec.patch})
    steps = [(name, block) for name, block in settings.get("encoder_blocks", ()) if name.startswith("compress")]
    if steps and tuple(_STEPS.get(name, name) for name, _ in steps) != codec.steps:
        raise ValueError(f"the config in its header has an encoder of the steps {[name for name, _ in steps]}")
    for name, block in settings.get("decoder_blocks", ()):
        residual = isinstance(block, Mapping) and block.get("residual")
        if name.startswith("compress") and (name != "compress_all" or not residual):
            raise ValueError(
                f"the config in its header has a decoder with {name} {block}; only compress_all with a residual is"
                " built here"
            )
