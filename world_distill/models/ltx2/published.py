"""Names and layouts of LTX-2's published weights, beside ours.

Original names come without the prefix that `ORIGINAL_PREFIXES` has for each part.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from world_distill.models.ltx2.config import Audio, LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.tensor_map import Entry, same, transpose

Naming = Literal["diffusers", "original"]
NAMINGS: tuple[Naming, ...] = ("diffusers", "original")  # the order of the names in the tables below

# What the networks here are built with, key and value in diffusers' config.json; another value is another network, such
# as LTX-2.3.
_FIXED: dict[str, dict[str, Any]] = {
    "transformer": {
        "rope_type": "split", "rope_double_precision": True, "causal_offset": 1, "patch_size": 1, "patch_size_t": 1,
        "audio_patch_size": 1, "audio_patch_size_t": 1, "timestep_scale_multiplier": 1000,
        "cross_attn_timestep_scale_multiplier": 1000, "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False, "attention_bias": True,
        "attention_out_bias": True, "ff_bias": True, "audio_ff_bias": True, "use_prompt_embeddings": True,
        "gated_attn": False, "audio_gated_attn": False, "cross_attn_mod": False, "audio_cross_attn_mod": False,
    },
    "connectors": {
        "rope_type": "split", "rope_double_precision": True, "per_modality_projections": False, "proj_bias": False,
        "video_gated_attn": False, "audio_gated_attn": False,
    },
}  # fmt: skip

# Part -> what its names begin with in the original file, which holds all parts.
ORIGINAL_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "connectors": "model.diffusion_model.",
    "projection": "text_embedding_projection.",
}

Names = Mapping[str, tuple[str, str]]  # our path -> the names there, of layers or of what follows a common beginning


def _joined(beginnings: Names, ends: Names) -> dict[str, tuple[str, str]]:
    """Every beginning with every end."""
    return {
        f"{path}.{end}": (f"{theirs[0]}.{names[0]}", f"{theirs[1]}.{names[1]}")
        for path, theirs in beginnings.items()
        for end, names in ends.items()
    }


def _both(name: str) -> tuple[str, str]:
    """A name that is the same in diffusers and in the original code."""
    return name, name


_ATTENTION: Names = {
    "q": _both("to_q"), "k": _both("to_k"), "v": _both("to_v"), "out": _both("to_out.0"),
}  # fmt: skip
_NORMS: Names = {"q_norm": ("norm_q.weight", "q_norm.weight"), "k_norm": ("norm_k.weight", "k_norm.weight")}
_MLP: Names = {"up": _both("net.0.proj"), "down": _both("net.2")}
_TIME: Names = {
    "input": _both("emb.timestep_embedder.linear_1"), "output": _both("emb.timestep_embedder.linear_2"),
    "modulation": _both("linear"),
}  # fmt: skip

_BLOCK = "transformer_blocks.{n}."
_ATTENTIONS: Names = {
    "blocks.video.self_attention": _both(_BLOCK + "attn1"),
    "blocks.video.cross_attention": _both(_BLOCK + "attn2"),
    "blocks.audio.self_attention": _both(_BLOCK + "audio_attn1"),
    "blocks.audio.cross_attention": _both(_BLOCK + "audio_attn2"),
    "blocks.audio_to_video": _both(_BLOCK + "audio_to_video_attn"),
    "blocks.video_to_audio": _both(_BLOCK + "video_to_audio_attn"),
}
_TIMES: Names = {
    "video.time": ("time_embed", "adaln_single"),
    "audio.time": ("audio_time_embed", "audio_adaln_single"),
    "video.av_time": ("av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
    "audio.av_time": ("av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
    "video.av_gate": ("av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
    "audio.av_gate": ("av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
}
# Linear layers: our path, and its name in diffusers and in the original checkpoints (which ComfyUI uses).
LORA_NAMES: Names = {
    "video.patch": ("proj_in", "patchify_proj"),
    "audio.patch": ("audio_proj_in", "audio_patchify_proj"),
    "video.text_in": _both("caption_projection.linear_1"),
    "video.text_out": _both("caption_projection.linear_2"),
    "audio.text_in": _both("audio_caption_projection.linear_1"),
    "audio.text_out": _both("audio_caption_projection.linear_2"),
    "video.head": _both("proj_out"),
    "audio.head": _both("audio_proj_out"),
    **_joined(_TIMES, _TIME),
    **_joined(_ATTENTIONS, _ATTENTION),
    **_joined({"blocks.video.mlp": _both(_BLOCK + "ff"), "blocks.audio.mlp": _both(_BLOCK + "audio_ff")}, _MLP),
}
_NORM_NAMES: Names = _joined(_ATTENTIONS, _NORMS)
_TABLE_NAMES: Names = {
    "video.table": _both("scale_shift_table"),
    "audio.table": _both("audio_scale_shift_table"),
    "blocks.video.table": _both(_BLOCK + "scale_shift_table"),
    "blocks.audio.table": _both(_BLOCK + "audio_scale_shift_table"),
    "blocks.video.av_table": (
        _BLOCK + "video_a2v_cross_attn_scale_shift_table", _BLOCK + "scale_shift_table_a2v_ca_video"
    ),
    "blocks.audio.av_table": (
        _BLOCK + "audio_a2v_cross_attn_scale_shift_table", _BLOCK + "scale_shift_table_a2v_ca_audio"
    ),
}  # fmt: skip
# The connectors of both streams, and the projection of the text states, in the same way.
_CONNECTORS: Names = {
    "video": ("video_connector", "video_embeddings_connector"),
    "audio": ("audio_connector", "audio_embeddings_connector"),
}
_CONNECTOR_BLOCKS: Names = _joined(_CONNECTORS, {"blocks": ("transformer_blocks.{n}", "transformer_1d_blocks.{n}")})
_CONNECTOR_ATTENTIONS: Names = {path: (f"{a}.attn1", f"{b}.attn1") for path, (a, b) in _CONNECTOR_BLOCKS.items()}
CONNECTOR_LORA_NAMES: Names = {
    **_joined(_CONNECTOR_ATTENTIONS, _ATTENTION),
    **_joined({f"{path}.mlp": (f"{a}.ff", f"{b}.ff") for path, (a, b) in _CONNECTOR_BLOCKS.items()}, _MLP),
}
_CONNECTOR_NORM_NAMES: Names = _joined(_CONNECTOR_ATTENTIONS, _NORMS)
PROJECTION_NAMES = ("text_proj_in", "aggregate_embed")
PROJECTION_LORA_NAMES: Names = {
    "linear": (f"connectors.{PROJECTION_NAMES[0]}", ORIGINAL_PREFIXES["projection"] + PROJECTION_NAMES[1])
}
# (blocks, width) of published transformers, for messages about files that were made for another one. The width is what
# most layers read: with both streams, that of the audio.
KNOWN_SIZES = {(48, 4096): "LTX-2", (48, 2048): "LTX-2"}


def transformer_config(config: Mapping[str, Any], audio: Audio = "joint") -> LTX2Config:
    """Ours, from transformer/config.json.

    Args:
      config: what stands in it.
      audio: "off" leaves out the audio stream.

    Raises:
      ValueError: a network that is not built here.
    """
    _check_fixed("transformer", config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    audio_width = config["audio_num_attention_heads"] * config["audio_attention_head_dim"]
    for key, value in {
        "out_channels": config["in_channels"], "audio_out_channels": config["audio_in_channels"],
        "audio_num_attention_heads": config["num_attention_heads"], "cross_attention_dim": width,
        "audio_cross_attention_dim": audio_width, "audio_pos_embed_max_pos": config["pos_embed_max_pos"],
    }.items():  # fmt: skip
        if config[key] not in (value, None):
            raise ValueError(f"transformer/config.json has {key} = {config[key]}; only {value} is built here")
    time, rows, columns = config["vae_scale_factors"]
    return LTX2Config(
        audio=audio, channels=config["in_channels"], width=width, audio_channels=config["audio_in_channels"],
        audio_width=audio_width, depth=config["num_layers"], heads=config["num_attention_heads"],
        text_width=config["caption_channels"], eps=config["norm_eps"], theta=config["rope_theta"],
        stride=(time, rows, columns),
        ranges=(config["pos_embed_max_pos"], config["base_height"], config["base_width"]),
        audio_stride=config["audio_scale_factor"], audio_hop=config["audio_hop_length"],
        audio_rate=config["audio_sampling_rate"],
    )  # fmt: skip


def connector_config(config: Mapping[str, Any], audio: Audio = "joint") -> ConnectorConfig:
    """Ours, from connectors/config.json.

    Args:
      config: what stands in it.
      audio: "off" leaves out the audio stream's connector.

    Raises:
      ValueError: connectors that are not built here.
    """
    _check_fixed("connectors", config)
    sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "num_learnable_registers")
    video, other = (tuple(config[f"{stream}_connector_{size}"] for size in sizes) for stream in ("video", "audio"))
    heads, head, depth, registers = video
    if video != other or heads * head != config["caption_channels"]:
        raise ValueError(
            f"connectors/config.json has connectors of {', '.join(sizes)} {video} and {other}; only two alike, as wide"
            f" as the text states ({config['caption_channels']}), are built here"
        )
    return ConnectorConfig(
        audio=audio, width=config["caption_channels"], heads=heads, depth=depth, registers=registers,
        states=config["text_proj_in_factor"], theta=config["rope_theta"],
        places=config["connector_rope_base_seq_len"],
    )  # fmt: skip


def _check_fixed(part: str, config: Mapping[str, Any]) -> None:
    config = {"rope_type": "interleaved"} | dict(config)  # of the keys, the only one whose default is another value
    for key, value in _FIXED[part].items():
        if (found := config.get(key, value)) != value:
            raise ValueError(f"{part}/config.json has {key} = {found}; only {value} is built here")


def published_configs(network: LTX2Config, connectors: ConnectorConfig) -> dict[str, dict[str, Any]]:
    """diffusers' config.json of transformer and connectors, from ours."""
    seconds, rows, columns = network.ranges
    transformer = {
        "_class_name": "LTX2VideoTransformer3DModel", **_FIXED["transformer"], "in_channels": network.channels,
        "out_channels": network.channels, "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads, "cross_attention_dim": network.width,
        "vae_scale_factors": list(network.stride), "pos_embed_max_pos": seconds, "base_height": rows,
        "base_width": columns, "audio_in_channels": network.audio_channels,
        "audio_out_channels": network.audio_channels, "audio_num_attention_heads": network.heads,
        "audio_attention_head_dim": network.audio_width // network.heads,
        "audio_cross_attention_dim": network.audio_width, "audio_scale_factor": network.audio_stride,
        "audio_pos_embed_max_pos": seconds, "audio_sampling_rate": network.audio_rate,
        "audio_hop_length": network.audio_hop, "num_layers": network.depth, "norm_eps": network.eps,
        "caption_channels": network.text_width, "rope_theta": network.theta,
    }  # fmt: skip
    sizes = {
        "num_attention_heads": connectors.heads, "attention_head_dim": connectors.width // connectors.heads,
        "num_layers": connectors.depth, "num_learnable_registers": connectors.registers,
    }  # fmt: skip
    return {
        "transformer": transformer,
        "connectors": {
            "_class_name": "LTX2TextConnectors", **_FIXED["connectors"], "caption_channels": connectors.width,
            "text_proj_in_factor": connectors.states, "connector_rope_base_seq_len": connectors.places,
            "rope_theta": connectors.theta,
            **{f"{stream}_connector_{key}": value for stream in ("video", "audio") for key, value in sizes.items()},
        },
    }  # fmt: skip


