"""Clips as the image parts of a chat message: frames chosen over all of the clip, as pictures or data URLs.

Every server that takes images takes these; how servers cut up a video file differs between them and their versions.
"""

import base64
import io

import numpy as np
from PIL import Image


def chosen_frames(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` frames of `count`, evenly over time, with the first and the last; all if there are fewer."""
    if count <= wanted:
        return list(range(count))
    steps = wanted - 1
    return [(2 * i * (count - 1) + steps) // (2 * steps) for i in range(wanted)]  # rounded, without floats


def chosen_images(clip: np.ndarray, *, frames: int, max_side: int) -> list[Image.Image]:
    """Chosen frames of a clip [F H W 3] uint8; those with a side of more than `max_side` pixels are shrunk to it."""
    images = []
    for number in chosen_frames(len(clip), frames):
        image = Image.fromarray(clip[number])
        scale = max_side / max(image.size)
        if scale < 1:
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        images.append(image)
    return images


def data_urls(clip: np.ndarray, *, frames: int, max_side: int, quality: int) -> list[str]:
    """Chosen frames of a clip [F H W 3] uint8 as data URLs; equal clips give equal bytes.

    Args:
      clip: pixels.
      frames: at most so many, at least 2.
      max_side: pixels; frames with a longer side are shrunk to it, others stay as they are.
      quality: of JPEG, 1 to 100; 0 is PNG, which loses nothing and is some times larger.
    """
    urls = []
    for image in chosen_images(clip, frames=frames, max_side=max_side):
        file = io.BytesIO()
        if quality:
            image.save(file, "JPEG", quality=quality, subsampling=0)
        else:
            image.save(file, "PNG")
        kind = "jpeg" if quality else "png"
        urls.append(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
    return urls
