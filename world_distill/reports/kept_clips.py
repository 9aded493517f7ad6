"""The clips that an evaluation keeps, in a folder of the run that reports read.

    clips.json      [{id, task, solution, agent, kind, fps?}] of the tasks whose clips were kept
    ROLE/ID.png     a small clip as it is (`video_files.save_strip`); ROLE is base, demonstrator or executor
    ROLE/ID.webp    a larger one, with fewer and smaller frames and some loss (`video_files.save_small_strip`)

`fps` is that of the frames which were kept.
"""

import pathlib
import shutil
from collections.abc import Iterable
from typing import Self

import numpy as np

from world_distill import console
from world_distill.data.records.reader import RecordReader
from world_distill.reports import page
from world_distill.reports.run_data import INDEX, clip_path
from world_distill.storage import atomic, video_files

SIDE, FRAMES = 320, 24  # pixels and frames of a larger clip that are kept


class KeptClips:
    """A context that writes the clips of some records beside the folder, and puts them in its place at the end.

    An evaluation that is stopped leaves the folder as it was.
    """

    def __init__(self, folder: pathlib.Path, reader: RecordReader, numbers: Iterable[int], fps: float):
        """Clips of the records with these numbers, at `fps` frames a second."""
        self._folder, self._reader, self._fps = folder, reader, fps
        self._making = folder.with_name(f".{folder.name}.new")
        ids = reader.heads().id
        self._numbers = {ids[number]: number for number in numbers}
        self._rates: dict[str, float] = {}
        self._nameless: set[str] = set()
        shutil.rmtree(self._making, ignore_errors=True)  # of an evaluation that was killed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._making, ignore_errors=True)

    def keep(self, role: str, record: str, clip: np.ndarray) -> None:
        """Writes a clip [F H W 3] uint8 of a role, if it is of one of the records."""
        if record not in self._numbers:
            return
        small = page.is_small(clip)
        try:
            path = clip_path(self._making, role, record, ".png" if small else ".webp")
        except ValueError:
            self._nameless.add(record)
            return
        shown = clip if small else video_files.reduced(clip, SIDE, FRAMES)
        self._rates[record] = self._fps * len(shown) / len(clip)
        if small:
            video_files.save_strip(path, shown)
        else:
            video_files.save_small_strip(path, shown)

    def finish(self) -> int:
        """Puts the clips in the folder's place, with their list; returns how many tasks they are of."""
        if self._nameless:
            console.warn(
                f"clips of {len(self._nameless)} tasks are not kept, since their ids are no file names:"
                f" {', '.join(sorted(self._nameless)[:5])}"
            )
        entries = []
        for name, number in self._numbers.items():
            if name in self._rates:
                record = self._reader[number]
                texts = {field: getattr(record, field) for field in ("id", "task", "solution", "agent", "kind")}
                entries.append(texts | {"fps": self._rates[name]})
        if entries:
            atomic.write_json(self._making / INDEX, entries)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._making.rename(self._folder)
        return len(entries)
