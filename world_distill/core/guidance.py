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
from jaxtyping import Array

from world_distill.structs import Condition, PyTree, Texts, Tokens


def guided(denoise: Callable[..., PyTree], scale: float, negative: Texts) -> Callable[..., PyTree]:
    """A denoiser like `denoise` with guidance: one call with 2 b rows in place of one with b rows.

    Each row stands beside its twin under the negative text. On a mesh both lie on the device of the row; a batch
    behind another one would be dealt out to the devices anew.

    Call it inside the jitted function that samples, with the negative text among that function's arguments: outside,
    the text would become a constant of the compiled program.

    Args:
        denoise: (base, lora, x_t, t [b], condition) -> velocity, see `interfaces.Denoise`.
        scale: at least 1; 1 is no guidance and gives `denoise` itself back.
        negative: the negative text, by name of the encoder's output: states [l d] as long as the texts of the
            conditions will be, and masks [l].

    Raises:
        ValueError: a scale below 1 or not finite; when called, texts of other names or shapes than the negative one.
    """
    if not 1 <= scale < math.inf:
        raise ValueError(f"the guidance scale must be at least 1, which turns guidance off, and finite; got {scale}")
    if scale == 1:
        return denoise

    def denoise_both(base: PyTree, lora: PyTree | None, x_t: PyTree, t: Array, condition: Condition) -> PyTree:
        without = dataclasses.replace(condition, text=_in_place_of(condition.text, negative))
        both = jax.tree.map(_twins, (x_t, t, condition), (x_t, t, without))

        def led_away(v):
            v = v.astype(jnp.float32).reshape(t.shape[0], 2, *v.shape[1:])
            v_text, v_negative = v[:, 0], v[:, 1]
            return v_negative + scale * (v_text - v_negative)

        return jax.tree.map(led_away, denoise(base, lora, *both))

    return denoise_both


def with_guidance(denoise: Callable[..., PyTree], scale: float, negative: Texts | None) -> Callable[..., PyTree]:
    """`guided` for a setting of a program: with a scale of 1 `denoise` itself, which needs no negative text.

    Raises:
        ValueError: as `guided`; or a scale above 1 without a negative text.
    """
    if scale == 1:
        return denoise
    if negative is None:
        raise ValueError(f"guidance of scale {scale:g} needs the states of a negative text")
    return guided(denoise, scale, negative)


def _in_place_of(texts: Texts, negative: Texts) -> Texts:
    """The negative text for every row of `texts`."""
    if texts.keys() != negative.keys():
        raise ValueError(f"texts are of {sorted(texts)}, the negative text of {sorted(negative)}")
    found = {}
    for name, text in texts.items():
        states = negative[name].states
        if text.states.shape[1:] != states.shape:
            raise ValueError(
                f"texts have shape {text.states.shape[1:]} (tokens, width), the negative text {states.shape}: "
                "encode both with the same model and pad them to the same length"
            )
        found[name] = Tokens(
            jnp.broadcast_to(states.astype(text.states.dtype), text.states.shape),
            jnp.broadcast_to(negative[name].mask, text.mask.shape),
        )
    return found


def _twins(x: Array, y: Array) -> Array:
    """Rows x_0, y_0, x_1, y_1, ... of two arrays [b ...]."""
    return jnp.stack([x, y], axis=1).reshape(2 * x.shape[0], *x.shape[1:])
