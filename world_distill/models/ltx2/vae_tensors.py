"""Names, layouts and sizes of the video autoencoder of LTX-2 as published, beside ours.

diffusers keeps it in the folder vae/, Lightricks' single files (ltx-2-19b-dev.safetensors) after the prefix `vae.`; the
names here are without it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from world_distill.models.ltx2.vae import STRIDES, UP, VaeConfig
from world_distill.models.tensor_map import Entry

Naming = Literal["diffusers", "original"]

# Tensors of the single files that nothing reads: other statistics of the latents.
UNUSED = r"per_channel_statistics\.(channel|mean-of-stds.*)"
# What the network here is built with, key and value in diffusers' config.json; another value is another network.
_FIXED = {
    "in_channels": 3, "out_channels": 3, "patch_size_t": 1, "timestep_conditioning": False, "encoder_causal": True,
    "decoder_causal": False, "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "reflect",
    "scaling_factor": 1.0,
}  # fmt: skip
# The same for lists, all of whose items have that value.
_EACH = {
    "down_block_types": "LTX2VideoDownBlock3D", "spatio_temporal_scaling": True, "upsample_type": "spatiotemporal",
    "decoder_spatio_temporal_scaling": True, "decoder_inject_noise": False, "upsample_residual": True,
    "upsample_factor": 2,
}  # fmt: skip


def vae_config(config: Mapping[str, Any]) -> VaeConfig:
    """Ours, from vae/config.json.

    Raises:
      ValueError: a network that is not built here, such as that of LTX-2.3.
    """
    for key, value in _FIXED.items():
        # diffusers' own default of `decoder_causal` is not that of the published models, so it has to be there.
        if config.get(key, None if key == "decoder_causal" else value) != value:
            raise ValueError(f"vae/config.json has {key} = {config.get(key)}; only {value} is built here")
    for key, value in _EACH.items():
        items = config.get(key, value)
        if any(item != value for item in (items if isinstance(items, list | tuple) else [items])):
            raise ValueError(f"vae/config.json has {key} = {items}; only {value} is built here")
    return VaeConfig(
        channels=config["latent_channels"],
        encoder_widths=tuple(config["block_out_channels"]),
        encoder_blocks=tuple(config["layers_per_block"]),
        steps=tuple(config["downsample_type"]),
        decoder_widths=tuple(config["decoder_block_out_channels"]),
        decoder_blocks=tuple(config["decoder_layers_per_block"]),
        patch=config["patch_size"],
    )


def published_vae_config(config: VaeConfig) -> dict[str, Any]:
    """diffusers' vae/config.json, from ours: what `vae_config` reads."""
    down, up = len(config.steps), len(config.decoder_widths)
    lengths = {"down_block_types": down, "spatio_temporal_scaling": down, "decoder_inject_noise": up + 1}
    return {
        "_class_name": "AutoencoderKLLTX2Video", "latent_channels": config.channels,
        "block_out_channels": list(config.encoder_widths), "layers_per_block": list(config.encoder_blocks),
        "downsample_type": list(config.steps), "decoder_block_out_channels": list(config.decoder_widths),
        "decoder_layers_per_block": list(config.decoder_blocks), "patch_size": config.patch, "resnet_norm_eps": 1e-6,
        "spatial_compression_ratio": config.space, "temporal_compression_ratio": config.time, **_FIXED,
        **{key: [value] * lengths.get(key, up) for key, value in _EACH.items()},
    }  # fmt: skip


