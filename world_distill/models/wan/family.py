"""`interfaces.ModelFamily` for Wan2.2-TI2V-5B: transformer, autoencoder 2.2, umT5 text states.

The base is `{"transformer": weights, "vae": weights}`. LoRA and full differences are of the transformer.
"""

import copy
import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from world_distill.devices.sharding import gathered, map_rows
from world_distill.models import lora as lora_lib
from world_distill.models.functional import Functional, functional
from world_distill.models.tensor_map import Entry, our_shapes
from world_distill.models.wan import vae
from world_distill.models.wan.modeling import WanConfig, WanDiT
from world_distill.models.wan.params import LORA_NAMES, published_configs, transformer_entries, vae_entries
from world_distill.structs import Condition, PyTree

# Texts are padded to so many tokens, with zeros that attend like any other token: so the model was trained.
TEXT_LENGTH = 512


class WanFamily:
    """Sizes and pure functions; see `interfaces.ModelFamily` for the contract.

    Args:
      config: sizes of the transformer.
      codec: sizes of the autoencoder.
      size: height and width of a clip in pixels.
      frames: of a clip.
      fps: frames a second of a clip.
      dtype, vae_dtype: of the weights of transformer and autoencoder.
      piece: latent frames that the autoencoder decodes at a time; 0: all.
      rows: clips that are decoded at a time, over all devices; 0: all.
      text_encoder: folder with `text_encoder/` and `tokenizer/`, or "words" for states without weights.
      lora_targets: pattern of the layers that LoRA adapts.
      lora_scale: factor on the product of LoRA's factors (alpha / rank).
    """

    name = "wan"
    shipped_bases: Mapping[str, pathlib.Path] = {}
    codec_parts: tuple[str, ...] = ("vae",)
    lora_names: Mapping[str, tuple[str, str]] | None = LORA_NAMES

    def __init__(
        self,
        config: WanConfig,
        codec: vae.VaeConfig,
        *,
        size: tuple[int, int],
        frames: int,
        fps: float,
        dtype: str,
        vae_dtype: str,
        piece: int,
        rows: int,
        text_encoder: str,
        lora_targets: str,
        lora_scale: float,
    ):
        codec.check_clip(frames, *size)
        self.config, self.codec, self.fps = config, codec, fps
        self.image_size: tuple[int, int] | None = (size[0], size[1])
        self.dtype, self.vae_dtype = jnp.dtype(dtype), jnp.dtype(vae_dtype)
        self.piece, self.rows, self.text_encoder = piece, rows, text_encoder
        self.lora_targets, self.lora_scale = lora_targets, lora_scale
        self.latent_shape = (
            1 + (frames - 1) // codec.time, size[0] // codec.space, size[1] // codec.space, config.channels,
        )  # fmt: skip
        self.tokens = math.prod(self.latent_shape[:3]) // config.patch**2
        self.free_frames = np.array([0.0] + [1.0] * (self.latent_shape[0] - 1), np.float32)

    @functools.cached_property
    def network(self) -> Functional:
        """The transformer as a function of its weights."""
        return functional(WanDiT, self.config)

    def on(self, mesh: Mesh) -> "WanFamily":
        """The same with its activations laid out on a mesh: rows, places in a frame, heads."""
        placed = copy.copy(self)
        placed.__dict__ = {k: v for k, v in vars(self).items() if k not in ("network", "_encode")}
        placed.config = dataclasses.replace(self.config, mesh=mesh)
        return placed

    def entries(self) -> dict[str, list[Entry]]:
        """Where each array of the base lies in the published model."""
        return {"transformer": list(transformer_entries(self.config)), "vae": list(vae_entries(self.codec))}

    def published_configs(self, base: PyTree) -> dict[str, Any]:
        """config.json of the published model's parts."""
        statistics = (np.asarray(base["vae"][name]) for name in ("mean", "std"))
        return published_configs(self.config, self.codec, *statistics)

    def init_base(self, key: jax.Array) -> PyTree:
        transformer = self.network.init(jax.random.fold_in(key, 0))
        leaves, structure = jax.tree_util.tree_flatten_with_path(self._codec_shapes(), is_leaf=_is_shape)
        sizes = [math.prod(shape) for _, shape in leaves]
        # One draw for all: XLA's CPU compiler takes a minute over a hundred of them.
        noise = jax.random.normal(jax.random.fold_in(key, 1), (sum(sizes),), self.vae_dtype)
        parts = jnp.split(noise, np.cumsum(sizes)[:-1])
        codec = [_random_codec(path[-1].key, x.reshape(shape)) for (path, shape), x in zip(leaves, parts, strict=True)]
        return {
            "transformer": jax.tree.map(lambda x: x.astype(self.dtype), transformer),
            "vae": jax.tree.unflatten(structure, codec),
        }

    def _codec_shapes(self) -> PyTree:
        channels = self.codec.channels
        return our_shapes(vae_entries(self.codec)) | {"mean": (channels,), "std": (channels,)}

    def base_axes(self) -> PyTree:
        # Kept in parts and gathered before use: convolutions gain nothing from cut channels.
        codec = jax.tree.map(_conv_axes, self._codec_shapes(), is_leaf=_is_shape)
        return {"transformer": self.network.axes(), "vae": codec}

    def init_lora(self, key: jax.Array, base: PyTree, *, rank: int | None) -> PyTree:
        if rank is None:
            return lora_lib.init_full(base["transformer"])
        return lora_lib.init_lora(key, base["transformer"], rank=rank, targets=self.lora_targets)

    def lora_axes(self, lora: PyTree) -> PyTree:
        return lora_lib.lora_axes(lora, self.network.axes())

    def kernel_shapes(self) -> dict[str, tuple[int, ...]]:
        return lora_lib.kernel_shapes(jax.eval_shape(self.network.init, jax.random.key(0)))

    def denoise(self, base: PyTree, lora: PyTree | None, x_t: jax.Array, t: jax.Array, condition: Condition):
        weights, lora = lora_lib.apply_full(base["transformer"], lora)
        x = jnp.concatenate([condition.scene, x_t[:, 1:]], axis=1)
        # The text's mask is left out on purpose, see TEXT_LENGTH.
        velocity = self.network(weights, x, t[:, None] * self.free_frames, condition.text, lora, self.lora_scale)
        return velocity * self.free_frames[:, None, None, None]

    def decode(self, base: PyTree, latents: jax.Array) -> jax.Array:
        weights = gathered(self.config.mesh, base["vae"])

        def some(latents):
            clips = vae.decode(weights, latents, self.codec, piece=self.piece, mesh=self.config.mesh)
            return jnp.round((clips.astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)

        return map_rows(some, self.rows, latents)

    def encode_traceable(self, base: PyTree, images: jax.Array) -> jax.Array:
        """`encode_scene` of arrays on devices, to be jitted."""
        weights = gathered(self.config.mesh, base["vae"])
        return vae.encode(weights, images[:, None].astype(jnp.float32) / 127.5 - 1, self.codec)

    @functools.cached_property
    def _encode(self):
        return jax.jit(self.encode_traceable)

    def encode_scene(self, base: PyTree, images: np.ndarray) -> np.ndarray:
        if images.shape[1:3] != self.image_size:
            raise ValueError(f"scene images are {images.shape[1:3]} pixels; this model takes {self.image_size}")
        return np.asarray(self._encode(base, images))

    @functools.cached_property
    def _texts(self):
        if self.text_encoder == "words":
            from world_distill.models.hashed_words import encode_text

            return lambda texts: [encode_text(text, self.config.text_width) for text in texts]
        if not self.text_encoder:
            raise ValueError(
                "no text encoder: set config.model.text_encoder to the published model's folder (the one that holds"
                " text_encoder/ and tokenizer/)"
            )
        from world_distill.models.wan.text import UMT5TextEncoder

        return UMT5TextEncoder(self.text_encoder, max_length=TEXT_LENGTH).encode

    def encode_text(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._texts(texts)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def _conv_axes(shape: tuple[int, ...]) -> tuple[str | None, ...] | None:
    """Names of a convolution's axes: the wider of its channels, in or out, may be cut. Vectors stay whole."""
    if len(shape) < 3:
        return None
    return (*[None] * (len(shape) - 2), *(("conv", None) if shape[-2] > shape[-1] else (None, "conv")))


def _random_codec(name: str, noise: jax.Array) -> jax.Array:
    """One array of an untrained autoencoder, from noise of its shape."""
    if name in ("mean", "std"):  # statistics of latents, no weights: they keep their precision
        return jnp.full(noise.shape, float(name == "std"), jnp.float32)
    if name in ("gain", "bias"):
        return jnp.full_like(noise, float(name == "gain"))
    return noise / math.sqrt(math.prod(noise.shape[:-1]))


def build(
    *,
    size: tuple[int, int] = (704, 1280),
    frames: int = 121,
    fps: float = 24.0,
    vae: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    vae_dtype: str = "float32",
    piece: int = 0,
    rows: int = 0,
    text_encoder: str = "",
    lora_targets: str = r"blocks\..*",
    lora_scale: float = 1.0,
    **network: Any,
) -> WanFamily:
    """The family of Wan2.2-TI2V-5B and its relatives.

    Args:
      size: height and width of a clip in pixels, multiples of 32 with the published sizes.
      frames: frames of a clip: 1 + a multiple of 4 with the published sizes.
      fps: frames a second.
      vae: sizes of the autoencoder, as in `VaeConfig`.
      dtype: type of the transformer's weights, bfloat16 or float32.
      vae_dtype: type of the autoencoder's weights.
      piece: latent frames decoded at a time; 0: all.
      rows: clips decoded at a time, over all devices; 0: all.
      text_encoder: for `encode` and `generate`: folder with text_encoder/ and tokenizer/ of the published model, or
        "words" for states without weights.
      lora_targets: pattern of the paths of the layers that LoRA adapts.
      lora_scale: factor of LoRA's product.
      **network: sizes of the transformer, as in `WanConfig`.

    Raises:
      ValueError: sizes that the network cannot cut into latents and patches.
    """
    config, codec = WanConfig(**network), make_codec(vae or {})
    if config.channels != codec.channels:
        raise ValueError(f"model.channels = {config.channels}, but model.vae.channels = {codec.channels}")
    unit = codec.space * config.patch
    if any(side % unit for side in size):
        raise ValueError(f"model.size = {tuple(size)}: height and width must be multiples of {unit}")
    return WanFamily(
        config, codec, size=size, frames=frames, fps=fps, dtype=dtype, vae_dtype=vae_dtype, piece=piece, rows=rows,
        text_encoder=text_encoder, lora_targets=lora_targets, lora_scale=lora_scale,
    )  # fmt: skip


def make_codec(sizes: Mapping[str, Any]) -> vae.VaeConfig:
    """The autoencoder's sizes, from a config's section."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    return vae.VaeConfig(**fields)
