"""Names and layouts of Wan's weights in diffusers, beside ours."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from world_distill.models.tensor_map import Entry, LoraRules, Published, same, transpose
from world_distill.models.wan.modeling import WanConfig
from world_distill.models.wan.vae import VaeConfig

Naming = Literal["diffusers", "original"]
NAMINGS: tuple[Naming, ...] = ("diffusers", "original")  # the order of the names in the tables below

# What the networks here are built with, key and value in diffusers' config.json; another value is another network.
_FIXED = {
    "transformer": {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": None,
                    "added_kv_proj_dim": None, "pos_embed_seq_len": None},
    "vae": {"attn_scales": [], "dropout": 0.0},
}  # fmt: skip


def describe(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], index: Mapping[str, Any] | None = None
) -> Published:
    """What there is to convert, from diffusers' two config.json, and the pipeline's model_index.json where it is there.

    Raises:
      ValueError: a network that is not built here, or sizes that do not fit together.
    """
    if index is not None and not index.get("expand_timesteps"):
        raise ValueError(
            "its model_index.json does not say expand_timesteps, so it takes no clean first frame: a text-to-video"
            " model would be conditioned otherwise here than it was trained"
        )
    for part, config in (("transformer", transformer), ("vae", vae)):
        for key, value in _FIXED[part].items():
            if config.get(key, value) != value:
                raise ValueError(f"{part}/config.json has {key} = {config[key]}; only {value} is built here")
    network, codec = transformer_config(transformer), vae_config(vae)
    if transformer["in_channels"] != transformer["out_channels"]:
        raise ValueError("its input has more channels than its output: such conditioning is not built here")
    if network.channels != codec.channels:
        raise ValueError(f"its transformer has {network.channels} latent channels, its vae {codec.channels}")
    layout = WanPublished(network, codec)
    return Published(
        layout,
        layout.entries(),
        constants={
            f"vae.{ours}": np.array(vae[theirs], np.float32)
            for ours, theirs in (("mean", "latents_mean"), ("std", "latents_std"))
        },
    )


def transformer_config(config: Mapping[str, Any]) -> WanConfig:
    """Ours, from transformer/config.json."""
    patch = tuple(config["patch_size"])
    if patch[0] != 1 or patch[1] != patch[2]:
        raise ValueError(f"transformer/config.json has patch_size = {patch}; only (1, p, p) is built here")
    return WanConfig(
        channels=config["in_channels"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        depth=config["num_layers"],
        heads=config["num_attention_heads"],
        mlp=config["ffn_dim"],
        text_width=config["text_dim"],
        time_width=config["freq_dim"],
        patch=patch[1],
        eps=config["eps"],
    )


def vae_config(config: Mapping[str, Any]) -> VaeConfig:
    """Ours, from vae/config.json."""
    return VaeConfig(
        channels=config["z_dim"],
        encoder_width=config["base_dim"],
        decoder_width=config.get("decoder_base_dim") or config["base_dim"],
        multiples=tuple(config["dim_mult"]),
        blocks=config["num_res_blocks"],
        halve_time=tuple(config["temperal_downsample"]),
        patch=config.get("patch_size") or 1,
        shortcuts=bool(config.get("is_residual", False)),
    )


@dataclasses.dataclass(frozen=True)
class WanPublished:
    """`interfaces.PublishedLayout` for networks of these sizes."""

    network: WanConfig
    codec: VaeConfig

    @property
    def lora_names(self) -> Mapping[str, tuple[str, str]]:
        return LORA_NAMES

    @property
    def all_lora_names(self) -> Mapping[str, Mapping[str, tuple[str, str]]]:
        return {"transformer": LORA_NAMES}

    @property
    def absent_lora_names(self) -> Mapping[str, tuple[str, str]]:
        return {}

    @property
    def lora_rules(self) -> LoraRules:
        return LORA_RULES

    @property
    def sizes(self) -> Mapping[str, Any]:
        """As in a config's section `model`, with what shapes do not show."""
        network, codec = self.network, self.codec
        return {
            "channels": network.channels, "width": network.width, "depth": network.depth, "heads": network.heads,
            "mlp": network.mlp, "text_width": network.text_width, "time_width": network.time_width,
            "patch": network.patch, "eps": network.eps, "vae": dataclasses.asdict(codec),
        }  # fmt: skip

    @property
    def float32(self) -> Mapping[str, str]:
        return FLOAT32

    @property
    def unread(self) -> str:
        return ""

    @property
    def known_sizes(self) -> Mapping[tuple[int, int], str]:
        return KNOWN_SIZES

    def entries(self, naming: Naming = "diffusers") -> dict[str, list[Entry]]:
        return {
            "transformer": list(transformer_entries(self.network, naming)),
            "vae": list(vae_entries(self.codec, naming)),
        }

    def apart(self, naming: Naming = "diffusers") -> dict[str, list[Entry]]:
        return {}

    def configs(self, read: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
        mean, std = (np.asarray(read(f"vae.{name}")) for name in ("mean", "std"))
        return published_configs(self.network, self.codec, mean, std)


def published_configs(
    network: WanConfig, codec: VaeConfig, mean: np.ndarray, std: np.ndarray
) -> dict[str, dict[str, Any]]:
    """diffusers' config.json of transformer and vae, from ours: what `describe` reads."""
    pixels = 3 * codec.patch**2
    transformer = {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, network.patch, network.patch],
        "num_attention_heads": network.heads, "attention_head_dim": network.width // network.heads,
        "in_channels": network.channels, "out_channels": network.channels, "text_dim": network.text_width,
        "freq_dim": network.time_width, "ffn_dim": network.mlp, "num_layers": network.depth, "eps": network.eps,
        **_FIXED["transformer"], "rope_max_seq_len": 1024,
    }  # fmt: skip
    autoencoder = {
        "_class_name": "AutoencoderKLWan", "base_dim": codec.encoder_width, "decoder_base_dim": codec.decoder_width,
        "z_dim": codec.channels, "dim_mult": list(codec.multiples), "num_res_blocks": codec.blocks,
        "temperal_downsample": list(codec.halve_time), "is_residual": codec.shortcuts, "in_channels": pixels,
        "out_channels": pixels, "patch_size": codec.patch if codec.patch > 1 else None,
        "scale_factor_temporal": codec.time, "scale_factor_spatial": codec.space, **_FIXED["vae"],
        "latents_mean": np.asarray(mean, float).tolist(), "latents_std": np.asarray(std, float).tolist(),
    }  # fmt: skip
    return {"transformer": transformer, "vae": autoencoder}


