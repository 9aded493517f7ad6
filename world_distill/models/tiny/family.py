"""`interfaces.ModelFamily` for the small video DiT."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from world_distill.interfaces import TextSpec
from world_distill.models import lora as lora_lib
from world_distill.models.functional import Functional, functional
from world_distill.models.hashed_words import encode_text
from world_distill.models.tiny import codec
from world_distill.models.tiny.modeling import T_MIN, TinyConfig, TinyDiT
from world_distill.structs import Condition, Latents, LatentSpec, PyTree

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class TinyCodec:
    """`interfaces.Codec` without weights.

    Args:
      patch: pixels a latent cell is high and wide.
      stride: frames in a latent frame (the first latent frame holds the scene alone).
    """

    patch: int
    stride: int
    parts: tuple[str, ...] = ()

    def decode(self, base: PyTree, latents: Latents) -> jax.Array:
        return codec.decode(latents["video"], self.patch, self.stride)

    def encode(self, base: PyTree, clips: jax.Array) -> dict[str, jax.Array]:
        return {"video": codec.encode(clips, self.patch, self.stride)}


@dataclasses.dataclass(frozen=True)
class TinyEncoders:
    """`interfaces.Encoders`: the codec for scenes, hashed words for texts.

    Args:
      codec: encodes the scene.
      grid: f h w of the latents.
      channels: of the latents.
      text_width: of the text states.
    """

    codec: TinyCodec
    grid: tuple[int, int, int]
    channels: int
    text_width: int
    image_size: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"words-{self.text_width}"

    @property
    def scenes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {"video": jax.ShapeDtypeStruct((1, *self.grid[1:], self.channels), jnp.float32)}

    @property
    def texts(self) -> Mapping[str, TextSpec]:
        return {"text": TextSpec(self.text_width, np.dtype(np.float32))}

    def scene(self, base: PyTree, images: np.ndarray) -> dict[str, np.ndarray]:
        _, height, width, _ = images.shape
        expected = (self.grid[1] * self.codec.patch, self.grid[2] * self.codec.patch)
        if (height, width) != expected:
            raise ValueError(f"scene images are {height}x{width} pixels; this model takes {expected[0]}x{expected[1]}")
        return jax.tree.map(np.asarray, self.codec.encode(base, jnp.asarray(images)[:, None]))

    def text(self, texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        return {"text": [encode_text(text, self.text_width) for text in texts]}


@dataclasses.dataclass(frozen=True, eq=False)
class TinyFamily(lora_lib.Adapted):
    """Sizes and pure functions; see `interfaces.ModelFamily` for the contract.

    Args:
      config: sizes of the network.
      codec: sizes of the codec.
      fps: frames a second at which clips are shown.
      lora_targets: pattern of the layers that LoRA adapts.
      lora_scale: factor on the product of LoRA's factors (alpha / rank).
      lora_differences: pattern of the weights that get full differences beside LoRA.
      merge_lora: add that product to the weights before a forward pass, in place of two thin matrix products a layer.
        The same function; faster for small layers and many tokens, and a gradient as large as the weights.
      int8: keep the kernels of the blocks as int8.
    """

    config: TinyConfig
    codec: TinyCodec
    fps: float = 4.0
    lora_targets: str = r"blocks\..*"
    lora_scale: float = 1.0
    lora_differences: str = ""
    merge_lora: bool = False
    int8: bool = False

    name = "tiny"
    adapted = None
    published = None
    # By the name that `config.base` gives. Runs that were made with an older base still need it.
    shipped_bases = {name: _HERE / f"base_{name}.safetensors" for name in ("1", "2", "3")}  # noqa: RUF012  (never changed)

    @functools.cached_property
    def latents(self) -> Mapping[str, LatentSpec]:
        """The picture alone, whose first latent frame is the scene."""
        frames = self.config.grid[0]
        return {"video": LatentSpec((*self.config.grid, self.config.channels), moves=np.arange(frames) > 0)}

    @property
    def tokens(self) -> int:
        return math.prod(self.config.grid)

    @functools.cached_property
    def encoders(self) -> TinyEncoders:
        return TinyEncoders(self.codec, self.config.grid, self.config.channels, self.config.text_width)

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

    def predict_clean(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        """Clean latents {"video": [b f h w c]} that the network sees in x_t; the scene's frame is passed through."""
        if self.merge_lora:
            weights, lora = lora_lib.merge(base, lora, self.lora_scale), None
        else:
            weights, lora = lora_lib.apply_full(base, lora)
        x = jnp.concatenate([condition.scene["video"], x_t["video"][:, 1:]], axis=1)
        times = t[:, None] * self._free
        text = condition.text["text"]
        return {"video": self.network(weights, x, times, text.states, text.mask, lora, self.lora_scale)}

    def denoise(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        clean = self.predict_clean(base, lora, x_t, t, condition)["video"]
        velocity = (x_t["video"] - clean) / jnp.maximum(t, T_MIN)[:, None, None, None, None]
        return {"video": velocity * self._free[:, None, None, None]}

    @property
    def _free(self) -> np.ndarray:
        return self.latents["video"].moves.astype(np.float32)


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
    int8: bool = False,
    lora_targets: str = r"blocks\..*",
    lora_scale: float = 1.0,
    lora_differences: str = "",
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
      int8: keep the kernels of the blocks as 8-bit integers, with a scale for each output channel (`models.int8`). For
        LoRA alone, and not with `merge_lora`.
      lora_targets: pattern of the paths of the layers that LoRA adapts.
      lora_scale: factor of LoRA's product.
      lora_differences: pattern of the weights that get full differences beside LoRA; empty: none.

    Raises:
      ValueError: `size` is not a multiple of `patch`, `frames` is not 1 + a multiple of `stride`, or `int8` with
        `merge_lora`.
    """
    if size % patch:
        raise ValueError(f"model.size={size} is not a multiple of model.patch={patch}")
    if (frames - 1) % stride:
        raise ValueError(f"model.frames={frames} is not 1 + a multiple of model.stride={stride}")
    if int8 and merge_lora:
        raise ValueError("model.merge_lora adds LoRA to whole kernels, which model.int8 never makes: set one to False")
    grid = (1 + (frames - 1) // stride, size // patch, size // patch)
    config = TinyConfig(
        grid=grid, channels=3 * stride * patch * patch, text_width=text_width,
        width=width, depth=depth, heads=heads, mlp=mlp, add_scene=add_scene, remat=remat, unroll=unroll,
    )  # fmt: skip
    return TinyFamily(
        config,
        TinyCodec(patch, stride),
        lora_targets=lora_targets,
        lora_scale=lora_scale,
        lora_differences=lora_differences,
        merge_lora=merge_lora,
        int8=int8,
    )
