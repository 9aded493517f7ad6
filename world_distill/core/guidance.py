"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    v = v_negative + scale (v_text - v_negative)

v_text is the velocity under the text that is asked for, v_negative under an empty or unwanted one. Inference samples
from v, and so do rollouts if that is asked for. The Demonstrator's v may be the target of training: an Executor that
is trained to it needs no guidance, and so half of the forward passes.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from world_distill.structs import Condition, Negative, PyTree


def guided(
    denoise: Callable[..., Array],
    scale: float,
    negative: Float[Array, "l d"],
    negative_mask: Bool[Array, " l"],
) -> Callable[..., Array]:
    """A denoiser like `denoise` with guidance: one call with 2 b rows in place of one with b rows.

    Each row stands beside its twin under the negative text. On a mesh both lie on the device of the row; a batch
    behind another one would be dealt out to the devices anew.

    Call it inside the jitted function that samples, with the negative text among that function's arguments: outside,
    the text would become a constant of the compiled program.

    Args:
        denoise: (base, lora, x_t, t [b], condition) -> velocity, see `interfaces.Denoise`.
        scale: at least 1; 1 is no guidance and gives `denoise` itself back.
        negative: text-encoder states of the negative text, as long as the texts of the conditions will be.
        negative_mask: True where a token of it is real.

    Raises:
        ValueError: a scale below 1 or not finite; when called, texts of another shape than the negative one.
    """
    if not 1 <= scale < math.inf:
        raise ValueError(f"the guidance scale must be at least 1, which turns guidance off, and finite; got {scale}")
    if scale == 1:
        return denoise

    def denoise_both(base: PyTree, lora: PyTree | None, x_t: Array, t: Array, condition: Condition) -> Array:
        if condition.text.shape[1:] != negative.shape:
            raise ValueError(
                f"texts have shape {condition.text.shape[1:]} (tokens, width), the negative text {negative.shape}: "
                "encode both with the same model and pad them to the same length"
            )
        without = dataclasses.replace(
            condition,
            text=jnp.broadcast_to(negative.astype(condition.text.dtype), condition.text.shape),
            text_mask=jnp.broadcast_to(negative_mask, condition.text_mask.shape),
        )
        both = jax.tree.map(_twins, (x_t, t, condition), (x_t, t, without))
        v = denoise(base, lora, *both).astype(jnp.float32).reshape(x_t.shape[0], 2, *x_t.shape[1:])
        v_text, v_negative = v[:, 0], v[:, 1]
        return v_negative + scale * (v_text - v_negative)

    return denoise_both


def with_guidance(denoise: Callable[..., Array], scale: float, negative: Negative | None) -> Callable[..., Array]:
    """`guided` for a setting of a program: with a scale of 1 `denoise` itself, which needs no negative text.

    Raises:
        ValueError: as `guided`; or a scale above 1 without a negative text.
    """
    if scale == 1:
        return denoise
    if negative is None:
        raise ValueError(f"guidance of scale {scale:g} needs the states of a negative text")
    return guided(denoise, scale, negative.text, negative.text_mask)


def _twins(x: Array, y: Array) -> Array:
    """Rows x_0, y_0, x_1, y_1, ... of two arrays [b ...]."""
    return jnp.stack([x, y], axis=1).reshape(2 * x.shape[0], *x.shape[1:])