# Linear layers: our path, and its name in diffusers and in the original checkpoints (which ComfyUI uses).
LORA_NAMES = {
    "patch": ("patch_embedding", "patch_embedding"),
    "text_in": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    "text_out": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    "time_in": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    "time_out": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    "time_table": ("condition_embedder.time_proj", "time_projection.1"),
    "head": ("proj_out", "head.head"),
    "blocks.self_attention.q": ("blocks.{n}.attn1.to_q", "blocks.{n}.self_attn.q"),
    "blocks.self_attention.k": ("blocks.{n}.attn1.to_k", "blocks.{n}.self_attn.k"),
    "blocks.self_attention.v": ("blocks.{n}.attn1.to_v", "blocks.{n}.self_attn.v"),
    "blocks.self_attention.out": ("blocks.{n}.attn1.to_out.0", "blocks.{n}.self_attn.o"),
    "blocks.cross_attention.q": ("blocks.{n}.attn2.to_q", "blocks.{n}.cross_attn.q"),
    "blocks.cross_attention.k": ("blocks.{n}.attn2.to_k", "blocks.{n}.cross_attn.k"),
    "blocks.cross_attention.v": ("blocks.{n}.attn2.to_v", "blocks.{n}.cross_attn.v"),
    "blocks.cross_attention.out": ("blocks.{n}.attn2.to_out.0", "blocks.{n}.cross_attn.o"),
    "blocks.mlp.up": ("blocks.{n}.ffn.net.0.proj", "blocks.{n}.ffn.0"),
    "blocks.mlp.down": ("blocks.{n}.ffn.net.2", "blocks.{n}.ffn.2"),
}
# The other arrays, in the same way.
_NORM_NAMES = {
    "blocks.self_attention.q_norm": ("blocks.{n}.attn1.norm_q.weight", "blocks.{n}.self_attn.norm_q.weight"),
    "blocks.self_attention.k_norm": ("blocks.{n}.attn1.norm_k.weight", "blocks.{n}.self_attn.norm_k.weight"),
    "blocks.cross_attention.q_norm": ("blocks.{n}.attn2.norm_q.weight", "blocks.{n}.cross_attn.norm_q.weight"),
    "blocks.cross_attention.k_norm": ("blocks.{n}.attn2.norm_k.weight", "blocks.{n}.cross_attn.norm_k.weight"),
    # The original counts the norms of a block in the order of their making, diffusers in that of their use.
    "blocks.cross_norm.scale": ("blocks.{n}.norm2.weight", "blocks.{n}.norm3.weight"),
    "blocks.cross_norm.bias": ("blocks.{n}.norm2.bias", "blocks.{n}.norm3.bias"),
}
_TABLE_NAMES = {
    "blocks.table": ("blocks.{n}.scale_shift_table", "blocks.{n}.modulation"),
    "table": ("scale_shift_table", "head.modulation"),
}
# What diffusers keeps in float32 whatever it is asked for: the autoencoder loses sharpness otherwise, and times and
# modulation all their last digits.
FLOAT32 = {"transformer": r"time_(in|out)\..*|(blocks\.)?table|blocks\.cross_norm\..*", "vae": ".*"}
# (blocks, width) of published transformers, for messages about files that were made for another one.
KNOWN_SIZES = {(30, 1536): "Wan2.1's 1.3B model", (40, 5120): "a 14B model", (30, 3072): "Wan2.2-TI2V-5B"}


