"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), for inference.

    v = v_negative + scale (v_text - v_negative)

v_text is the velocity under the text that is asked for, v_negative under an empty or unwanted one.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from world_distill.structs import Condition, PyTree


def guided(
    denoise: Callable[..., Array],
    scale: float,
    negative: Float[Array, "l d"],
    negative_mask: Bool[Array, " l"],
) -> Callable[..., Array]:
    """A denoiser like `denoise` with guidance: one call with 2 b rows in place of one with b rows.

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
        without = condition.replace(
            text=jnp.broadcast_to(negative.astype(condition.text.dtype), condition.text.shape),
            text_mask=jnp.broadcast_to(negative_mask, condition.text_mask.shape),
        )
        both = jax.tree.map(lambda *rows: jnp.concatenate(rows), (x_t, t, condition), (x_t, t, without))
        v_text, v_negative = jnp.split(denoise(base, lora, *both).astype(jnp.float32), 2)
        return v_negative + scale * (v_text - v_negative)

    return denoise_both