def original_vae_config(shapes: Mapping[str, tuple[int, ...]]) -> VaeConfig:
    """Ours, from the shapes of the tensors under their original names.

    Raises:
      ValueError: tensors of another network.
    """
    try:
        pixels, channels = shapes["encoder.conv_in.conv.weight"][1], shapes["decoder.conv_in.conv.weight"][1]
        down, up = (_last(shapes, rf"{side}_blocks") // 2 for side in ("encoder.down", "decoder.up"))
        outputs = lambda name: shapes[f"{name}.conv.conv.weight"][0]  # noqa: E731
        widths = [shapes[f"encoder.down_blocks.{2 * i}.res_blocks.0.conv1.conv.weight"][0] for i in range(down + 1)]
        # A step's convolution has as many outputs as channels follow, divided by the size of a box.
        boxes = [widths[i + 1] // outputs(f"encoder.down_blocks.{2 * i + 1}") for i in range(down)]
        decoder_widths = [outputs(f"decoder.up_blocks.{2 * i + 1}") // 4 for i in range(up)]
        blocks = lambda name: 1 + _last(shapes, rf"{name}.res_blocks")  # noqa: E731
        sizes = {math.prod(strides): step for step, strides in STRIDES.items()}
        return VaeConfig(
            channels=channels,
            encoder_widths=tuple(widths[1:]),
            encoder_blocks=tuple(blocks(f"encoder.down_blocks.{2 * i}") for i in range(down + 1)),
            steps=tuple(sizes[box] for box in boxes),
            decoder_widths=tuple(reversed(decoder_widths)),
            decoder_blocks=tuple(blocks(f"decoder.up_blocks.{2 * i}") for i in reversed(range(up + 1))),
            patch=math.isqrt(pixels // 3),
        )
    except KeyError as error:
        raise ValueError(f"its autoencoder lacks {error}, or has steps that are not built here") from error


def _last(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """The highest number that follows a prefix."""
    return max((int(m[1]) for key in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))), default=-1)


def vae_entries(config: VaeConfig, naming: Naming = "diffusers") -> Iterator[Entry]:
    """Every array of the autoencoder, under diffusers' names or those of the original code."""
    for entry in _vae_entries(config):
        yield entry if naming == "diffusers" else dataclasses.replace(entry, name=original_vae_name(entry.name, config))


def original_vae_name(name: str, config: VaeConfig) -> str:
    """The original code's name of a tensor that diffusers calls `name`.

    The original keeps blocks and steps in one list, from the image's side in the encoder, to it in the decoder.
    """
    statistics = {"latents_mean": "mean-of-means", "latents_std": "std-of-means"}
    if name in statistics:
        return f"per_channel_statistics.{statistics[name]}"
    place = lambda offset: lambda match: f"{match[1]}.{2 * int(match[2]) + offset}"  # noqa: E731
    if name.startswith("encoder."):
        name = name.replace("mid_block", f"down_blocks.{len(config.steps)}")
        name = re.sub(r"(down_blocks)\.(\d+)(?=\.resnets)", place(0), name)
        name = re.sub(r"(down_blocks)\.(\d+)\.downsamplers\.0", place(1), name)
    else:
        name = re.sub(r"(up_blocks)\.(\d+)(?=\.resnets)", place(2), name)
        name = re.sub(r"(up_blocks)\.(\d+)\.upsamplers\.0", place(1), name)
        name = name.replace("mid_block", "up_blocks.0")
    return name.replace("resnets", "res_blocks")


def _vae_entries(config: VaeConfig) -> Iterator[Entry]:
    pixels = 3 * config.patch**2

    yield from _conv("encoder.conv_in", "encoder.conv_in", pixels, config.channels)
    width = config.channels
    for level, (step, after) in enumerate(zip(config.steps, config.encoder_widths, strict=True)):
        path, name = f"encoder.down_{level}", f"encoder.down_blocks.{level}"
        yield from _blocks(f"{path}.blocks", name, width, config.encoder_blocks[level])
        yield from _conv(f"{path}.step", f"{name}.downsamplers.0.conv", width, after // math.prod(STRIDES[step]))
        width = after
    yield from _blocks("encoder.middle", "encoder.mid_block", width, config.encoder_blocks[-1])
    yield from _conv("encoder.conv_out", "encoder.conv_out", width, config.channels + 1)

    widths, blocks = config.decoder_widths[::-1], config.decoder_blocks[::-1]
    yield from _conv("decoder.conv_in", "decoder.conv_in", config.channels, widths[0])
    yield from _blocks("decoder.middle", "decoder.mid_block", widths[0], blocks[0])
    for level, width in enumerate(widths):
        path, name = f"decoder.up_{level}", f"decoder.up_blocks.{level}"
        yield from _conv(f"{path}.step", f"{name}.upsamplers.0.conv", width, width // 2 * math.prod(UP))
        yield from _blocks(f"{path}.blocks", name, width // 2, blocks[level + 1])
    yield from _conv("decoder.conv_out", "decoder.conv_out", widths[-1] // 2, pixels)

    yield Entry("mean", "latents_mean", (config.channels,))
    yield Entry("std", "latents_std", (config.channels,))


def _blocks(path: str, name: str, width: int, count: int) -> Iterator[Entry]:
    """The residual blocks of a level, stacked here."""
    for conv in ("conv1", "conv2"):
        yield from _conv(f"{path}.{conv}", f"{name}.resnets.{{n}}.{conv}", width, width, count)


def _conv(path: str, name: str, inputs: int, outputs: int, blocks: int = 0) -> Iterator[Entry]:
    """Kernels [out in t h w] there, [t h w in out] here."""
    yield Entry(
        f"{path}.kernel", f"{name}.conv.weight", (outputs, inputs, 3, 3, 3),
        lambda x: np.moveaxis(x, (0, 1), (4, 3)), lambda x: np.moveaxis(x, (4, 3), (0, 1)), blocks,
    )  # fmt: skip
    yield Entry(f"{path}.bias", f"{name}.conv.bias", (outputs,), blocks=blocks)
