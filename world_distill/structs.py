"""The arrays that travel through the project, as frozen pytrees.

Latents are a mapping of streams to arrays, such as `{"video": [b f h w c], "audio": [b l c]}`; below, [b n ...] stands
for the array of each stream. One letter an axis: b batch, k sampler step, n places of a stream (latent frames, moments
of a sound track), f latent frames, h w latent height and width, c latent channels, l text tokens, d text width,
p entries of one place; F H W are the pixels of a decoded clip. Arrays are float32 unless a comment says otherwise.

This module carries no run-time shape checks on purpose: pytrees are rebuilt by JAX with leaves that are not arrays
(shardings, shape structs, None), which a checking hook would refuse.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import struct

PyTree = Any
Latents = Mapping[str, Any]  # stream -> array [b n ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSpec:
    """One stream of a clip's latents, and which of its places are generated and which are learnt.

    Attributes:
      shape: of one clip: the places first, the channels last.
      moves: [n] bool; False where a place is pinned to the scene's latents. None: all move.
      counts: [n] bool; True where a place enters losses, step noise and log-probabilities. None: where it moves. A
        place that moves without counting follows the ODE.

    Raises:
      ValueError: a mask of another length, or a pinned place that counts.
    """

    shape: tuple[int, ...]
    moves: np.ndarray = None  # pyright: ignore[reportAssignmentType]  # filled in below
    counts: np.ndarray = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self):
        places = self.shape[0]
        moves = np.ones(places, bool) if self.moves is None else np.asarray(self.moves, bool)
        counts = moves if self.counts is None else np.asarray(self.counts, bool)
        if moves.shape != (places,) or counts.shape != (places,):
            raise ValueError(f"moves {moves.shape} and counts {counts.shape} of a stream with {places} places")
        if (counts & ~moves).any():
            raise ValueError(f"pinned places count: {np.flatnonzero(counts & ~moves).tolist()}")
        object.__setattr__(self, "moves", moves)
        object.__setattr__(self, "counts", counts)

    @property
    def pinned(self) -> bool:
        """Whether any place is pinned, so that a condition's scene has to hold this stream's latents."""
        return not self.moves.all()


@struct.dataclass
class Tokens:
    """One text as the frozen text encoder's states."""

    states: jax.Array  # [b l d] in the type that they were stored in; 0 behind the end
    mask: jax.Array  # [b l] bool, True where a token is real


# By the name of the encoder's output: a model may read several. The negative text, which guidance leads away from, is
# one for all rows: states [l d] and masks [l].
Texts = dict[str, Tokens]


@struct.dataclass
class Condition:
    """What a denoiser is told besides the noisy latents: the scene and one text (a task or a solution)."""

    text: Texts
    scene: Mapping[str, Any]  # arrays [b ...] by name: clean latents of a pinned stream, image tokens, ...


@struct.dataclass
class Rollout:
    """One sampled clip per batch row, with what the losses need of the way there."""

    latents: Latents  # [b n ...] clean latents (t = 0)
    states: Latents | None = None  # [k b n ...] visited x_t, noisiest first, without the final clean latents
    velocities: Latents | None = None  # [k b n ...] the sampling policy's own v at `states`
    log_probs: jax.Array | None = None  # [k b] log-probability of each SDE step (0 on ODE steps)


@struct.dataclass
class Judgment:
    """A judge's answers about a batch of clips: host-side numpy, never traced."""

    scores: dict[str, np.ndarray]  # question name -> [b] float64 log p(yes) - log p(no); NaN where there is no answer
    valid: np.ndarray  # [b] bool, True where every question was answered
    hits: int = 0  # different questions that the cache had an answer to
    misses: int = 0  # and that the judge was asked


@struct.dataclass
class TrainBatch:
    """All that one RL/distillation step reads: a pure function of (state, base, this) makes the next state."""

    task: Condition  # the Executor's condition
    solution: Condition | None  # the Demonstrator's condition; None where it is not computed
    latents: Latents  # [b n ...] final clean latents of the rollouts, or the records' clips
    states: Latents | None  # [k+1 b n p] visited x_t, the final clean latents last
    demonstrator: Latents | None  # [k b n p] v_D(states[:-1] | solution)
    log_probs: jax.Array | None  # [k b] log-probabilities at sampling time (Flow-GRPO)
    advantages: jax.Array | None  # [b] 0 where invalid; None until the clips are judged
    valid: jax.Array | None  # [b] bool: the clip was judged, and its group kept
    negative: Texts | None = None  # what the Demonstrator's guidance leads away from; None without guidance

    @property
    def rows(self) -> int:
        """b: rollouts of the batch."""
        return jax.tree.leaves(self.latents)[0].shape[0]


@struct.dataclass
class TrainState:
    """What training changes. The frozen base is not in it."""

    step: jax.Array  # [] int32, finished steps (one step = one batch of rollouts and its updates)
    lora: PyTree  # the Executor's trainable weights: LoRA factors, or full differences from the base
    lora_ema: PyTree  # slow average of `lora`: what is evaluated, exported and shown
    lora_old: PyTree  # fast average of `lora`: the trust region of AWM
    opt_state: PyTree
    key: jax.Array  # [] typed PRNG key; a step uses fold_in(key, step) and never replaces it
    lora_rolled: PyTree | None = None  # `lora` of a step ago, where rollouts run that far ahead: it makes this step's
