"""Images in zip archives, with their side files; read from where they lie, never extracted."""

import threading
import zipfile
import zlib
from typing import Any

from world_distill.data.images.archives import MOST_SIDE, SIDE_FILES, Member, Sample, together
from world_distill.data.images.files import File
from world_distill.data.images.kinds import is_hidden, is_image, is_unremarkable
from world_distill.data.images.png import ImageError
from world_distill.data.images.unused import Unused

# What a damaged, encrypted or strangely packed archive raises.
_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError, ValueError)


class _Zip:
    """A zip file, opened when it is first read."""

    def __init__(self, file: File):
        self.file = file
        self._open: Any = None
        self._lock = threading.Lock()

    def read(self, member: str) -> bytes:
        with self._lock:
            if self._open is None:
                self._open = zipfile.ZipFile(self.file.open())
            return self._open.read(member)


class _ZipMember(Member):
    """An image in a zip archive."""

    damage = _DAMAGE

    def _read(self) -> bytes:
        return self.archive.read(self.member)


def in_zip(file: File, unused: Unused) -> list[Sample]:
    """The images of a zip archive, in its order, with their side files.

    `unused` learns of members that are neither. Raises ImageError if it is damaged: its list of members is at its end,
    so that nothing of one that is cut off can be read.
    """
    archive, samples, others = _Zip(file), [], []
    texts: dict[str, dict[str, str]] = {}
    try:
        with file.open() as opened, zipfile.ZipFile(opened) as packed:
            for info in packed.infolist():
                if info.is_dir() or is_hidden(info.filename):
                    continue
                if is_image(info.filename):
                    samples.append(Sample(_ZipMember(archive, info.filename, info.file_size)))
                elif info.filename.lower().endswith(SIDE_FILES) and info.file_size <= MOST_SIDE:
                    key, _, end = info.filename.rpartition(".")
                    texts.setdefault(key, {})[end.lower()] = packed.read(info).decode("utf-8", "replace")
                elif not is_unremarkable(info.filename):
                    others.append(info.filename)
    except _DAMAGE as error:
        raise ImageError(f"{file.path}: damaged or cut off ({error})") from error
    return together(samples, texts, others, unused)
