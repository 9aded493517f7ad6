"""Images in tar archives, compressed or not, as webdatasets are: read by position, never extracted.

Members with one name but for the ending belong together: `0001.jpg`, `0001.json` and `0001.txt` are a picture and what
is said of it. A picture without texts of its own has those of its name up to the first dot: `0001.left.jpg`.
"""

import abc
import contextlib
import dataclasses
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from world_distill.data.images.compression import DAMAGE, open_plain, opened
from world_distill.data.images.decode import MAX_BYTES, clean_text
from world_distill.data.images.files import File
from world_distill.data.images.kinds import is_hidden, is_image, is_unremarkable
from world_distill.data.images.png import ImageError
from world_distill.data.images.unused import Unused

_BLOCK = 512  # tar's unit
MOST_SIDE = 1 << 24  # bytes of a text beside a picture
SIDE_FILES = (".json", ".txt", ".text", ".caption", ".cls")


class _Archive:
    """A tar file, compressed or not, to be read by position.

    A compressed one stays open between reads, since going forward in it is cheap and going back means starting over.
    """

    def __init__(self, file: File):
        self.file = file
        self.end = 0  # of the last image in it
        self._open: Any = None
        self._compressed = False
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            if self._open is None:
                self._open, self._compressed = opened(self.file)
            keep = False
            try:
                self._open.seek(offset)
                data = self._open.read(size)
                keep = self._compressed and offset + size < self.end
                return data
            finally:
                if not keep:
                    self._open.close()
                    self._open = None


@dataclasses.dataclass(frozen=True)
class Member(abc.ABC):
    """An image in an archive; an `ImageSource`."""

    damage: ClassVar[tuple[type[Exception], ...]] = DAMAGE  # what reading a damaged archive raises
    archive: Any  # has the archive's `file`
    member: str
    size: int  # in bytes
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return clean_text(f"{self.archive.file.name}/{self.member}")

    @property
    def where(self) -> str:
        return clean_text(f"{self.archive.file.path}, member {self.member}")

    def read(self) -> bytes:
        """The image's file. Raises ImageError: it is too large, or damaged."""
        if self.size > MAX_BYTES:
            raise ImageError(f"{self.where}: more than {MAX_BYTES >> 20} MiB, which is too large for a picture")
        try:
            data = self._read()
        except self.damage as error:
            raise ImageError(f"{self.where}: cannot be read ({error})") from error
        if len(data) != self.size:
            raise ImageError(f"{self.where}: the archive is cut off inside it")
        return data

    @abc.abstractmethod
    def _read(self) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class _TarMember(Member):
    """An image in a tar archive."""

    offset: int = 0  # of its bytes in the archive once decompressed

    def _read(self) -> bytes:
        return self.archive.read(self.offset, self.size)


@dataclasses.dataclass
class Sample:
    """An image of an archive, and the texts of its side files by their endings (`json`, `txt`)."""

    image: Any  # an ImageSource with `member`
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


def in_archive(file: File, unused: Unused, *, skip_bad: bool = False) -> list[Sample]:
    """The images of an archive, in its order, with their side files.

    Args:
      file: the archive.
      unused: learns of members that are neither, and of the damage that `skip_bad` passes over.
      skip_bad: of a damaged archive, the whole members before the damage count.

    Raises:
      ImageError: it is damaged or cut off, unless `skip_bad`.
    """
    archive, samples, last = _Archive(file), [], ""
    texts: dict[str, dict[str, str]] = {}  # of side files, by their names without the ending
    others: list[str] = []
    try:
        with contextlib.closing(open_plain(file)) as plain:
            with tarfile.open(fileobj=plain, mode="r:") as tar:
                for member in _members(tar):
                    last = member.name
                    if not member.isreg() or member.issparse() or is_hidden(member.name):
                        continue
                    if is_image(member.name):
                        samples.append(Sample(_TarMember(archive, member.name, member.size, offset=member.offset_data)))
                    elif member.name.lower().endswith(SIDE_FILES) and member.size <= MOST_SIDE:
                        key, _, end = member.name.rpartition(".")
                        texts.setdefault(key, {})[end.lower()] = _text(plain, member)
                    elif not is_unremarkable(member.name):
                        others.append(member.name)
                end = tar.offset
            _check_end(plain, end)
    except (tarfile.TarError, *DAMAGE) as error:
        after = f"at or after member {clean_text(last)!r}" if last else "at its start"
        message = f"damaged or cut off {after} ({getattr(error, 'strerror', None) or error})"
        if not skip_bad:
            raise ImageError(f"{file.path}: {message}; --skip-bad goes on with what is whole") from error
        unused.skip(file.name, "container", message, "damaged or cut off")
        samples = _whole(samples)
    archive.end = max((sample.image.offset + sample.image.size for sample in samples), default=0)
    return together(samples, texts, others, unused)


def together(
    samples: list[Sample], texts: Mapping[str, Mapping[str, str]], others: Sequence[str], unused: Unused
) -> list[Sample]:
    """The samples of an archive with their texts, which come by names without the ending; counts what is left over."""
    met = set()
    for sample in samples:
        # Names may have dots of their own: `22.05.png` and `22.06.png` are two, not one with two endings.
        whole = sample.image.member.rpartition(".")[0]
        key = whole if whole in texts else _to_first_dot(whole)
        sample.texts |= texts.get(key, {})
        met.add(key)
    for name in others:
        unused.add(name, "no picture, in an archive")
    for key, ends in texts.items():
        for end in ends if key not in met else ():
            unused.add(f"{key}.{end}", "beside no picture, in an archive")
    return samples


def fields_of(texts: Mapping[str, str]) -> dict[str, Any]:
    """The fields that side files give: those of the JSON object, and other texts under their endings."""
    fields: dict[str, Any] = {}
    for end, text in texts.items():
        if end == "json":
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                continue
            fields |= value if isinstance(value, dict) else {"json": value}
        elif text.strip():
            fields[end] = text.strip()
    return fields


def _text(plain: Any, member: tarfile.TarInfo) -> str:
    """A small member's text. In pieces, so that the buffer holds the end, to which tarfile goes back by a byte."""
    plain.seek(member.offset_data)
    pieces = [plain.read(min(4096, member.size - at)) for at in range(0, member.size, 4096)]
    return b"".join(pieces).decode("utf-8", "replace")


def _to_first_dot(name: str) -> str:
    """`folder/0001` for `folder/0001.left`."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _whole(samples: list[Sample]) -> list[Sample]:
    """The samples of an archive whose bytes are all there."""
    good = []
    for sample in samples:
        try:
            sample.image.read()
        except ImageError:
            continue
        good.append(sample)
    return good


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it would keep all of them; the stubs lack it
        yield member


def _check_end(file: Any, offset: int) -> None:
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