def _lora_stops(tensors: Mapping[str, tuple[str, str]]) -> list[str]:
    layers = {layer for layer, kind in tensors.values() if kind == "a"}
    lines = []
    if not any(name.startswith("blocks.") for name in layers):
        lines.append("it adapts no block")
    if "patch_embedding" in layers:
        lines.append("it adapts patch_embedding")
    for part in ("text_embedding", "time_embedding"):
        if len({f"{part}.0", f"{part}.2"} & layers) == 1:
            lines.append(f"it adapts one of the two layers of {part}")
    return lines


LORA_RULES = LoraRules(
    ("diffusion_model.", "lora_unet_"),
    lambda name, kind: kind in ("a", "b", "alpha") or (kind == "diff_b" and "norm" not in name),
    _lora_stops,
)


def transformer_entries(config: WanConfig, naming: Naming = "diffusers") -> Iterator[Entry]:
    """Every array of the transformer, under diffusers' names or those of the original code."""
    width, patch, channels, which = config.width, config.patch, config.channels, NAMINGS.index(naming)
    sizes = {
        "text_in": (config.text_width, width),
        "time_in": (config.time_width, width),
        "time_table": (width, 6 * width),
        "head": (width, patch**2 * channels),
        "blocks.mlp.up": (width, config.mlp),
        "blocks.mlp.down": (config.mlp, width),
    }
    for path, names in LORA_NAMES.items():
        inputs, outputs = sizes.get(path, (width, width))
        kernel = (f"{path}.kernel", f"{names[which]}.weight")
        if path == "patch":  # a convolution over patches there, a linear layer over (row, column, channel) here
            yield _entry(config, *kernel, (width, channels, 1, patch, patch), _unfold, _folder(patch, channels))
        else:
            yield _entry(config, *kernel, (outputs, inputs), transpose, transpose)
        yield _entry(config, f"{path}.bias", f"{names[which]}.bias", (outputs,))
    for path, names in _NORM_NAMES.items():
        yield _entry(config, path, names[which], (width,))
    first, again = lambda x: x[0], lambda x: x[None]
    for path, names in _TABLE_NAMES.items():
        yield _entry(config, path, names[which], (1, 6 if path.startswith("blocks") else 2, width), first, again)


