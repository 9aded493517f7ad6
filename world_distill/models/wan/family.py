"""`interfaces.ModelFamily` for Wan2.2-TI2V-5B: transformer, autoencoder 2.2, umT5 text states.

The base is `{"transformer": weights, "vae": weights}`. LoRA and full differences are of the transformer.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from world_distill.models import lora as lora_lib
from world_distill.models.clip_family import ClipFamily, split_settings, with_tuples
from world_distill.models.functional import Functional, functional
from world_distill.models.wan.codec import WanCodec
from world_distill.models.wan.encoders import WanEncoders
from world_distill.models.wan.modeling import WanConfig, WanDiT
from world_distill.models.wan.published import WanPublished
from world_distill.models.wan.vae import VaeConfig
from world_distill.structs import Condition, Latents, LatentSpec, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class WanFamily(ClipFamily):
    """Sizes and pure functions; see `interfaces.ModelFamily` for the contract, `ClipFamily` for the other arguments.

    Args:
      fps: frames a second.
    """

    size: tuple[int, int] = dataclasses.field(default=(704, 1280), kw_only=True)
    fps: float = dataclasses.field(default=24.0, kw_only=True)

    name = "wan"

    @functools.cached_property
    def latents(self) -> Mapping[str, LatentSpec]:
        return {"video": self.video}

    @property
    def tokens(self) -> int:
        return math.prod(self.latents["video"].shape[:3]) // self.config.patch**2

    @functools.cached_property
    def encoders(self) -> WanEncoders:
        return WanEncoders(self.codec, self.size, self.text_encoder, self.config.text_width)

    @property
    def published(self) -> WanPublished:
        return WanPublished(self.config, self.codec.config)

    @functools.cached_property
    def network(self) -> Functional:
        """The transformer as a function of its weights."""
        return functional(WanDiT, self.config)

    def on(self, mesh: Mesh) -> "WanFamily":
        """The same with its activations laid out on a mesh: rows, places in a frame, heads."""
        config, codec = dataclasses.replace(self.config, mesh=mesh), dataclasses.replace(self.codec, mesh=mesh)
        return dataclasses.replace(self, config=config, codec=codec)

    def init_base(self, key: jax.Array) -> PyTree:
        transformer = self.network.init(jax.random.fold_in(key, 0))
        return {
            "transformer": jax.tree.map(lambda x: x.astype(self.dtype), transformer),
            "vae": self.codec.init(jax.random.fold_in(key, 1)),
        }

    def base_axes(self) -> PyTree:
        return {"transformer": self.network.axes(), "vae": self.codec.axes()}

    def denoise(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        weights, lora = lora_lib.apply_full(base["transformer"], lora)
        free = self.latents["video"].moves.astype(np.float32)
        x = jnp.concatenate([condition.scene["video"], x_t["video"][:, 1:]], axis=1)
        # The text's mask is left out on purpose, see `encoders.TEXT_LENGTH`.
        states = condition.text["text"].states
        # The scene's frame has time 0.
        times = tuple(map(int, self.latents["video"].moves))
        velocity = self.network(weights, x, jnp.stack([jnp.zeros_like(t), t], 1), states, lora, self.lora_scale, times)
        return {"video": velocity * free[:, None, None, None]}


def build(
    *,
    vae: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    vae_dtype: str = "float32",
    piece: int = 0,
    rows: int | None = None,
    **settings: Any,
) -> WanFamily:
    """The family of Wan2.2-TI2V-5B and its relatives.

    Args:
      vae: sizes of the autoencoder, as in `VaeConfig`.
      dtype: type of the transformer's weights, bfloat16 or float32.
      vae_dtype: type of the autoencoder's weights.
      piece: latent frames decoded at a time; 0: all.
      rows: clips decoded at a time, over all devices; 0: all; None: as `sharding.rows_at_once` says.
      **settings: those of `WanFamily`, and sizes of the transformer, as in `WanConfig`.

    Raises:
      ValueError: sizes that the network cannot cut into latents and patches.
    """
    own, network = split_settings(WanFamily, settings)
    codec = WanCodec(codec_sizes(vae or {}), jnp.dtype(vae_dtype), piece, rows)
    config = WanConfig(**network)
    unit = codec.config.space * config.patch
    if any(side % unit for side in own.get("size", ())):
        raise ValueError(f"model.size = {tuple(own['size'])}: height and width must be multiples of {unit}")
    return WanFamily(config, codec, dtype=jnp.dtype(dtype), **own)


def codec_sizes(sizes: Mapping[str, Any]) -> VaeConfig:
    """The autoencoder's sizes, from a config's section."""
    return VaeConfig(**with_tuples(sizes))
