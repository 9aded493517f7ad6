"""Wan's original layout: the repository of its authors, and the single files of ComfyUI, which keep its names.

Sizes are read from the tensors' shapes. Heads and eps show in no shape: they come from the repository's config.json, or
are those of all published models, as ComfyUI assumes them too.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from world_distill.models.tensor_map import Entry, Published
from world_distill.models.wan.modeling import WanConfig
from world_distill.models.wan.published import Naming, WanPublished, transformer_entries, vae_entries
from world_distill.models.wan.vae import VaeConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD = 128  # width of an attention head in all published models
EPS = 1e-6
# What the files of other models hold, by a part of a key. They have conditioning that is not built here.
OTHERS = {
    "vace_": "a VACE model",
    "img_emb.": "an image-to-video model that sees the image through CLIP",
    "control_adapter.": "a camera-control model",
    "audio_": "an audio-driven model",
    "face_adapter.": "an Animate model",
    "motion_encoder.": "an Animate model",
    "ref_conv.": "a Fun-Control model",
    "double_blocks.": "HunyuanVideo or FLUX",
    "transformer_blocks.": "LTX-Video, or another model than Wan",
}
# Mean and deviation of latents, by their channels: in diffusers' config, and nowhere in the original files.
LATENTS = {
    16: (
        "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922 -.9497 .2503 -.2921",
        "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251"
        " 1.916",
    ),
    48: (
        "-.2289 -.0052 -.1323 -.2339 -.2799 .0174 .1838 .1557 -.1382 .0542 .2813 .0891 .157 -.0098 .0375 -.1825 -.2246"
        " -.1207 -.0698 .5109 .2665 -.2108 -.2158 .2502 -.2055 -.0322 .1109 .1567 -.0729 .0899 -.2799 -.123 -.0313"
        " -.1649 .0117 .0723 -.2839 -.2083 -.052 .3748 .0152 .1957 .1433 -.2944 .3573 -.0548 -.1681 -.0667",
        ".4765 1.0364 .4514 1.1677 .5313 .499 .4818 .5013 .8158 1.0344 .5894 1.0901 .6885 .6165 .8454 .4978 .5759 .3523"
        " .7135 .6804 .5833 1.4146 .8986 .5659 .7069 .5338 .4889 .4917 .4069 .4999 .6866 .4093 .5709 .6065 .6415 .4944"
        " .5726 1.2042 .5458 1.6887 .3971 1.06 .3943 .5537 .5444 .4089 .7468 .7744",
    ),
}


def describe(transformer: Shapes, vae: Shapes, settings: Mapping[str, Any], namings: Mapping[str, Naming]) -> Published:
    """What there is to convert, from the shapes of both parts.

    Args:
      transformer: name -> shape, without prefix.
      vae: name -> shape.
      settings: the original repository's config.json; {} where there is none.
      namings: part -> whose names its tensors have.

    Raises:
      ValueError: a network that is not built here.
    """
    network, codec = transformer_config(transformer, settings, namings["transformer"]), vae_config(vae)
    if network.channels != codec.channels:
        raise ValueError(f"its transformer has {network.channels} latent channels, its autoencoder {codec.channels}")
    if network.channels not in LATENTS:
        raise ValueError(
            f"mean and deviation of latents with {network.channels} channels are known of no published model"
        )
    entries: dict[str, list[Entry]] = {
        "transformer": list(transformer_entries(network, namings["transformer"])),
        "vae": list(vae_entries(codec, namings["vae"])),
    }
    mean, std = (np.array([float(x) for x in text.split()], np.float32) for text in LATENTS[network.channels])
    return Published(WanPublished(network, codec), entries, {"vae.mean": mean, "vae.std": std})


def transformer_config(shapes: Shapes, settings: Mapping[str, Any], naming: Naming = "original") -> WanConfig:
    """Ours, from the shapes of the transformer's tensors and the repository's config.json."""
    for mark, what in OTHERS.items():
        if key := next((key for key in shapes if mark in key), None):
            raise ValueError(f"it is {what} ({key}), which is not built here")
    names = {entry.path: entry.names[0] for entry in transformer_entries(WanConfig(depth=1), naming)}
    try:
        patch, head = shapes[names["patch.kernel"]], shapes[names["head.kernel"]]
        width, channels = patch[0], patch[1]
        mlp, text = shapes[names["blocks.mlp.up.kernel"]][0], shapes[names["text_in.kernel"]][1]
        time = shapes[names["time_in.kernel"]][1]
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    depth = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key)))
    side = patch[-1]
    if head[0] != side * side * channels:
        raise ValueError(
            f"its input has {channels} channels and its output {head[0] // side**2}: such conditioning is not built"
            " here"
        )
    kind = settings.get("model_type")
    if kind not in (None, "ti2v") or (kind is None and channels == 16):
        raise ValueError(
            f"it is {'a text-to-video model of 16 channels' if kind is None else f'of the type {kind}'}: only models"
            " that take a clean first frame (ti2v, expand_timesteps) are conditioned as here"
        )
    expected = {"dim": width, "num_layers": depth, "ffn_dim": mlp, "freq_dim": time, "in_dim": channels}
    if other := [f"{k} = {settings[k]}, not {v}" for k, v in expected.items() if settings.get(k, v) != v]:
        raise ValueError(f"its config.json does not fit its tensors: {', '.join(other)}")
    if "num_heads" not in settings and width % HEAD:
        raise ValueError(f"its width {width} is no multiple of {HEAD}, so how many heads it has is not known")
    return WanConfig(
        channels=channels, width=width, depth=depth, heads=settings.get("num_heads", width // HEAD), mlp=mlp,
        text_width=text, time_width=time, patch=side, eps=settings.get("eps", EPS),
    )  # fmt: skip


def vae_config(shapes: Shapes) -> VaeConfig:
    """Ours, from the shapes of the autoencoder's tensors under their original names."""
    try:
        first, channels = shapes["encoder.conv1.weight"], shapes["conv2.weight"][0]
        decoder_width = shapes["decoder.head.0.gamma"][0]
    except KeyError as error:
        raise ValueError(f"its autoencoder lacks {error}") from error
    shortcuts = "encoder.downsamples.0.downsamples.0.residual.2.weight" in shapes  # 2.2
    levels, blocks, times = [], 0, []
    if shortcuts:
        count = 1 + max(int(m[1]) for key in shapes if (m := re.match(r"encoder\.downsamples\.(\d+)\.", key)))
        here = "encoder.downsamples.{}.downsamples.{}."
        while here.format(0, blocks) + "residual.2.weight" in shapes:
            blocks += 1
        levels = [shapes[here.format(i, blocks - 1) + "residual.2.weight"][0] for i in range(count)]
        times = [here.format(i, blocks) + "time_conv.weight" in shapes for i in range(count - 1)]
    else:
        place, widths = 0, []
        while any(key.startswith(f"encoder.downsamples.{place}.") for key in shapes):
            name = f"encoder.downsamples.{place}."
            if name + "residual.2.weight" in shapes:
                widths.append(shapes[name + "residual.2.weight"][0])
            else:
                levels.append(widths[-1])
                blocks, widths = len(widths), []
                times.append(name + "time_conv.weight" in shapes)
            place += 1
        levels.append(widths[-1])
    return VaeConfig(
        channels=channels, encoder_width=first[0], decoder_width=decoder_width,
        multiples=tuple(width // first[0] for width in levels), blocks=blocks, halve_time=tuple(times),
        patch=math.isqrt(first[1] // 3), shortcuts=shortcuts,
    )  # fmt: skip