def lora_names(config: LTX2Config) -> dict[str, tuple[str, str]]:
    """`LORA_NAMES` of the layers that a network of this kind has."""
    return {path: names for path, names in LORA_NAMES.items() if _has(config, path)}


def _has(config: LTX2Config, path: str) -> bool:
    """Whether the array or layer exists: with audio off, only what the video stream has alone."""
    return config.joint or not ("audio" in path or "av_" in path)


def transformer_entries(config: LTX2Config, naming: Naming = "diffusers") -> Iterator[Entry]:
    """Every array of the transformer, under diffusers' names or those of the original code."""
    which = NAMINGS.index(naming)
    for path, names in LORA_NAMES.items():
        if _has(config, path):
            inputs, outputs = _kernel_shape(config, path)
            yield _entry(config, f"{path}.kernel", f"{names[which]}.weight", (outputs, inputs), transpose)
            yield _entry(config, f"{path}.bias", f"{names[which]}.bias", (outputs,))
    for path, names in _NORM_NAMES.items():
        if _has(config, path):
            yield _entry(config, path, names[which], (_inner(config, path),))
    for path, names in _TABLE_NAMES.items():
        if _has(config, path):
            rows = 5 if path.endswith("av_table") else 6 if path.startswith("blocks") else 2
            yield _entry(config, path, names[which], (rows, _width(config, path)))


