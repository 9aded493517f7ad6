"""`interfaces.ModelFamily` for the small video DiT."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from world_distill.models import lora as lora_lib
from world_distill.models.functional import Functional, functional
from world_distill.models.hashed_words import encode_text
from world_distill.models.tiny import codec
from world_distill.models.tiny.modeling import T_MIN, TinyConfig, TinyDiT
from world_distill.structs import Condition, PyTree

_HERE = pathlib.Path(__file__).parent


class TinyFamily:
    """Sizes and pure functions; see `interfaces.ModelFamily` for the contract.

    Args:
      config: sizes of the network.
      patch: pixels a latent cell is high and wide.
      stride: frames in a latent frame (the first latent frame holds the scene alone).
      fps: frames a second at which clips are shown.
      lora_targets: pattern of the layers that LoRA adapts.
      lora_scale: factor on the product of LoRA's factors (alpha / rank).
      merge_lora: add that product to the weights before a forward pass, in place of two thin matrix products a layer.
        The same function; faster for small layers and many tokens, and a gradient as large as the weights.
    """

    name = "tiny"
    # By the name that `config.base` gives. Runs that were made with an older base still need it.
    shipped_bases: Mapping[str, pathlib.Path] = {name: _HERE / f"base_{name}.safetensors" for name in ("1", "2", "3")}
    image_size: tuple[int, int] | None = None
    lora_names: Mapping[str, tuple[str, str]] | None = None
    codec_parts = ()  # the codec has no weights

    def __init__(
        self,
        config: TinyConfig,
        *,
        patch: int,
        stride: int,
        fps: float = 4.0,
        lora_targets: str = r"blocks\..*",
        lora_scale: float = 1.0,
        merge_lora: bool = False,
    ):
        self.config, self.patch, self.stride, self.fps = config, patch, stride, fps
        self.lora_targets, self.lora_scale, self.merge_lora = lora_targets, lora_scale, merge_lora
        self.latent_shape = (*config.grid, config.channels)
        self.tokens = math.prod(config.grid)
        self.text_encoder = f"words-{config.text_width}"
        self.free_frames = np.array([0.0] + [1.0] * (config.grid[0] - 1), np.float32)

    @functools.cached_property
    def network(self) -> Functional:
        """The transformer as a function of its weights."""
        return functional(TinyDiT, self.config)

    def on(self, mesh: Mesh) -> "TinyFamily":
        return self  # so small that the compiler may lay out its activations

    def init_base(self, key: jax.Array) -> PyTree:
        return self.network.init(key)

    def base_axes(self) -> PyTree:
        return self.network.axes()

    def init_lora(self, key: jax.Array, base: PyTree, *, rank: int | None) -> PyTree:
        if rank is None:
            return lora_lib.init_full(base)
        return lora_lib.init_lora(key, base, rank=rank, targets=self.lora_targets)

    def lora_axes(self, lora: PyTree) -> PyTree:
        return lora_lib.lora_axes(lora, self.base_axes())

    def kernel_shapes(self) -> dict[str, tuple[int, ...]]:
        return lora_lib.kernel_shapes(jax.eval_shape(self.init_base, jax.random.key(0)))

    def predict_clean(self, base: PyTree, lora: PyTree | None, x_t: jax.Array, t: jax.Array, condition: Condition):
        """Clean latents [b f h w c] that the network sees in x_t; the scene's frame is passed through."""
        if self.merge_lora:
            weights, lora = lora_lib.merge(base, lora, self.lora_scale), None
        else:
            weights, lora = lora_lib.apply_full(base, lora)
        x = jnp.concatenate([condition.scene, x_t[:, 1:]], axis=1)
        times = t[:, None] * self.free_frames
        return self.network(weights, x, times, condition.text, condition.text_mask, lora, self.lora_scale)

    def denoise(self, base: PyTree, lora: PyTree | None, x_t: jax.Array, t: jax.Array, condition: Condition):
        clean = self.predict_clean(base, lora, x_t, t, condition)
        velocity = (x_t - clean) / jnp.maximum(t, T_MIN)[:, None, None, None, None]
        return velocity * self.free_frames[:, None, None, None]

    def decode(self, base: PyTree, latents: jax.Array) -> jax.Array:
        return codec.decode(latents, self.patch, self.stride)

    def encode_clips(self, clips: jax.Array) -> jax.Array:
        """RGB clips [b F H W 3] uint8 to latents [b f h w c] (pretraining)."""
        return codec.encode(clips, self.patch, self.stride)

    def encode_scene(self, base: PyTree, images: np.ndarray) -> np.ndarray:
        _, height, width, _ = images.shape
        expected = (self.config.grid[1] * self.patch, self.config.grid[2] * self.patch)
        if (height, width) != expected:
            raise ValueError(f"scene images are {height}x{width} pixels; this model takes {expected[0]}x{expected[1]}")
        return np.asarray(codec.encode(jnp.asarray(images)[:, None], self.patch, self.stride))

    def encode_text(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [encode_text(text, self.config.text_width) for text in texts]


def build(
    *,
    size: int = 30,
    frames: int = 9,
    patch: int = 5,
    stride: int = 4,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    mlp: int = 3,
    text_width: int = 64,
    add_scene: bool = True,
    remat: bool = False,
    unroll: int = 4,
    merge_lora: bool = False,
    lora_targets: str = r"blocks\..*",
    lora_scale: float = 1.0,
) -> TinyFamily:
    """The family for square clips.

    Args:
      size: pixels a side.
      frames: frames of a clip: 1 + a multiple of `stride`.
      patch: pixels that a latent cell is wide and high.
      stride: frames in a latent frame.
      width: hidden width.
      depth: blocks.
      heads: attention heads.
      mlp: hidden width of the MLP, in multiples of `width`.
      text_width: width of the frozen text encoder's states.
      add_scene: the head gives the change to the scene's frame, not the frame.
      remat: compute activations again in the backward pass.
      unroll: blocks in one turn of the layer scan.
      merge_lora: add LoRA's product to the weights first, instead of applying the factors one after the other.
      lora_targets: pattern of the paths of the layers that LoRA adapts.
      lora_scale: factor of LoRA's product.

    Raises:
      ValueError: `size` is not a multiple of `patch`, or `frames` is not 1 + a multiple of `stride`.
    """
    if size % patch:
        raise ValueError(f"model.size={size} is not a multiple of model.patch={patch}")
    if (frames - 1) % stride:
        raise ValueError(f"model.frames={frames} is not 1 + a multiple of model.stride={stride}")
    grid = (1 + (frames - 1) // stride, size // patch, size // patch)
    config = TinyConfig(
        grid=grid, channels=3 * stride * patch * patch, text_width=text_width,
        width=width, depth=depth, heads=heads, mlp=mlp, add_scene=add_scene, remat=remat, unroll=unroll,
    )  # fmt: skip
    return TinyFamily(
        config, patch=patch, stride=stride,
        lora_targets=lora_targets, lora_scale=lora_scale, merge_lora=merge_lora,
    )  # fmt: skip
