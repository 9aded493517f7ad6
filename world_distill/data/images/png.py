"""PNG in and out of memory."""

import io

import numpy as np
from PIL import Image


class ImageError(ValueError):
    """An image, or a source of images, that cannot be used. The message names it."""


def encode_png(image: np.ndarray) -> bytes:
    """An RGB image [H W 3] uint8 as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes as an RGB image [H W 3] uint8. Raises ImageError if they are damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on damaged bytes
        raise ImageError(f"damaged PNG ({type(error).__name__}: {error})") from error