def _width(config: LTX2Config, path: str) -> int:
    """Hidden width of the stream that the path belongs to."""
    return config.audio_width if path.removeprefix("blocks.").startswith("audio.") else config.width


def _inner(config: LTX2Config, path: str) -> int:
    """Width of all heads of an attention."""
    return config.width if path.startswith("blocks.video.") else config.audio_width


def _kernel_shape(config: LTX2Config, path: str) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    *_, part, layer = path.split(".")
    if part in ("audio_to_video", "video_to_audio"):
        video, audio = config.width, config.audio_width
        to, source = (video, audio) if part == "audio_to_video" else (audio, video)
        return {"q": (to, audio), "k": (source, audio), "v": (source, audio), "out": (audio, to)}[layer]
    width = _width(config, path)
    channels = config.audio_channels if path.startswith("audio.") else config.channels
    rows = {"time": 6, "av_time": 4, "av_gate": 1}.get(part, 1)
    shapes = {
        "patch": (channels, width), "head": (width, channels), "text_in": (config.text_width, width),
        "input": (config.time_width, width), "modulation": (width, rows * width), "up": (width, 4 * width),
        "down": (4 * width, width),
    }  # fmt: skip
    return shapes.get(layer, (width, width))


def _entry(config: LTX2Config, path: str, name: str, shape: tuple[int, ...], turn=same) -> Entry:
    return Entry(path, name, shape, turn, turn, config.depth if "{n}" in name else 0)


