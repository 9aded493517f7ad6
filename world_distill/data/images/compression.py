"""Compressed files, opened by their first bytes, whatever their names say: gzip, bzip2, xz and zstd."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from world_distill.data.images.files import File
from world_distill.data.images.png import ImageError

DAMAGE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises


def open_plain(file: File) -> Any:
    """A file to read what it holds, decompressed. Closing it closes all.

    Raises:
      OSError: it cannot be opened.
      ImageError: a package is missing that reads it.
    """
    return opened(file)[0]


def opened(file: File) -> tuple[Any, bool]:
    """(`open_plain`, whether it is compressed)."""
    try:
        raw = file.open()
    except ImportError as error:
        raise ImageError(f"{file.path}: cannot be read ({error})") from error
    start = raw.read(6)
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return _closing(gzip.GzipFile(fileobj=raw), raw), True
    if start.startswith(b"BZh"):
        return _closing(bz2.BZ2File(raw), raw), True
    if start.startswith(b"\xfd7zXZ"):
        return _closing(lzma.LZMAFile(raw), raw), True
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        raw.close()
        return _zstd(file), True
    return raw, False


def _closing(file: Any, raw: BinaryIO) -> Any:
    close = file.close

    def close_both() -> None:
        close()
        raw.close()

    file.close = close_both
    return file


def _zstd(file: File) -> io.BufferedReader:
    pyarrow = needs_pyarrow(file.path)
    # A stream that goes closes what it read from, so each has the file opened anew.
    return io.BufferedReader(
        _Forward(lambda: pyarrow.CompressedInputStream(pyarrow.PythonFile(file.open(), mode="r"), "zstd"))
    )


class _Forward(io.RawIOBase):
    """A stream that is read forwards; going back starts it anew."""

    def __init__(self, start: Callable[[], Any]):
        self._start = start
        self._stream, self._at = start(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:
            raise io.UnsupportedOperation("a stream has no end to count from")
        target = offset if whence == 0 else self._at + offset
        if target < self._at:
            self._stream.close()
            self._stream, self._at = self._start(), 0
        while self._at < target and (data := self._stream.read(min(1 << 20, target - self._at))):
            self._at += len(data)
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class MissingExtraError(ImageError):
    """A file is whole, but the package that reads it is not installed; the message names the extra."""


def needs_pyarrow(where: str) -> Any:
    """The package pyarrow. Raises MissingExtraError without it."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError(f"{where}: is read with pyarrow: pip install 'world-distill[data]'") from error
    return pyarrow
