"""Wan's networks beside diffusers', part by part: inputs, and what each of the two makes of them.

Ours has channels last, theirs first.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from world_distill.models.parity import PartParity, filled
from world_distill.models.wan import vae
from world_distill.models.wan.family import WanFamily, build, codec_sizes
from world_distill.models.wan.published import original_vae_name, vae_entries
from world_distill.structs import PyTree

GRID = (3, 4, 6)  # tokens: frames, rows, columns
TOKENS = 32  # of text
TIME = 0.625  # of the frames after the first, which is clean


def parity(sizes: Mapping[str, Any]) -> tuple[WanFamily, dict[str, PartParity]]:
    """The family of these sizes for short, small clips in float32, and the comparison of each part of its base."""
    codec = codec_sizes(sizes["vae"])
    side = 2 * codec.space * sizes["patch"]
    small = {"size": (side, side), "frames": 1 + codec.time, "dtype": "float32", "remat": "none"}
    family = build(**{**sizes, **small})
    return family, {
        "transformer": PartParity(
            _transformer_inputs, _our_transformer, _load_transformer, _build_transformer, _their_transformer
        ),
        "vae": PartParity(_vae_inputs, _our_vae, _load_vae, functools.partial(_build_vae, codec=codec), _their_vae),
    }


def _load_transformer(source: pathlib.Path) -> Any:
    return _read("WanTransformer3DModel", source / "transformer")


def _load_vae(source: pathlib.Path) -> Any:
    return _read("AutoencoderKLWan", source / "vae")


def _read(name: str, folder: pathlib.Path) -> Any:
    import torch

    return _kind(name).from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()


def _kind(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)  # it makes its names when they are asked for


def _build_transformer(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """diffusers' network with tensors of the original layout, under the names that diffusers gives them."""
    from diffusers.loaders import single_file_utils

    renamed = single_file_utils.convert_wan_transformer_to_diffusers(dict(tensors))
    return filled(_kind("WanTransformer3DModel").from_config(dict(config)), renamed)


def _build_vae(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], codec: vae.VaeConfig) -> Any:
    """As `_build_transformer`; of 2.2, diffusers has no table of the original names, so the names are ours."""
    theirs = {original_vae_name(name, codec): name for entry in vae_entries(codec) for name in entry.names}
    renamed = {theirs[name]: tensor for name, tensor in tensors.items()}
    return filled(_kind("AutoencoderKLWan").from_config(dict(config)), renamed)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def _transformer_inputs(family: WanFamily) -> dict[str, np.ndarray]:
    config, (f, h, w) = family.config, GRID
    return {
        "x": _normal(1, f, h * config.patch, w * config.patch, config.channels),
        "t": np.array([[0.0] + [TIME] * (f - 1)], np.float32),
        "text": _normal(1, TOKENS, config.text_width),
    }


def _our_transformer(family: WanFamily, weights: PyTree, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    return {"transformer": np.asarray(jax.jit(family.network)(weights, *inputs.values()))}


def _their_transformer(network: Any, x: np.ndarray, t: np.ndarray, text: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    by_token = torch.from_numpy(1000 * t).repeat_interleave(GRID[1] * GRID[2], dim=1)
    states, words = torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(text)
    with torch.inference_mode():
        v = network(hidden_states=states, timestep=by_token, encoder_hidden_states=words).sample
    return {"transformer": np.moveaxis(v.numpy(), 1, -1)}


def _vae_inputs(family: WanFamily) -> dict[str, np.ndarray]:
    clip = _normal(1, 1 + family.codec.config.time, *family.size, 3)
    return {"clip": np.clip(clip / 2, -1, 1), "latents": _normal(1, *family.latents["video"].shape)}


def _our_vae(family: WanFamily, weights: PyTree, clip: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    encode, decode = (jax.jit(f, static_argnums=2) for f in (vae.encode, vae.decode))
    return {
        "vae_encode": np.asarray(encode(weights, clip, family.codec.config)),
        "vae_decode": np.asarray(decode(weights, latents, family.codec.config)),
    }


def _their_vae(network: Any, clip: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    mean, std = (np.array(network.config[f"latents_{name}"], np.float32) for name in ("mean", "std"))
    with torch.inference_mode():
        encoded = network.encode(torch.from_numpy(np.moveaxis(clip, -1, 1))).latent_dist.mode()
        decoded = network.decode(torch.from_numpy(np.moveaxis(latents * std + mean, -1, 1))).sample
    encoded, decoded = (np.moveaxis(x.numpy(), 1, -1) for x in (encoded, decoded))
    return {"vae_encode": (encoded - mean) / std, "vae_decode": decoded}
