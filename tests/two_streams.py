"""A model family that is unlike the ones that ship, to hold the interface to what it promises.

It makes a picture and a sound. The picture's first frame is generated, not pinned, and does not count; it is told to
the network beside the noisy latents. The sound's first moment is pinned to the scene. The scene has image tokens, too,
texts come as two kinds of states, and the codec has weights, statistics, and a state that goes from frame to frame.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.interfaces import TextSpec
from world_distill.models.hashed_words import encode_text
from world_distill.models.lora import Adapted, merge
from world_distill.models.tiny import codec as blocks
from world_distill.structs import Condition, Latents, LatentSpec, PyTree

PATCH, STRIDE = 6, 4
PIXELS = 3 * STRIDE * PATCH**2  # of one latent cell
CHANNELS, SOUND, MOMENTS = 8, 4, 5  # of the picture's and of the sound's latents; the sound's length
GLANCE = (4, 6)  # image tokens and their width
TEXT, GLYPHS = 64, 8  # widths of the states
GLYPHS_LENGTH = 40


@dataclasses.dataclass(frozen=True)
class Codec:
    """Each frame is decoded from its latents and from the frame before it."""

    parts: tuple[str, ...] = ("codec",)

    def decode(self, base: PyTree, latents: Latents) -> jax.Array:
        weights = base["codec"]
        cells = (latents["video"] * weights["std"] + weights["mean"]) @ weights["kernel"]

        def frame(before, cells):
            now = cells + 0.2 * before
            return now, now

        start = jnp.zeros_like(cells[:, 0])
        _, frames = jax.lax.scan(frame, start, jnp.moveaxis(cells, 1, 0))
        return blocks.decode(jnp.moveaxis(frames, 0, 1), PATCH, STRIDE)

    def encode(self, base: PyTree, clips: jax.Array) -> dict[str, jax.Array]:
        weights, cells = base["codec"], blocks.encode(clips, PATCH, STRIDE)
        before = jnp.pad(cells, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1]
        mixed = (cells - 0.2 * before) @ weights["kernel"].T
        video = (mixed - weights["mean"]) / weights["std"]
        return {"video": video, "audio": jnp.zeros((len(clips), MOMENTS, SOUND))}


@dataclasses.dataclass(frozen=True)
class Encoders:
    codec: Codec = Codec()
    name: str = "words-and-glyphs"
    image_size: tuple[int, int] | None = (30, 30)
    parts: tuple[str, ...] = ("codec", "eye")

    @property
    def scenes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        shapes = {"first": (1, 5, 5, CHANNELS), "glance": GLANCE, "audio": (1, SOUND)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    @property
    def texts(self) -> Mapping[str, TextSpec]:
        glyphs = TextSpec(GLYPHS, jnp.dtype("bfloat16"), GLYPHS_LENGTH)
        return {"words": TextSpec(TEXT, np.dtype("float32")), "glyphs": glyphs}

    def scene(self, base: PyTree, images: np.ndarray) -> dict[str, np.ndarray]:
        first = np.asarray(self.codec.encode(base, jnp.asarray(images)[:, None])["video"])
        colours = np.float32(images).mean((1, 2)) / 255  # [b 3]
        glance = np.einsum("bc,ctd->btd", colours, np.asarray(base["eye"]["kernel"]))
        return {"first": first, "glance": glance, "audio": np.pad(colours, ((0, 0), (0, 1)))[:, None]}

    def text(self, texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        glyphs = [np.array([[ord(c) % (i + 2) for i in range(GLYPHS)] for c in text[:40] or " "]) for text in texts]
        return {
            "words": [encode_text(text, TEXT) for text in texts],
            "glyphs": [(x - x.mean()).astype(jnp.bfloat16) for x in glyphs],
        }


@dataclasses.dataclass(frozen=True, eq=False)
class TwoStreams(Adapted):
    """See the module. `width` is that of the one hidden layer."""

    width: int
    lora_targets: str
    lora_scale: float

    name = "two_streams"
    adapted = "network"
    fps = 4.0
    published = None
    shipped_bases = {}  # noqa: RUF012
    codec, encoders = Codec(), Encoders()
    tokens = 3 * 5 * 5 + MOMENTS

    @functools.cached_property
    def latents(self) -> Mapping[str, LatentSpec]:
        return {
            "video": LatentSpec((3, 5, 5, CHANNELS), counts=np.array([False, True, True])),
            "audio": LatentSpec((MOMENTS, SOUND), moves=np.arange(MOMENTS) > 0),
        }

    def on(self, mesh: jax.sharding.Mesh) -> "TwoStreams":
        return self

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        told = math.prod(GLANCE) + TEXT + GLYPHS + 1
        inputs = {"video_in": 2 * CHANNELS, "audio_in": SOUND, "told": told, "between": self.width}
        outputs = {"video_out": CHANNELS, "audio_out": SOUND}
        return {name: (i, self.width) for name, i in inputs.items()} | {
            name: (self.width, o) for name, o in outputs.items()
        }

    def init_base(self, key: jax.Array) -> PyTree:
        network = {
            name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape) / shape[0] ** 0.5}
            for i, (name, shape) in enumerate(self._shapes().items())
        }
        kernel = jnp.linalg.qr(jax.random.normal(jax.random.fold_in(key, 97), (PIXELS, CHANNELS)))[0].T
        mean, std = 0.1 * jnp.arange(CHANNELS), jnp.linspace(0.5, 2.0, CHANNELS)
        eye = {"kernel": jax.random.normal(jax.random.fold_in(key, 98), (3, *GLANCE))}
        return {"network": network, "codec": {"kernel": kernel, "mean": mean, "std": std}, "eye": eye}

    def base_axes(self) -> PyTree:
        network = {name: {"kernel": ("embed", "mlp")} for name in self._shapes()}
        codec = {"kernel": (None, "conv"), "mean": None, "std": None}
        return {"network": network, "codec": codec, "eye": {"kernel": None}}

    def denoise(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        w = {name: layer["kernel"] for name, layer in merge(base["network"], lora, self.lora_scale).items()}
        rows = t.shape[0]
        texts = [
            (text.states.astype(jnp.float32) * text.mask[..., None]).sum(1) / jnp.maximum(text.mask.sum(1), 1)[:, None]
            for _, text in sorted(condition.text.items())
        ]
        told = jnp.concatenate([condition.scene["glance"].reshape(rows, -1), *texts, t[:, None]], axis=1) @ w["told"]
        first = jnp.broadcast_to(condition.scene["first"], x_t["video"].shape)
        seen = jnp.concatenate([x_t["video"], first], axis=-1) @ w["video_in"] + told[:, None, None, None]
        heard = x_t["audio"] @ w["audio_in"] + told[:, None]
        seen, heard = jnp.tanh(seen), jnp.tanh(heard)
        # Picture and sound are told of each other.
        both = (seen.mean((1, 2, 3)) + heard.mean(1)) @ w["between"]
        video = x_t["video"] + jnp.tanh(seen + both[:, None, None, None]) @ w["video_out"]
        audio = x_t["audio"] + jnp.tanh(heard + both[:, None]) @ w["audio_out"]
        return {"video": video, "audio": audio * self.latents["audio"].moves[:, None]}


def build(*, width: int = 32, lora_targets: str, lora_scale: float) -> TwoStreams:
    """The family.

    Args:
      width: of the hidden layer.
      lora_targets: pattern of the layers that LoRA adapts.
      lora_scale: factor of LoRA's product.
    """
    return TwoStreams(width, lora_targets, lora_scale)
