"""Images in tar archives, compressed or not, as webdatasets are: read by position, never extracted."""

import contextlib
import dataclasses
import gzip
import io
import pathlib
import tarfile
import threading
import zlib
from collections.abc import Iterator, Mapping

from world_distill.data.images.decode import MAX_BYTES, clean_text, is_image
from world_distill.data.images.png import ImageError

_BLOCK = 512  # tar's unit
_File = gzip.GzipFile | io.BufferedReader


class _Archive:
    """A tar file, compressed or not, to be read by position.

    A compressed one stays open between reads, since going forward in it is cheap and going back means starting over.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.end = 0  # of the last image in it
        self._file: _File | None = None
        self._lock = threading.Lock()

    def open(self) -> _File:
        with open(self.path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        return gzip.open(self.path) if compressed else open(self.path, "rb")

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            if self._file is None:
                self._file = self.open()
            try:
                self._file.seek(offset)
                return self._file.read(size)
            finally:
                if offset + size >= self.end or not isinstance(self._file, gzip.GzipFile):
                    self._file.close()
                    self._file = None


@dataclasses.dataclass(frozen=True)
class TarImage:
    """A member of an archive; an `ImageSource`."""

    archive: _Archive
    member: str
    offset: int  # of its bytes in the archive once decompressed
    size: int
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return clean_text(f"{self.archive.path.name}/{self.member}")

    @property
    def where(self) -> str:
        return clean_text(f"{self.archive.path}, member {self.member}")

    def read(self) -> bytes:
        if self.size > MAX_BYTES:
            raise ImageError(f"{self.where}: more than {MAX_BYTES >> 20} MiB, which is too large for a picture")
        try:
            data = self.archive.read(self.offset, self.size)
        except (OSError, EOFError, zlib.error) as error:
            raise ImageError(f"{self.where}: cannot be read ({error})") from error
        if len(data) != self.size:
            raise ImageError(f"{self.where}: the archive is cut off inside it")
        return data


def in_archive(path: pathlib.Path) -> list[TarImage]:
    """The images of an archive, in its order. Raises ImageError if it is damaged or cut off."""
    archive, images, last = _Archive(path), [], ""
    try:
        with contextlib.closing(archive.open()) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in _members(tar):
                    last = member.name
                    if member.isreg() and not member.issparse() and is_image(member.name):
                        images.append(TarImage(archive, member.name, member.offset_data, member.size))
                end = tar.offset
            _check_end(file, end)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        after = f"at or after member {clean_text(last)!r}" if last else "at its start"
        raise ImageError(f"{path}: damaged or cut off {after} ({getattr(error, 'strerror', None) or error})") from error
    archive.end = max((image.offset + image.size for image in images), default=0)
    return images


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it would keep all of them; the stubs lack it
        yield member


def _check_end(file: _File, offset: int) -> None:
    """Raises ValueError unless nothing but zeros, and a block of them at least, follows the last member.

    `tarfile` takes any header that it cannot read for the end.
    """
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise ValueError("it ends without an end mark")
    while block:
        if block.strip(b"\0"):
            raise ValueError("what follows is neither a member nor the end")
        block = file.read(1 << 20)
