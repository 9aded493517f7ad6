"""What the parts promise each other: model family, annotator, judge.

A new model, annotator or judge is a class or a module with these members; nothing has to be inherited.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from world_distill.structs import Condition, PyTree


class Denoise(Protocol):
    """Velocity field: `v = eps - x_0` at `x_t = (1 - t) x_0 + t eps`."""

    def __call__(
        self, base: PyTree, lora: PyTree | None, x_t: jax.Array, t: jax.Array, condition: Condition
    ) -> jax.Array:
        """Velocity [b f h w c] fp32 at x_t [b f h w c], t [b] in [0, 1].

        `lora=None` is the Demonstrator. Pinned frames (see `ModelFamily.free_frames`) come back with velocity 0.
        """
        ...


class ModelFamily(Protocol):
    """A video model with its latent codec and its text encoder, as the programs see it.

    The base weights, and the LoRA, are pytrees that are passed in as arguments: a family holds sizes, not weights.
    """

    name: str
    latent_shape: tuple[int, int, int, int]  # f h w c of one clip
    tokens: int  # of one clip, as the network sees it
    free_frames: np.ndarray  # [f] float32: 1 where a latent frame is generated, 0 where it is pinned to the scene
    fps: float  # frames a second of a decoded clip
    image_size: tuple[int, int] | None  # (height, width) that scenes are cut to; None: they have to fit already
    lora_scale: float  # factor on the product of LoRA's factors
    lora_names: Mapping[str, tuple[str, str]] | None  # layer -> its names in diffusers and in the original code
    codec_parts: tuple[str, ...]  # parts of the base (its outermost keys) that `decode` and `encode_scene` read
    shipped_bases: Mapping[str, pathlib.Path]  # weights that ship with the package, by name
    text_encoder: str  # names what `encode_text` is: encoded records of another one are not reused

    def denoise(
        self, base: PyTree, lora: PyTree | None, x_t: jax.Array, t: jax.Array, condition: Condition
    ) -> jax.Array: ...

    def on(self, mesh: jax.sharding.Mesh) -> "ModelFamily":
        """The same for programs that run on a mesh: it may lay its activations out there."""
        ...

    def init_base(self, key: jax.Array) -> PyTree:
        """Random base weights (traceable, for `eval_shape` and `jit(out_shardings=...)`)."""
        ...

    def base_axes(self) -> PyTree:
        """Logical axis names of every base weight: a tree like the base with a tuple of names or None per leaf."""
        ...

    def init_lora(self, key: jax.Array, base: PyTree, *, rank: int | None) -> PyTree:
        """An Executor that equals the Demonstrator: LoRA of `rank`, or full differences if `rank` is None."""
        ...

    def lora_axes(self, lora: PyTree) -> PyTree:
        """Logical axis names of `init_lora`'s tree."""
        ...

    def kernel_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every kernel that LoRA may adapt, by dotted path."""
        ...

    def decode(self, base: PyTree, latents: jax.Array) -> jax.Array:
        """Clean latents [b f h w c] to RGB clips [b F H W 3] uint8 (traceable)."""
        ...

    def encode_scene(self, base: PyTree, images: np.ndarray) -> np.ndarray:
        """Scene images [b H W 3] uint8 to first-frame latents [b 1 h w c]."""
        ...

    def encode_text(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text to its encoder states [l d], true length, no padding.

        The empty text has a state, too: guidance leads away from it.
        """
        ...


class PublishedFamily(ModelFamily, Protocol):
    """A family whose weights are published in diffusers' layout."""

    lora_names: Mapping[str, tuple[str, str]]  # not None

    def entries(self) -> dict[str, list[Any]]:
        """`models.tensor_map.Entry` of every published tensor, by part of the base."""
        ...

    def published_configs(self, base: PyTree) -> dict[str, dict[str, Any]]:
        """config.json of every part."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskPair:
    """What an annotator writes about one scene.

    `task` is `[agent]: imperative.`; `solution` is one present-tense paragraph that narrates the clip.
    """

    task: str
    solution: str
    agent: str
    kind: str  # free label for break-downs in tables (navigation, push, ...)


class AnnotationError(Exception):
    """An annotator has no usable answer about an image now; asked another time, it may."""


class Annotator(Protocol):
    """May also have `concurrency: int`: how many threads may call `annotate` at once (1 if it has none)."""

    name: str  # model and prompt version; goes into the data card

    def annotate(self, image: np.ndarray, *, max_pairs: int, seed: int) -> list[TaskPair]:
        """Tasks and solutions for one image [H W 3] uint8; [] when there is nothing to do in it.

        Raises:
          AnnotationError: no usable answer; other images can still be asked about.
        """
        ...


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One yes/no question about one clip."""

    clip: np.ndarray  # [F H W 3] uint8
    question: str  # the full text, task included


@dataclasses.dataclass(frozen=True)
class JudgeAnswer:
    """log p(yes) - log p(no) of the first answer token, or why there is none."""

    log_odds: float | None
    error: str | None = None


class Judge(Protocol):
    """A class may have two more methods.

    `health() -> dict[str, float]` has figures since its last call, which are logged with the step's. `check() ->
    list[str]` tests it before training, in a line each; it raises UserError if it cannot judge, and an error that is a
    ConnectionError too if it cannot be reached.
    """

    name: str  # identifies model, version and sampling: part of the cache key

    def ask(self, requests: Sequence[JudgeRequest]) -> list[JudgeAnswer]:
        """One answer a request, in order. A request that cannot be answered has `log_odds=None`, never a made-up 0."""
        ...


class Benchmark(Protocol):
    """Verdicts for evaluation: kept apart from the judge whose answers are the reward."""

    name: str
    questions: tuple[str, ...]

    def check(self, clips: np.ndarray, tasks: Sequence[str], images: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Verdicts [b] float64 a question: 1 yes, 0 no, NaN where there is none.

        Args:
          clips: [b F H W 3] uint8.
          tasks: [b] task texts.
          images: [b] the scenes' PNG files.
        """
        ...
