"""What the parts promise each other: model family, annotator, judge.

A new model, annotator or judge is a class or a module with these members; nothing has to be inherited.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from world_distill.structs import Condition, Latents, LatentSpec, PyTree, Texts


class Denoise(Protocol):
    """Velocity field: `v = eps - x_0` at `x_t = (1 - t) x_0 + t eps`."""

    def __call__(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        """Velocity [b n ...] fp32 of every stream at x_t [b n ...], t [b] in [0, 1].

        `lora=None` is the Demonstrator. Pinned places (`LatentSpec.moves`) come back with velocity 0.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """One output of a text encoder.

    Attributes:
      width: of its states.
      dtype: of its states.
      length: tokens that texts are padded to; None takes `config.text_length`.
      most: that `config.text_length` may be; None: any number.
    """

    width: int
    dtype: Any
    length: int | None = None
    most: int | None = None


class Codec(Protocol):
    """From clean latents to pixels, and back. It may lay its work out on a mesh, and cut it into pieces."""

    parts: tuple[str, ...]  # parts of the base (its outermost keys) that hold its weights; () if it has none

    def decode(self, base: PyTree, latents: Latents) -> jax.Array:
        """Clean latents [b n ...] to RGB clips [b F H W 3] uint8 (traceable)."""
        ...

    def encode(self, base: PyTree, clips: jax.Array) -> dict[str, jax.Array]:
        """RGB clips [b F H W 3] uint8 to latents [b n ...] (traceable); a clip of one frame is a scene."""
        ...


class TextError(ValueError):
    """A text encoder cannot take a text; it can take others. The message says why."""


