"""Where images come from: a folder, a glob pattern, tar archives (webdataset), or JSONL with a path a row.

Everything is read where it lies: members of archives go from the file to memory and are never extracted. The order is
that of the names, and inside an archive or a JSONL that of its members or rows, so it is the same on every machine.
"""

import dataclasses
import glob
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from world_distill.data.images.archives import in_archive
from world_distill.data.images.decode import clean_text, is_image, read_bytes
from world_distill.data.images.png import ImageError

PATH_FIELDS = ("image", "image_path", "file_name", "path")  # of a JSONL row, the first that is there
_MAX_BRACES = 1_000_000  # names that a brace pattern may stand for


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
            _inside(self.root, self.path, str(self.path))
        return read_bytes(self.path)


def find_images(spec: str | os.PathLike) -> list[ImageSource]:
    """All images that `spec` stands for, in order.

    Args:
      spec: a folder (with all below it), or a file or glob pattern, with braces `{a,b}` and `{000..012}` if need be. A
        file that ends in .tar, .tar.gz or .tgz is an archive, one in .jsonl has rows with a path each (PATH_FIELDS),
        relative to its folder; a row's other fields become metadata. Any other file is an image.

    Returns:
      The sources; [] if a folder or a pattern holds none.

    Raises:
      ImageError: a name without a pattern does not exist, an archive or a JSONL is damaged, or a row's path leads out
        of its folder.
    """
    spec, found = os.fspath(spec), []
    for pattern in [spec] if os.path.exists(spec) else _expand_braces(spec):
        if os.path.isdir(pattern):
            found += _in_folder(pathlib.Path(pattern))
        elif os.path.exists(pattern):
            found += _in_file(pathlib.Path(pattern), pathlib.Path(pattern).parent)
        elif glob.has_magic(pattern):
            root = _plain_root(pattern)
            paths = sorted(pathlib.Path(p) for p in glob.glob(pattern, recursive=True))
            found += itertools.chain.from_iterable(_in_file(p, root) for p in paths if not p.is_dir())
        else:
            raise ImageError(f"{pattern}: no such file or folder")
    return found


def as_sources(images: Sequence[ImageSource | str | os.PathLike]) -> list[ImageSource]:
    """Sources as they are; paths as sources in sorted order."""
    given: list[Any] = list(images)
    if any(isinstance(image, (str, os.PathLike)) for image in given):
        return [FileImage(path, path.name) for path in sorted(pathlib.Path(image) for image in given)]
    return given


def _in_folder(folder: pathlib.Path) -> list[ImageSource]:
    paths = sorted(p for p in folder.rglob("*") if is_image(p.name) and p.is_file())
    return [FileImage(path, clean_text(path.relative_to(folder).as_posix())) for path in paths]


def _in_file(path: pathlib.Path, root: pathlib.Path) -> Sequence[ImageSource]:
    if path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return in_archive(path)
    if path.name.lower().endswith(".jsonl"):
        return _in_jsonl(path)
    return [FileImage(path, clean_text(path.relative_to(root).as_posix()))]


def _plain_root(pattern: str) -> pathlib.Path:
    """The part of a glob pattern before its first wildcard."""
    parts = pathlib.Path(pattern).parts[:-1]
    return pathlib.Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))


def _expand_braces(pattern: str) -> list[str]:
    """`a{1,2}b` -> a1b, a2b; `a{08..10}` -> a08, a09, a10; a pattern without them is itself."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is None:
        if not 0 <= int(last) - int(first) < _MAX_BRACES:
            raise ImageError(
                f"{pattern}: {{{first}..{last}}} counts from the smaller number, up to {_MAX_BRACES:,} names"
            )
        words = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        words = choices.split(",")
    rests = _expand_braces(pattern[match.end() :])
    if len(words) * len(rests) > _MAX_BRACES:
        raise ImageError(f"{pattern}: stands for more than {_MAX_BRACES:,} names")
    return [pattern[: match.start()] + word + rest for word in words for rest in rests]


# ---- JSONL


def _in_jsonl(path: pathlib.Path) -> list[ImageSource]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
    return [_row(path, f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]


def _row(path: pathlib.Path, where: str, line: bytes) -> FileImage:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ImageError(f"{where}: a JSON {type(row).__name__}, not an object with a path")
    field = next((f for f in PATH_FIELDS if isinstance(row.get(f), str) and row[f]), None)
    if field is None:
        raise ImageError(
            f"{where}: no path in any of {', '.join(PATH_FIELDS)}; it has {', '.join(map(str, row))[:200]}"
        )
    image = path.parent / row.pop(field)
    _inside(path.parent, image, where)
    return FileImage(image, clean_text(os.path.relpath(image, path.parent)), _metadata(row), path.parent)


def _inside(root: pathlib.Path, path: pathlib.Path, where: str) -> None:
    """Raises ImageError if `path` lies outside `root` once links and .. are followed."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links; characters that no name has
        raise ImageError(f"{where}: {clean_text(str(path))!r} is no path ({error})") from error
    if not inside:
        raise ImageError(
            f"{where}: {clean_text(str(path))} leads out of {root}: images lie in the folder of their JSONL"
        )


def _metadata(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's fields as texts; what is not a text as JSON, what is empty not at all."""
    fields = {"licence" if key == "license" else key: value for key, value in row.items()}
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in fields.items()}
    return {clean_text(key): clean_text(text) for key, text in texts.items() if fields[key] not in (None, "")}
