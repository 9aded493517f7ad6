"""An estimate of what an encoded data set takes on the disk, from the shapes of its arrays and a small sample."""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from world_distill import console
from world_distill.data.images.png import ImageError
from world_distill.data.records.heads import Heads

_SAMPLE = 8  # images; twice as many records
_RECORD_BYTES = 450  # of a record's names, and of the file for each record
_BLOCK = 1 << 16  # a file is a multiple of this, and has one more


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of what is to be written."""

    images: int
    records: int
    scenes: float
    pictures: float
    texts: float
    clips: float
    files: int

    @property
    def total(self) -> float:
        if not self.files:
            return 0.0
        held = self.scenes + self.pictures + self.texts + self.clips + self.records * _RECORD_BYTES
        # Half of a file's last block is empty, on average.
        return (max(held / self.files + _BLOCK / 2, _BLOCK) + _BLOCK) * self.files

    def describe(self) -> str:
        """One line."""
        names = ("scenes", "pictures", "texts", *(("clips",) if self.clips else ()))
        parts = ", ".join(f"{name} {console.disk(getattr(self, name))}" for name in names)
        each = console.disk(self.total / max(self.records, 1))
        what = f"{self.images} images and {self.records} records"
        return f"about {console.disk(self.total)} for {what} ({parts}), {each} a record"


def estimate(
    images: Sequence[Sequence[int]],
    heads: Heads,
    *,
    files: int,
    scenes: Mapping[str, Any],
    scene_dtype: str | None,
    clip: Mapping[str, Any],
    picture: Callable[[int], bytes],
    texts: Callable[[int], Sequence[str]],
    states: Callable[[Sequence[str]], Sequence[Mapping[str, np.ndarray] | str]],
) -> Estimate:
    """What encoding these images will take.

    Args:
      images: numbers of the records of each image.
      heads: of all records.
      files: that they are spread over.
      scenes: shape and dtype of each array of a scene.
      scene_dtype: that arrays are stored in, if they are wider.
      clip: shape and dtype of each array of a clip, of which each image has one; {}: none.
      picture: the picture that record i will hold; may raise ImageError.
      texts: the texts of record i.
      states: of texts, each by name, or why it has none.
    """
    chosen = [images[i] for i in np.unique(np.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).astype(int))]
    sizes = []
    for numbers in chosen:
        try:
            sizes.append(len(picture(numbers[0])))
        except ImageError:
            continue  # it will be left out
    sample = [text for numbers in chosen for i in sorted({numbers[0], numbers[-1]}) for text in texts(i) if text]
    found = [(text, s) for text, s in zip(sample, states(sample), strict=True) if not isinstance(s, str)]
    state_bytes = sum(array.nbytes for _, s in found for array in s.values())
    narrow = np.dtype(scene_dtype).itemsize if scene_dtype else math.inf
    scene, video = (
        sum(math.prod(s.shape) * min(np.dtype(s.dtype).itemsize, narrow) for s in arrays.values())
        for arrays in (scenes, clip)
    )
    characters = sum(heads.characters[i] for numbers in images for i in numbers)
    return Estimate(
        images=len(images),
        records=sum(map(len, images)),
        scenes=len(images) * scene,
        clips=len(images) * video,
        pictures=len(images) * float(np.mean(sizes)) if sizes else 0.0,
        # The texts themselves are stored, too.
        texts=characters * (1 + state_bytes / max(1, sum(len(text) for text, _ in found))),
        files=files,
    )


def disk_warning(folder: pathlib.Path, needed: float) -> str | None:
    """What to say if the disk of a folder, which may not exist yet, has not the bytes that are needed; None: it has."""
    folder = folder.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed <= free:
        return None
    return f"warning: {folder} has {console.disk(free)} free, and {console.disk(needed)} are needed: make room first"
