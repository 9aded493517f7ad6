"""Judged clips that are kept, so that another judge or another wording can be asked about them later.

A clip is a lossless strip (`video_files.save_strip`) named by the digest under which its judgments are cached,
FOLDER/ab/abcd….png. Which ones are kept depends on the digest alone: a repeated run, and every host, keeps the same.
"""

import pathlib
from collections import defaultdict

import numpy as np

from world_distill.errors import UserError
from world_distill.judges.controls import is_control
from world_distill.judges.memory.cache import JudgmentCache, clip_digest
from world_distill.judges.memory.entries import Entry
from world_distill.storage.video_files import load_strip, save_strip


class KeptClips:
    """A folder of judged clips; called with a digest and its clip, it may keep it."""

    def __init__(self, folder: pathlib.Path, *, share: float = 1.0):
        """`share` of the clips are kept, 0 to 1."""
        self.folder, self._share = pathlib.Path(folder), share

    def __call__(self, digest: str, clip: np.ndarray) -> None:
        """Keeps a clip [F H W 3] uint8 whose turn it is, or has it already. Raises OSError."""
        if int(digest[:8], 16) < self._share * 2**32 and not (path := self._path(digest)).exists():
            save_strip(path, clip, quick=True)

    def digests(self) -> list[str]:
        """Those of all clips that are there."""
        return sorted(path.stem for path in self.folder.glob("[0-9a-f][0-9a-f]/*.png"))

    def load(self, digest: str) -> np.ndarray:
        """The clip, exactly as it was judged. Raises ValueError if the file is damaged, OSError if there is none."""
        clip = load_strip(self._path(digest))
        if clip_digest(clip).hex() != digest:
            raise ValueError(f"{self._path(digest)}: not the clip that its name says")
        return clip

    def _path(self, digest: str) -> pathlib.Path:
        return self.folder / digest[:2] / f"{digest}.png"


def judged_clips(cache: JudgmentCache, clips: KeptClips) -> dict[tuple[str, str, str], list[Entry]]:
    """The entries of a cache about clips that are kept, by (digest, task, agent), without those about controls.

    Raises:
      UserError: there are none.
    """
    kept = set(clips.digests())
    found: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in cache.entries():
        about = entry.about
        if is_control(about.question):  # whose clip may be another task's
            continue
        if about.clip in kept and about.task is not None and about.agent is not None:
            found[about.clip, about.task, about.agent].append(entry)
    if not found:
        raise UserError(
            f"{clips.folder} holds no clips of these judgments: train with --config.judge.keep_clips=0.05, for instance"
        )
    return dict(found)