def _unfold(x: np.ndarray) -> np.ndarray:
    """[out, channel, 1, row, column] -> [row column channel, out]."""
    return x[:, :, 0].transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _folder(patch: int, channels: int) -> Callable[[np.ndarray], np.ndarray]:
    """The way back of `_unfold`."""
    return lambda x: x.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)[:, :, None]


def _entry(config: WanConfig, path: str, name: str, shape: tuple[int, ...], ours=same, theirs=same) -> Entry:
    return Entry(path, name, shape, ours, theirs, config.depth if "{n}" in name else 0)


def vae_entries(config: VaeConfig, naming: Naming = "diffusers") -> Iterator[Entry]:
    """Every array of the autoencoder, under diffusers' names or those of the original code."""
    for entry in _vae_entries(config):
        yield entry if naming == "diffusers" else dataclasses.replace(entry, name=original_vae_name(entry.name, config))


_VAE_RENAMES = (
    (r"\bmid_block\.resnets\.0\.", "middle.0."),
    (r"\bmid_block\.attentions\.0\.", "middle.1."),
    (r"\bmid_block\.resnets\.1\.", "middle.2."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)


def original_vae_name(name: str, config: VaeConfig) -> str:
    """The original code's name of a tensor of the autoencoder that diffusers calls `name`."""
    for pattern, text in _VAE_RENAMES:
        name = re.sub(pattern, text, name)
    if config.shortcuts:  # 2.2: a list of levels, each a list of blocks with the change of resolution at its end
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"downsamples.\1.downsamples.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", r"upsamples.\1.upsamples.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsampler\.", rf"downsamples.\1.downsamples.{config.blocks}.", name)
        return re.sub(r"up_blocks\.(\d+)\.upsampler\.", rf"upsamples.\1.upsamples.{config.blocks + 1}.", name)
    # 2.1: one list. diffusers has it so in the encoder, and by level in the decoder.
    name = name.replace("down_blocks.", "downsamples.")
    level = lambda match: int(match[1]) * (config.blocks + 2)  # noqa: E731
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"upsamples.{level(m) + int(m[2])}", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"upsamples.{level(m) + config.blocks + 1}", name)


