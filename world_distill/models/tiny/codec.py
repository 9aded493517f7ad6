"""A lossless latent codec: blocks of pixels become channels, the first frame a latent frame of its own.

It has the shape of a causal video VAE (1 + r k frames to 1 + k latent frames) without its weights, so the sandbox
runs the same code path as a real family. Latents are centred on the floor's colour and scaled.
"""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8

CENTRE = 0.93
SCALE = 0.35


def encode(clips: UInt8[Array, "b F H W 3"], patch: int, stride: int) -> Float[Array, "b f h w c"]:
    """RGB clips of 1 + stride k frames (k may be 0) to latents [b 1+k H/patch W/patch 3 stride patch^2]."""
    x = (clips.astype(jnp.float32) / 255.0 - CENTRE) / SCALE
    x = jnp.concatenate([jnp.repeat(x[:, :1], stride, axis=1), x[:, 1:]], axis=1)
    return rearrange(x, "b (f r) (h p) (w q) c -> b f h w (r p q c)", r=stride, p=patch, q=patch)


def decode(latents: Float[Array, "b f h w c"], patch: int, stride: int) -> UInt8[Array, "b F H W 3"]:
    """Latents to RGB clips; values outside the range of a byte are clipped."""
    x = rearrange(latents, "b f h w (r p q c) -> b (f r) (h p) (w q) c", r=stride, p=patch, q=patch, c=3)
    x = x[:, stride - 1 :] * SCALE + CENTRE
    return jnp.round(jnp.clip(x, 0.0, 1.0) * 255.0).astype(jnp.uint8)
