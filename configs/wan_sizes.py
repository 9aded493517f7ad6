"""Larger transformers of Wan's kind, to be planned (`world-distill plan`) or trained from nothing: no weights of these
sizes are published in this form.

Commands:  world-distill plan --config wan_sizes:13b --topology v5e:2x2 …      (launch/README.md, "Does it fit?")

Variants, `--config wan_sizes:VARIANT`, all with the settings of `wan22_5b:wmsd`:
  13b   as deep and as wide as LTX-2's video stream (arXiv 2601.03233), 6,144 tokens a clip
  14b   as Wan2.1-14B (arXiv 2503.20314) with its autoencoder, 32,760 tokens a clip (81 frames of 480x832)
  19b   13b's clips, with 14b's heads and more blocks of a wider MLP
"""

from ml_collections import ConfigDict

from world_distill.config import UserError, did_you_mean, load_config, override, parse_arg

_CLIP = {"model.size": (512, 768), "model.frames": 61}
VARIANTS = {
    "13b": _CLIP | {"model.width": 4096, "model.depth": 48, "model.heads": 32, "model.mlp": 16384},
    "14b": {
        "model.size": (480, 832), "model.frames": 81, "model.fps": 16.0,
        "model.width": 5120, "model.depth": 40, "model.heads": 40, "model.mlp": 13824,
        "model.channels": 16, "model.vae.channels": 16, "model.vae.encoder_width": 96, "model.vae.decoder_width": 96,
        "model.vae.halve_time": (False, True, True), "model.vae.patch": 1, "model.vae.shortcuts": False,
    },
    "19b": _CLIP | {"model.width": 5120, "model.depth": 48, "model.heads": 40, "model.mlp": 18432},
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """The config of a variant; see the module's text."""
    variant = parse_arg(arg, variant="13b").variant
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; {did_you_mean(variant, VARIANTS)}")
    c = load_config("wan22_5b:wmsd")
    override(c, VARIANTS[variant])
    return c
