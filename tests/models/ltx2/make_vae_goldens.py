"""Writes goldens/ from diffusers: random weights, inputs, what diffusers makes of them, and the full size's names.

    pip install -e '.[torch]' && python tests/models/ltx2/make_vae_goldens.py

Every parameter is drawn anew: tables and gates that start at zero would hide what lies behind them.
"""

import gzip
import json
import pathlib
from typing import Any

import diffusers
import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent / "goldens"
# What is published for 2.0, but for the sizes.
VAE = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ("LTX2VideoDownBlock3D",) * 4,
    "spatio_temporal_scaling": (True,) * 4, "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"), "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3, "timestep_conditioning": False, "patch_size": 4, "patch_size_t": 1,
    "resnet_norm_eps": 1e-6, "encoder_causal": True, "decoder_causal": False, "encoder_spatial_padding_mode": "zeros",
    "decoder_spatial_padding_mode": "reflect", "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip
FULL = VAE | {
    "latent_channels": 128, "block_out_channels": (256, 512, 1024, 2048), "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 5, 5, 5),
}  # fmt: skip
# Every level has another number of blocks than its neighbours.
SMALL = VAE | {
    "latent_channels": 4, "block_out_channels": (8, 8, 16, 16), "layers_per_block": (1, 2, 1, 2, 1),
    "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (2, 1, 2, 1),
}  # fmt: skip


def redraw(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module with matrices of unit gain and small biases, all random, as are buffers of latents' statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim >= 2 else 0.1 * noise)
        for name, buffer in module.named_buffers():
            noise = torch.randn(buffer.shape, generator=generator)
            buffer.copy_((0.3 * noise).exp() if name.endswith("std") else noise)
    return module.eval()


def codec(seed: int, config: dict[str, Any] = SMALL) -> diffusers.AutoencoderKLLTX2Video:
    """A random autoencoder whose weights float16 holds exactly: files are half as large, and nothing is lost."""
    model = redraw(diffusers.AutoencoderKLLTX2Video(**config), seed)
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    return model


def vae(seed: int, clip: tuple[int, int, int], rows: int = 1, config: dict[str, Any] = SMALL) -> dict[str, np.ndarray]:
    """Weights (`w:NAME`), bytes of clips and their normalised latents `z`; other latents, and their decoded clips `y`.

    The latents that are decoded are random ones: an error of the encoder is none of the decoder.
    """
    model = codec(seed, config)
    generator = torch.Generator().manual_seed(seed + 1)
    pixels = torch.randint(256, (rows, 3, *clip), generator=generator, dtype=torch.uint8)
    x = pixels / 127.5 - 1
    mean, std = (v.view(1, -1, 1, 1, 1) for v in (model.latents_mean, model.latents_std))
    with torch.no_grad():
        z = (model.encode(x).latent_dist.mode() - mean) / std
        latents = torch.randn(z.shape, generator=generator)
        y = model.decode(latents * std + mean).sample
    arrays = {"pixels": pixels, "z": z, "latents": latents, "y": y}
    weights = {f"w:{k}": v.half().numpy() for k, v in model.state_dict().items()}
    return {k: a.numpy() for k, a in arrays.items()} | weights


def official_shapes() -> dict[str, dict[str, list[int]]]:
    """Name -> shape of every tensor of LTX-2 19B's parts, built without weights."""
    with torch.device("meta"):
        models = {"vae": diffusers.AutoencoderKLLTX2Video(**FULL)}
    return {part: {k: list(v.shape) for k, v in model.state_dict().items()} for part, model in models.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    golden = vae(31, (9, 64, 96))
    golden["y"] = golden["y"][..., ::7, ::5]  # the file stays small; the last row and column are among them
    np.savez_compressed(FOLDER / "vae.npz", **golden)
    text = json.dumps(official_shapes(), separators=(",", ":"))
    (FOLDER / "vae_19b_shapes.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
