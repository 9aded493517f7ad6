"""Conditions and latents of one stream, for tests that need no more."""

import jax.numpy as jnp
import numpy as np

from world_distill.structs import Condition, LatentSpec, Tokens


def told(text, mask, scene) -> Condition:
    """A condition with one text [b l d] and one scene [b n ...], that of the stream "video"."""
    return Condition({"text": Tokens(text, mask)}, {"video": scene})


def one_stream(denoise):
    """A denoiser of arrays as one of the stream "video"; `scene` and `text` are the condition's arrays."""

    def of_streams(base, lora, x, t, condition):
        return {"video": denoise(base, lora, x["video"], t, condition)}

    return of_streams


def video(shape, moves=None) -> dict[str, LatentSpec]:
    """The stream "video" of clips of a shape; `moves` is 0 at pinned frames."""
    return {"video": LatentSpec(tuple(shape), None if moves is None else np.asarray(moves) > 0)}


def tokens(states, mask=None) -> dict[str, Tokens]:
    """One text's states [l d], as what guidance leads away from."""
    return {"text": Tokens(states, jnp.ones(states.shape[:-1], bool) if mask is None else mask)}


def velocity_of(family):
    """`family.denoise` of the stream "video" alone, from array to array."""

    def velocity(base, lora, x, t, condition):
        return family.denoise(base, lora, {"video": x}, t, condition)["video"]

    return velocity


def shape_of(family) -> tuple[int, ...]:
    """Shape of one clip's stream "video"."""
    return family.latents["video"].shape


def counts_of(family) -> np.ndarray:
    """Frames of the stream "video" that count."""
    return family.latents["video"].counts
