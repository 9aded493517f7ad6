"""A frozen text encoder with no weights: hashed n-grams.

The state of a word is the sum of three fixed random vectors, seeded by the word, by it and the one before, and by it
and the two before, plus a sinusoid of its place. Any text can be encoded, and words that stand together look alike
wherever they stand; but nothing is learned, so a phrase that a model never saw in training means no more to it than
its parts.
"""

import functools
import hashlib
import re

import numpy as np

from world_distill.interfaces import TextError

END = "</s>"  # stands for the empty text; no word of a text looks like it


@functools.lru_cache(maxsize=65536)
def _vector(gram: str, width: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(gram.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def encode_text(text: str, width: int) -> np.ndarray:
    """States [l width] float32 of a text's l words (lower case, punctuation dropped).

    The empty text has one state, an end mark's, so that attention over it is defined and guidance can use it.

    Raises:
      TextError: the text is not empty, yet has no word in it.
    """
    words = re.findall(r"[a-z0-9]+", text.lower()) if text else [END]
    if not words:
        raise TextError(f"cannot encode a text without words: {text!r}")
    grams = [[" ".join(words[max(0, i - n) : i + 1]) for n in range(3)] for i in range(len(words))]
    states = np.stack([sum(_vector(f"{n}:{g}", width) for n, g in enumerate(gram)) for gram in grams]) / np.sqrt(3)
    angles = np.arange(len(words))[:, None] * np.exp(-np.arange(width // 2) * 2 * np.log(50.0) / width)
    return (states + 0.5 * np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)).astype(np.float32)
