"""The arrays that travel through the project, as frozen pytrees.

One letter an axis: b batch, k sampler step, f latent frames, h w latent height and width, c latent channels,
l text tokens, d text width, p = h w c; F H W are the pixels of a decoded clip. Arrays are float32 unless a comment
says otherwise.

This module carries no run-time shape checks on purpose: pytrees are rebuilt by JAX with leaves that are not arrays
(shardings, shape structs, None), which a checking hook would refuse.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

PyTree = Any


@struct.dataclass
class Condition:
    """What a denoiser is told besides the noisy latents: the scene and one text (a task or a solution)."""

    text: jax.Array  # [b l d] frozen text-encoder states, in the type that they were stored in; 0 behind the end
    text_mask: jax.Array  # [b l] bool, True where a token is real
    scene: jax.Array  # [b 1 h w c] clean latent of the first frame


@struct.dataclass
class Negative:
    """The text that guidance leads away from, one for all rows."""

    text: jax.Array  # [l d] text-encoder states, as long and of the same type as the texts of the conditions
    text_mask: jax.Array  # [l] bool, True where a token is real


@struct.dataclass
class Rollout:
    """One sampled clip per batch row, with what the losses need of the way there."""

    latents: jax.Array  # [b f h w c] clean latents (t = 0)
    states: jax.Array | None = None  # [k b f h w c] visited x_t, noisiest first, without the final clean latents
    velocities: jax.Array | None = None  # [k b f h w c] the sampling policy's own v at `states`
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
    solution: Condition  # the Demonstrator's condition
    latents: jax.Array  # [b f h w c] final clean latents of the rollouts
    states: jax.Array | None  # [k+1 b f p] visited x_t, the final clean latents last
    demonstrator: jax.Array | None  # [k b f p] v_D(states[:-1] | solution)
    log_probs: jax.Array | None  # [k b] log-probabilities at sampling time (Flow-GRPO)
    advantages: jax.Array | None  # [b] 0 where invalid; None until the clips are judged
    valid: jax.Array | None  # [b] bool: the clip was judged, and its group kept
    negative: Negative | None = None  # what the Demonstrator's guidance leads away from; None without guidance


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
