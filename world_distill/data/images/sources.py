"""One image that can be read, as often as it is needed: a file, local or remote, or bytes that another source gives.

Everything is read where it lies: members of archives and cells of tables go from the file to memory.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from world_distill.data.images.decode import MAX_BYTES, clean_text, read_bytes
from world_distill.data.images.files import File
from world_distill.data.images.png import ImageError


class ImageSource(Protocol):
    """One image that can be read, as often as it is needed."""

    @property
    def name(self) -> str:
        """Short, without the machine's folders; goes into the records."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What its source says about it."""
        ...

    @property
    def where(self) -> str:
        """In full, for messages."""
        ...

    def read(self) -> bytes:
        """The bytes of the image file. Raises ImageError."""
        ...


@dataclasses.dataclass(frozen=True)
class FileImage:
    """An image file."""

    path: pathlib.Path
    name: str
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    root: pathlib.Path | None = None  # folder that the file has to lie in, links followed

    @property
    def where(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        if self.root is not None:
            check_inside(self.root, self.path, str(self.path))
        return read_bytes(self.path)


@dataclasses.dataclass(frozen=True)
class RemoteImage:
    """An image file behind fsspec."""

    file: File
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def where(self) -> str:
        return self.file.path

    def read(self) -> bytes:
        try:
            with self.file.open() as opened:
                data = opened.read(MAX_BYTES + 1)
        except Exception as error:  # each file system of fsspec has its own
            raise ImageError(f"{self.where}: cannot be read ({type(error).__name__}: {error})") from error
        if len(data) > MAX_BYTES:
            raise ImageError(f"{self.where}: more than {MAX_BYTES >> 20} MiB, which is too large for a picture")
        return data


@dataclasses.dataclass(frozen=True)
class EmbeddedImage:
    """An image that stands in a row: its bytes come from `load`, which raises ImageError."""

    name: str
    where: str
    load: Callable[[], bytes]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self) -> bytes:
        return self.load()


def image_file(file: File, **fields: Any) -> FileImage | RemoteImage:
    """A file as an image."""
    return FileImage(pathlib.Path(file.path), file.name, **fields) if file.is_local else RemoteImage(file, **fields)


def as_sources(images: Sequence[ImageSource | str | os.PathLike]) -> list[ImageSource]:
    """Sources as they are; paths as sources in sorted order."""
    given: list[Any] = list(images)
    if any(isinstance(image, (str, os.PathLike)) for image in given):
        return [FileImage(path, path.name) for path in sorted(pathlib.Path(image) for image in given)]
    return given


def is_inside(root: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether `path` lies in folder `root` once links and .. are followed.

    A snapshot in the hub's cache consists of links into the folder `blobs` beside it, which is inside, too.
    Raises OSError, ValueError, RuntimeError for what is no path.
    """
    real, top = path.resolve(), root.resolve()
    snapshots = next((parent for parent in top.parents if parent.name == "snapshots"), None)
    return real.is_relative_to(top) or (snapshots is not None and real.is_relative_to(snapshots.parent / "blobs"))


def check_inside(root: pathlib.Path, path: pathlib.Path, where: str) -> None:
    """Raises ImageError if `path` is not `is_inside` of `root`."""
    try:
        inside = is_inside(root, path)
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links; characters that no name has
        raise ImageError(f"{where}: {clean_text(str(path))!r} is no path ({error})") from error
    if not inside:
        raise ImageError(
            f"{where}: {clean_text(str(path))} leads out of {root}: images lie in the folder of their rows, or in the"
            " one that --image-root names"
        )


def as_metadata(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's fields as texts; what is not a text as JSON, what is empty not at all."""
    fields = {"licence" if key == "license" else key: value for key, value in row.items()}
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in fields.items()
        if value not in (None, "")
    }
    return {clean_text(str(key)): clean_text(text) for key, text in texts.items()}
