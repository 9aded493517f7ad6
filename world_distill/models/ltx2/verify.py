"""LTX-2's networks beside diffusers', part by part: inputs, and what each of the two makes of them.

Ours has channels last, theirs first.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.models.ltx2 import vae
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.ltx2.family import LTX2Family, build, codec_sizes
from world_distill.models.ltx2.published import connector_entries
from world_distill.models.parity import PartParity, filled
from world_distill.structs import PyTree

GRID, MOMENTS = (3, 4, 6), 10  # tokens of the video: frames, rows, columns; of the audio
TOKENS = 32  # of the states that a stream attends to
WORDS = (32, 20)  # real tokens of two texts
TIME = 0.625  # of all but the first frame, which is clean


def parity(sizes: Mapping[str, Any]) -> tuple[LTX2Family, dict[str, PartParity]]:
    """The family of these sizes for short, small clips in float32, and the comparison of each part of its base."""
    codec = codec_sizes(sizes["vae"])
    small = {"size": (2 * codec.space,) * 2, "frames": 1 + codec.time, "dtype": "float32", "vae_dtype": "float32"}
    family = build(**{**sizes, **small, "remat": "none"})
    return family, {
        "transformer": PartParity(
            _transformer_inputs, _our_transformer, _loader("LTX2VideoTransformer3DModel"), _build_transformer,
            _their_transformer,
        ),
        "connectors": PartParity(
            _texts, _our_connectors, _loader("LTX2TextConnectors"),
            functools.partial(_build_connectors, sizes=family.connectors), _their_connectors,
        ),
        "vae": PartParity(_clips, _our_vae, _loader("AutoencoderKLLTX2Video"), _build_vae, _their_vae),
    }  # fmt: skip


def _loader(name: str):
    def load(source: pathlib.Path) -> Any:
        import torch

        folder = source / {"LTX2TextConnectors": "connectors", "AutoencoderKLLTX2Video": "vae"}.get(name, "transformer")
        return _kind(name).from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()

    return load


def _kind(name: str) -> Any:
    import diffusers
    from diffusers.pipelines import ltx2

    return getattr(ltx2, name, None) or getattr(diffusers, name)


def _build_transformer(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """diffusers' network with tensors of the original layout, under the names that diffusers gives them."""
    from diffusers.loaders import single_file_utils

    renamed = single_file_utils.convert_ltx2_transformer_to_diffusers(dict(tensors))
    return filled(_kind("LTX2VideoTransformer3DModel").from_config(dict(config)), renamed)


def _build_vae(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    from diffusers.loaders import single_file_utils

    renamed = single_file_utils.convert_ltx2_vae_to_diffusers(dict(tensors))
    return filled(_kind("AutoencoderKLLTX2Video").from_config(dict(config)), renamed)


def _build_connectors(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], sizes: ConnectorConfig) -> Any:
    """Under our names: diffusers has the table in a script that is no part of it. The projection is not compared."""
    pairs = zip(connector_entries(sizes, "original"), connector_entries(sizes), strict=True)
    theirs = {name: own for a, b in pairs for name, own in zip(a.names, b.names, strict=True)}
    network = _kind("LTX2TextConnectors").from_config(dict(config))
    return filled(network, {theirs[name]: x for name, x in tensors.items()}, without=("text_proj_in.weight",))


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def _transformer_inputs(family: LTX2Family) -> dict[str, np.ndarray]:
    config = family.config
    return {
        "video": _normal(1, *GRID, config.channels),
        "audio": _normal(1, MOMENTS, config.audio_channels),
        "video_text": _normal(1, TOKENS, config.text_width),
        "audio_text": _normal(2, TOKENS, config.text_width)[:1],
    }


def _our_transformer(family: LTX2Family, weights: PyTree, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    t = jnp.array([[0.0, TIME]])
    times = {"video": (0,) + (1,) * (GRID[0] - 1), "audio": (1,) * MOMENTS}
    x, text = ({name: jnp.asarray(inputs[f"{name}{end}"]) for name in ("video", "audio")} for end in ("", "_text"))
    found = jax.jit(lambda weights: family.network(weights, x, t, text, None, 1.0, times))(weights)
    return {f"transformer_{name}": np.asarray(v) for name, v in found.items()}


def _their_transformer(network: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    video, audio, video_text, audio_text = map(torch.from_numpy, inputs.values())
    f, h, w = GRID
    t = torch.tensor([1000 * TIME])
    with torch.inference_mode():
        found = network(
            hidden_states=video.reshape(1, f * h * w, -1), audio_hidden_states=audio,
            encoder_hidden_states=video_text, audio_encoder_hidden_states=audio_text,
            timestep=(t * (torch.arange(f) > 0)).repeat_interleave(h * w)[None],
            audio_timestep=t.expand(1, MOMENTS), sigma=t, num_frames=f, height=h, width=w, fps=24.0,
            audio_num_frames=MOMENTS,
        )  # fmt: skip
    return {
        "transformer_video": found.sample.reshape(video.shape).numpy(), "transformer_audio": found.audio_sample.numpy(),
    }  # fmt: skip


def _texts(family: LTX2Family) -> dict[str, np.ndarray]:
    sizes = family.connectors
    return {"rows": _normal(len(WORDS), sizes.length, sizes.width)}


def _our_connectors(family: LTX2Family, weights: PyTree, rows: np.ndarray) -> dict[str, np.ndarray]:
    mask = np.arange(rows.shape[1]) < np.array(WORDS)[:, None]
    found = jax.jit(family.connect)(weights, rows, mask)
    return {f"connectors_{name}": np.asarray(states) for name, states in found.items()}


def _their_connectors(network: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    # Behind the projection, with texts at the end of their rows as the pipelines have them.
    length = rows.shape[1]
    moved = np.stack([np.roll(row, length - words, axis=0) for row, words in zip(rows, WORDS, strict=True)])
    mask = torch.arange(length) >= length - torch.tensor(WORDS)[:, None]
    hidden = (1.0 - mask.float())[:, None, None] * -10_000.0
    with torch.inference_mode():
        found = {
            name: getattr(network, f"{name}_connector")(torch.from_numpy(moved), hidden)[0]
            for name in ("video", "audio")
        }
    return {f"connectors_{name}": states.numpy() for name, states in found.items()}


def _clips(family: LTX2Family) -> dict[str, np.ndarray]:
    clip = _normal(1, 1 + family.codec.config.time, *family.size, 3)
    return {"clip": np.clip(clip / 2, -1, 1), "latents": _normal(1, *family.latents["video"].shape)}


def _our_vae(family: LTX2Family, weights: PyTree, clip: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    config = family.codec.config
    return {
        "vae_encode": np.asarray(jax.jit(lambda p, x: vae.encode(p, x, config=config))(weights, clip)),
        "vae_decode": np.asarray(jax.jit(lambda p, x: vae.decode(p, x, config=config))(weights, latents)),
    }


def _their_vae(network: Any, clip: np.ndarray, latents: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    mean, std = (getattr(network, f"latents_{name}").float().numpy() for name in ("mean", "std"))
    with torch.inference_mode():
        encoded = network.encode(torch.from_numpy(np.moveaxis(clip, -1, 1))).latent_dist.mode()
        decoded = network.decode(torch.from_numpy(np.moveaxis(latents * std + mean, -1, 1))).sample
    encoded, decoded = (np.moveaxis(x.numpy(), 1, -1) for x in (encoded, decoded))
    return {"vae_encode": (encoded - mean) / std, "vae_decode": decoded}
