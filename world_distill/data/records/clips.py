"""Clips of videos for records: from the file that a record names to latents of a model family."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from world_distill.data.images.sources import is_inside
from world_distill.data.records.record_format import AnnotatedRecord, RecordError
from world_distill.data.videos.decode import VideoError, read_clip
from world_distill.data.videos.digest import file_digest


@dataclasses.dataclass(frozen=True)
class ClipSource:
    """What gives records their clips.

    Attributes:
      root: folder of the videos that `AnnotatedRecord.source["video"]` names.
      frames: of a clip.
      fps: frames a second of a clip.
      size: (height, width) of a clip in pixels.
      encode: RGB clips [1 F H W 3] uint8 to latents [1 n ...] by stream.
      latents: shape and dtype of each of these, of one clip.
    """

    root: pathlib.Path
    frames: int
    fps: float
    size: tuple[int, int]
    encode: Callable[[np.ndarray], Mapping[str, Any]]
    latents: Mapping[str, Any]

    def read(self, record: AnnotatedRecord, scene: np.ndarray) -> np.ndarray | str:
        """The clip [F H W 3] uint8 of a record, whose first frame is its scene [H W 3]; or why it has none."""
        if not (name := record.source.get("video")):
            return "the record names no video"
        path = self.root / name
        if not path.is_file() or not is_inside(self.root, path):
            return f"{name} is not in {self.root}: --videos names the folder that has it"
        try:
            if file_digest(path) != record.image_id:
                return f"{name} has changed since it was imported"
            clip = read_clip(path, fps=self.fps, frames=self.frames, size=self.size)
        except VideoError as error:
            return f"{name} {error}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        clip[0] = scene
        return clip

    def encoded(self, clip: np.ndarray) -> dict[str, np.ndarray]:
        """Latents [n ...] of a clip [F H W 3] by stream.

        Raises RecordError if the encoder returns other shapes than it says.
        """
        arrays = {name: np.asarray(array) for name, array in self.encode(clip[None]).items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        wanted = {name: (1, *spec.shape) for name, spec in self.latents.items()}
        if shapes != wanted:
            raise RecordError(f"a clip {clip.shape} was encoded to {shapes}, not to {wanted}")
        return {name: array[0] for name, array in arrays.items()}
