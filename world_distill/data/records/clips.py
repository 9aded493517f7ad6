"""Clips of videos for records: from the file that a record names to latents of a model family."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
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
      rows: clips encoded at a time.
      encode: RGB clips [rows F H W 3] uint8 to latents [rows n ...] by stream.
      latents: shape and dtype of each of these, of one clip.
    """

    root: pathlib.Path
    frames: int
    fps: float
    size: tuple[int, int]
    rows: int
    encode: Callable[[np.ndarray], Mapping[str, np.ndarray]]
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

    def encoded(self, clips: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Latents [n ...] by stream of each of at most `rows` clips [F H W 3].

        Raises RecordError if the encoder returns other shapes than it says.
        """
        if not clips:
            return []
        # Always as many, so that one program serves all.
        arrays = self.encode(np.stack([*clips, *[clips[-1]] * (self.rows - len(clips))]))
        shapes = {name: array.shape for name, array in arrays.items()}
        wanted = {name: (self.rows, *spec.shape) for name, spec in self.latents.items()}
        if shapes != wanted:
            raise RecordError(f"{self.rows} clips {clips[0].shape} were encoded to {shapes}, not to {wanted}")
        return [{name: array[i] for name, array in arrays.items()} for i in range(len(clips))]