def _vae_entries(config: VaeConfig) -> Iterator[Entry]:
    levels = len(config.multiples)
    pixels = 3 * config.patch**2

    # Encoder
    widths = [config.encoder_width * m for m in (1, *config.multiples)]
    yield from _conv("encoder.conv_in", "encoder.conv_in", pixels, widths[0])
    width, place = widths[0], 0  # the 2.1 encoder's blocks lie in one list
    for level in range(levels):
        width = widths[level]
        for i in range(config.blocks):
            name = f"down_blocks.{level}.resnets.{i}" if config.shortcuts else f"down_blocks.{place}"
            yield from _residual(f"encoder.down_{level}.res_{i}", f"encoder.{name}", width, widths[level + 1])
            width, place = widths[level + 1], place + 1
        if level < levels - 1:
            name = f"encoder.down_blocks.{level}.downsampler" if config.shortcuts else f"encoder.down_blocks.{place}"
            yield from _conv(f"encoder.down_{level}.space", f"{name}.resample.1", width, width, (3, 3))
            if config.halve_time[level]:
                yield from _conv(f"encoder.down_{level}.time", f"{name}.time_conv", width, width, (3, 1, 1))
            place += 1
    yield from _ends("encoder", width, 2 * config.channels)

    # Decoder
    widths = [config.decoder_width * m for m in (config.multiples[-1], *reversed(config.multiples))]
    yield from _conv("decoder.conv_in", "decoder.conv_in", config.channels, widths[0])
    for level in range(levels):
        # Without shortcuts (2.1) the step to a higher resolution halves the channels.
        width = widths[level] if config.shortcuts or not level else widths[level] // 2
        block = f"decoder.up_blocks.{level}"
        for i in range(config.blocks + 1):
            name = f"{block}.resnets.{i}"
            yield from _residual(f"decoder.up_{level}.res_{i}", name, width, widths[level + 1])
            width = widths[level + 1]
        if level < levels - 1:
            name = f"{block}.upsampler" if config.shortcuts else f"{block}.upsamplers.0"
            out = width if config.shortcuts else width // 2
            yield from _conv(f"decoder.up_{level}.space", f"{name}.resample.1", width, out, (3, 3))
            if config.halve_time[levels - 2 - level]:
                yield from _conv(f"decoder.up_{level}.time", f"{name}.time_conv", width, 2 * width, (3, 1, 1))
    yield from _ends("decoder", width, pixels, middle=widths[0])

    yield from _conv("quant", "quant_conv", 2 * config.channels, 2 * config.channels, (1, 1, 1))
    yield from _conv("post_quant", "post_quant_conv", config.channels, config.channels, (1, 1, 1))


def _ends(side: str, width: int, outputs: int, middle: int | None = None) -> Iterator[Entry]:
    """The middle block and the last layers of encoder or decoder."""
    inner = width if middle is None else middle
    for i in range(2):
        yield from _residual(f"{side}.mid_{i}", f"{side}.mid_block.resnets.{i}", inner, inner)
    yield from _gain(f"{side}.attention.norm", f"{side}.mid_block.attentions.0.norm", inner, 2)
    yield from _conv(f"{side}.attention.qkv", f"{side}.mid_block.attentions.0.to_qkv", inner, 3 * inner, (1, 1))
    yield from _conv(f"{side}.attention.out", f"{side}.mid_block.attentions.0.proj", inner, inner, (1, 1))
    yield from _gain(f"{side}.norm_out", f"{side}.norm_out", width, 3)
    yield from _conv(f"{side}.conv_out", f"{side}.conv_out", width, outputs)


def _residual(path: str, name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield from _gain(f"{path}.norm1", f"{name}.norm1", inputs, 3)
    yield from _conv(f"{path}.conv1", f"{name}.conv1", inputs, outputs)
    yield from _gain(f"{path}.norm2", f"{name}.norm2", outputs, 3)
    yield from _conv(f"{path}.conv2", f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{path}.shortcut", f"{name}.conv_shortcut", inputs, outputs, (1, 1, 1))


def _conv(path: str, name: str, inputs: int, outputs: int, size: tuple[int, ...] = (3, 3, 3)) -> Iterator[Entry]:
    """Kernels [out in (t) h w] there, [t h w in out] here, with t = 1 for those of images."""
    flat = len(size) == 2
    yield Entry(
        f"{path}.kernel", f"{name}.weight", (outputs, inputs, *size),
        lambda x: np.moveaxis(x[:, :, None] if flat else x, (0, 1), (4, 3)),
        lambda x: np.moveaxis(x, (4, 3), (0, 1))[:, :, 0] if flat else np.moveaxis(x, (4, 3), (0, 1)),
    )  # fmt: skip
    yield Entry(f"{path}.bias", f"{name}.bias", (outputs,))


def _gain(path: str, name: str, width: int, axes: int) -> Iterator[Entry]:
    """Gains of a norm, there with an axis for each of the pixels'."""
    shape = (width, *[1] * axes)
    yield Entry(f"{path}.gain", f"{name}.gamma", shape, lambda x: x.reshape(-1), lambda x: x.reshape(shape))
