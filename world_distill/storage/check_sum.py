"""A check sum of an array that is computed where the array lies, and is the same however it lies on the devices.

    s = sum_i (2 i + 1) w_i  modulo 2^32

over its 32-bit words w (those of a narrower type are widened). Odd numbers have an inverse modulo 2^32, so a change of
one word always changes the sum.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def check_sum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """The sum of an array of numbers or truth values."""
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(bits, _WORDS[min(bits.dtype.itemsize, 4)]).astype(jnp.uint32)
    weight, stride = jnp.uint32(1), 2
    for axis in reversed(range(words.ndim)):  # not flattened, which would move it between devices
        weight = weight + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * weight, dtype=jnp.uint32)
