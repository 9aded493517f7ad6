"""Calls of a family's encoders in batches of one size, and checks of what they return."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from world_distill.data.records.record_format import RecordError


def fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image [H W 3] uint8 scaled and cut around its centre to `size`, (height, width)."""
    from PIL import Image, ImageOps

    if image.shape[:2] == tuple(size):
        return image
    return np.array(ImageOps.fit(Image.fromarray(image), (size[1], size[0]), Image.Resampling.LANCZOS))


def scenes_of(images: Mapping[str, np.ndarray], encode_scene: Callable, batch: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every image [H W 3] uint8, by name; `encode_scene` is called with `batch` images.

    Raises RecordError if the images differ in size, or the encoder returns another number.
    """
    sizes = {image.shape for image in images.values()}
    if len(sizes) > 1:
        raise RecordError(f"images of different sizes {sorted(sizes)} (such as {next(iter(images))}): give `size`")
    pixels = np.stack(list(images.values()))
    filling = np.repeat(pixels[-1:], batch - len(pixels), axis=0)
    arrays = {name: np.asarray(array) for name, array in encode_scene(np.concatenate([pixels, filling])).items()}
    for name, array in arrays.items():
        if array.ndim < 2 or array.shape[0] != batch:
            raise RecordError(f"encode_scene returned {name!r} of shape {array.shape} for {batch} images")
    return {image: {name: array[i] for name, array in arrays.items()} for i, image in enumerate(images)}


def scene_arrays(image: np.ndarray, encode_scene: Callable) -> dict[str, np.ndarray]:
    """The arrays of one image [H W 3] uint8, by name."""
    return scenes_of({"image": image}, encode_scene, 1)["image"]


def text_states(texts: Sequence[str], encode_text: Callable, batch: int = 8) -> list[dict[str, np.ndarray]]:
    """States [l d] of every text, by name; `encode_text` is called with at most `batch` texts."""
    found = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        states = {name: [np.asarray(s) for s in arrays] for name, arrays in encode_text(part).items()}
        for name, arrays in states.items():
            if len(arrays) != len(part) or any(s.ndim != 2 for s in arrays):
                shapes = [s.shape for s in arrays]
                raise RecordError(
                    f"encode_text returned {name!r} of shapes {shapes} for {len(part)} texts, not one [l d] a text"
                )
        found += [{name: arrays[i] for name, arrays in states.items()} for i in range(len(part))]
    return found