def connector_entries(config: ConnectorConfig, naming: Naming = "diffusers") -> Iterator[Entry]:
    """Every array of the connectors, as the device holds them: without the projection."""
    which, width = NAMINGS.index(naming), config.width

    def entry(path: str, name: str, shape: tuple[int, ...], turn=same) -> Entry:
        return Entry(path, name, shape, turn, turn, config.depth if "{n}" in name else 0)

    for stream, names in _CONNECTORS.items():
        if stream == "audio" and config.audio == "off":
            continue
        registers = (config.registers, width)
        yield entry(f"{stream}.registers", f"{names[which]}.learnable_registers", registers)
        for path, names in CONNECTOR_LORA_NAMES.items():
            if path.startswith(f"{stream}."):
                inputs, outputs = (4 if path.endswith("down") else 1) * width, (4 if path.endswith("up") else 1) * width
                yield entry(f"{path}.kernel", f"{names[which]}.weight", (outputs, inputs), transpose)
                yield entry(f"{path}.bias", f"{names[which]}.bias", (outputs,))
        for path, names in _CONNECTOR_NORM_NAMES.items():
            if path.startswith(f"{stream}."):
                yield entry(path, names[which], (width,))


def projection_entry(config: ConnectorConfig, naming: Naming = "diffusers") -> Entry:
    """The projection of the text states, which only encoding needs."""
    name = f"{PROJECTION_NAMES[NAMINGS.index(naming)]}.weight"
    return Entry("linear.kernel", name, (config.width, config.width * config.states), transpose, transpose)