class Encoders(Protocol):
    """From scene images and texts to what the network is told. Called once a record, on the host, in any framework.

    May also have `text_weights: str`: a digest of weights that `text` depends on and `name` does not tell apart, ""
    where they are not at hand. Records of another digest are neither reused nor trained on.
    """

    name: str  # names what `text` is: encoded records of another one are not reused
    image_size: tuple[int, int] | None  # (height, width) that scenes are cut to; None: they have to fit already
    parts: tuple[str, ...]  # parts of the base that `scene` reads
    scenes: Mapping[str, jax.ShapeDtypeStruct]  # what `scene` returns, of one image
    texts: Mapping[str, TextSpec]  # what `text` returns

    def scene(self, base: PyTree, images: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays [b ...] by name for scene images [b H W 3] uint8. Latents of a pinned stream bear its name."""
        ...

    def text(self, texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """Each text's states [l d] by name, true length, no padding.

        The empty text has a state, too: guidance leads away from it.

        Raises:
          TextError: a text that cannot be encoded, such as one that is too long; others still can.
        """
        ...


class PublishedLayout(Protocol):
    """The layout in which a family's weights are published, that of diffusers."""

    sizes: Mapping[str, Any]  # as in a config's section `model`, with what shapes do not show (heads, eps)
    lora_names: Mapping[str, tuple[str, str]]  # layer -> its names in diffusers and in the original code
    # The same for every part that LoRA files may change, part -> layer -> names; a key of `apart` is a part, too.
    all_lora_names: Mapping[str, Mapping[str, tuple[str, str]]]
    absent_lora_names: Mapping[str, tuple[str, str]]  # of layers that published models have and this one leaves out
    lora_rules: Any  # `models.tensor_map.LoraRules`
    known_sizes: Mapping[tuple[int, int], str]  # (blocks, width) -> what people call the model of these sizes
    float32: Mapping[str, str]  # part -> pattern of the paths of its arrays that everyone keeps in float32
    unread: str  # pattern of the paths of arrays that a checkpoint may have and this family does not read; "": none

    def entries(self, naming: Literal["diffusers", "original"] = "diffusers") -> dict[str, list[Any]]:
        """`models.tensor_map.Entry` of every published tensor, by part of the base."""
        ...

    def apart(self, naming: Literal["diffusers", "original"] = "diffusers") -> dict[str, list[Any]]:
        """Entries of published tensors that are no part of the base and that LoRA may change, by a name for them."""
        ...

    def configs(self, read: Callable[[str], Any]) -> dict[str, dict[str, Any]]:
        """config.json of every part; `read` gives an array of the base by its dotted path."""
        ...


class ModelFamily(Protocol):
    """A video model with its codec and its encoders, as the programs see it.

    The base weights, and the LoRA, are pytrees that are passed in as arguments: a family holds sizes, not weights.
    `models.lora.Adapted` has the members about LoRA, for families whose layers are linear.
    """

    name: str
    latents: Mapping[str, LatentSpec]  # the streams of one clip; the first one is the picture's
    tokens: int  # of one clip, as the network sees it
    fps: float  # frames a second of a decoded clip
    adapted: str | None  # part of the base (an outermost key) that the Executor changes; None: all of it
    lora_scale: float  # factor on the product of LoRA's factors
    shipped_bases: Mapping[str, pathlib.Path]  # weights that ship with the package, by name
    codec: Codec
    encoders: Encoders
    published: PublishedLayout | None

    def denoise(
        self, base: PyTree, lora: PyTree | None, x_t: Latents, t: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]: ...

    def read_texts(self, base: PyTree, texts: Texts) -> Texts:
        """What `denoise` makes of texts before it looks at latents and time (traceable); it takes either.

        A sampler asks for it once. A family without such a part gives `texts` back.
        """
        ...

    def on(self, mesh: jax.sharding.Mesh) -> "ModelFamily":
        """The same for programs that run on a mesh: it may lay its activations out there."""
        ...

    def init_base(self, key: jax.Array) -> PyTree:
        """Random base weights (traceable, for `eval_shape` and `jit(out_shardings=...)`)."""
        ...

    def base_axes(self) -> PyTree:
        """Logical axis names of every base weight: a tree like the base with a tuple of names or None per leaf."""
        ...

    def int8_kernels(self) -> Sequence[str]:
        """Dotted paths of the kernels that `models.int8` keeps as int8 on devices; `denoise` takes the base so."""
        ...

    def init_lora(self, key: jax.Array, base: PyTree, *, rank: int | None) -> PyTree:
        """An Executor that equals the Demonstrator: LoRA of `rank`, or full differences if `rank` is None."""
        ...

    def training_notes(self, rank: int | None) -> list[str]:
        """Warnings, a sentence each, about what losses would do to the weights of `init_lora`'s Executor.

        Raises:
          ValueError: some of them would never change.
        """
        ...

    def lora_axes(self, lora: PyTree) -> PyTree:
        """Logical axis names of `init_lora`'s tree."""
        ...

    def kernel_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every kernel that LoRA may adapt, by dotted path."""
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
    name: str = ""  # of the question in its rubric
    task: str = ""  # alone


@dataclasses.dataclass(frozen=True)
class JudgeAnswer:
    """log p(yes) - log p(no) of the first answer token, or a learned reward's number, or why there is none."""

    log_odds: float | None
    error: str | None = None


class Judge(Protocol):
    """A class may have three more methods.

    `ask_each(requests, done) -> None` is `ask` that calls `done(number of the request, answer)` for each as it comes,
    from one thread at a time: what was answered is kept, whatever stops the rest. `health() -> dict[str, float]` has
    figures since its last call, which are logged with the step's. `check() -> list[str]` tests it before training, in a
    line each; it raises UserError if it cannot judge, and an error that is a ConnectionError too if it cannot be
    reached.

    A learned reward has `measures: Mapping[str, str]`: names of its numbers, which take the place of a rubric's
    questions, and what each is, in words that change when the answer does. It also has `thresholds: Mapping[str,
    float]`: a number above its threshold counts as a yes, and the answer is by how much it is above. A measure without
    a threshold is answered as it is, and has no rate.
    """

    name: str  # identifies model, version and sampling: part of the cache key

    def ask(self, requests: Sequence[JudgeRequest]) -> list[JudgeAnswer]:
        """One answer a request, in order. A request that cannot be answered has `log_odds=None`, never a made-up 0."""
        ...


@dataclasses.dataclass(frozen=True)
class Cases:
    """What clips were to show, one entry a clip.

    Attributes:
      ids: of the tasks' records.
      tasks: texts.
      agents: names.
      images: the scenes' picture files: PNG, or as they came (JPEG).
    """

    ids: Sequence[str]
    tasks: Sequence[str]
    agents: Sequence[str]
    images: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.ids)


class Benchmark(Protocol):
    """Scores for evaluation: kept apart from the judge whose answers are the reward.

    `questions` are its measures: tables, logs, reports and ablations have them in this order, and the first one stands
    for the others. A class may have four more members.

    `details: tuple[str, ...]` names numbers that `check` returns beside the scores; results keep them by clip.
    `judges: Mapping[str, Judge]` are those that it asks. `begin(cache, fps)` is called before the first clip with a
    memory of judgments (`judges.memory.cache.JudgmentCache`) and the clips' frames a second. `describe() -> dict` has
    what results keep about it; under `paper` rows as of `evaluation.scoring.summarise`, to stand beside its own.
    """

    name: str
    questions: tuple[str, ...]

    def check(self, clips: np.ndarray, cases: Cases) -> dict[str, np.ndarray]:
        """Scores [b] float64 a question, from 0 (no) to 1 (yes), NaN where there is none; and `details`.

        Args:
          clips: [b F H W 3] uint8.
          cases: what they were to show.
        """
        ...
