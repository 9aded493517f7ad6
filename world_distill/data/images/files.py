"""Files that a folder, a pattern or an address stands for: local ones, and those that fsspec reaches (gs://, s3://, hf://).

Each file comes once, in the order of the names. Links are followed; a folder that was walked already, through a link or
a loop of them, is not walked again. What cannot be an input is counted in `Unused`.
"""

import dataclasses
import fnmatch
import functools
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from world_distill.data.images import kinds
from world_distill.data.images.png import ImageError
from world_distill.data.images.unused import Unused

_MAX_BRACES = 1_000_000  # names that a brace pattern may stand for
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:(//|:)", re.IGNORECASE)  # `gs://...`, `zip::...`


@dataclasses.dataclass(frozen=True)
class File:
    """A file to read.

    Attributes:
      path: a local path or an address.
      name: what it is called in reports and records: below the folder that was asked for, or the last part.
      given: the user named it, so that its ending need not say that it is a picture.
    """

    path: str
    name: str
    given: bool = False

    @property
    def is_local(self) -> bool:
        return not is_address(self.path)

    @property
    def folder(self) -> str:
        """The folder or address that it lies in."""
        return os.path.dirname(self.path) if self.is_local else self.path.rpartition("/")[0]

    def open(self) -> BinaryIO:
        """Opens it for reading bytes. Raises OSError, ImportError (a package for its address is missing)."""
        return open(self.path, "rb") if self.is_local else _file_system(self.path)[0].open(_inner(self.path), "rb")


def is_address(path: str) -> bool:
    """Whether fsspec is to read it."""
    return _ADDRESS.match(path) is not None


def find_files(spec: str | os.PathLike, unused: Unused) -> list[File]:
    """All files that `spec` stands for, each once, in order.

    Args:
      spec: a folder (with all below it), a file, or a glob pattern of either, with braces `{a,b}` and `{000..012}` if
        need be; local, or an address of fsspec.
      unused: learns what was passed over: links to nothing, hidden folders.

    Raises:
      ImageError: a name without a pattern does not exist, or an address cannot be listed.
    """
    spec = os.fspath(spec)
    if is_address(spec):
        found = [file for address in _expand_braces(spec) for file in _at_address(address)]
    else:
        found = []
        for pattern in [spec] if os.path.exists(spec) else _expand_braces(spec):
            found += _local(pattern, unused)
    once = {_identity(file): file for file in reversed(found)}  # of one file under two names, the first
    return [file for file in found if once[_identity(file)] is file]


def in_folder(folder: str | os.PathLike, unused: Unused, *, stay_inside: bool = False) -> list[File]:
    """All files below a local folder, each once, in the order of their names.

    With `stay_inside`, links to folders outside of it are not followed.
    """
    root, seen = os.fspath(folder), set()
    links: list[str] = []  # folders, for after the real ones, whose names are the better ones
    found: list[File] = []

    def walk(start: str) -> None:
        for where, names, files in os.walk(start):
            at = os.stat(where)
            if (at.st_dev, at.st_ino) in seen:
                names.clear()
                continue
            seen.add((at.st_dev, at.st_ino))
            links.extend(sorted(os.path.join(where, n) for n in names if os.path.islink(os.path.join(where, n))))
            for name in files:
                path = os.path.join(where, name)
                short = record_name(os.path.relpath(path, root))
                if kinds.is_hidden(short):
                    if kinds.is_image(short):
                        unused.add(short, "in a hidden folder")
                elif os.path.isfile(path):
                    found.append(File(path, short))
                else:
                    unused.add(short, "a link to nothing, or no file")

    walk(root)
    top = os.path.realpath(root)
    while links:
        link = links.pop(0)
        if not stay_inside or os.path.commonpath([top, os.path.realpath(link)]) == top:
            walk(link)
    return sorted(found, key=lambda file: file.name.split("/"))


def record_name(path: str) -> str:
    """A path as a name for records: with slashes, and in characters that UTF-8 has."""
    return pathlib.PurePath(path).as_posix().encode("utf-8", "replace").decode()


def _local(pattern: str, unused: Unused) -> list[File]:
    if os.path.isdir(pattern):
        return in_folder(pattern, unused)
    if os.path.exists(pattern):
        return [File(pattern, record_name(os.path.basename(pattern)), given=True)]
    if not glob.has_magic(pattern):
        raise ImageError(f"{pattern}: no such file or folder")
    found, root = [], _plain_root(pattern)
    named = not pattern.endswith("*")  # `*.dat` names pictures, `*` all sorts of things
    for path in sorted(_matching(pattern, unused), key=lambda path: pathlib.Path(path).parts):
        if os.path.isdir(path):
            below = in_folder(path, unused)
            found += [File(file.path, record_name(os.path.relpath(file.path, root))) for file in below]
        elif not kinds.is_hidden(os.path.relpath(path, root)):
            found.append(File(path, record_name(os.path.relpath(path, root)), given=named))
    return found


def _matching(pattern: str, unused: Unused) -> list[str]:
    """The paths that a pattern means. `glob` would go round in a loop of links for `**`."""
    parts = pathlib.Path(pattern).parts
    if "**" not in parts:
        return glob.glob(pattern)
    at = parts.index("**")
    start = str(pathlib.Path(*parts[:at]))
    tops = [top for top in glob.glob(start) if os.path.isdir(top)]
    below = [(file, os.path.relpath(file.path, top)) for top in tops for file in in_folder(top, unused)]
    return [file.path for file, name in below if _matches(pathlib.Path(name).parts, parts[at:])]


def _matches(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the parts of a path are those of a pattern; `**` is any number of folders, or all that is left."""
    if not wanted or not names:
        return not names and (not wanted or wanted == ("**",))
    if wanted[0] == "**":
        return len(wanted) == 1 or _matches(names, wanted[1:]) or _matches(names[1:], wanted)
    return fnmatch.fnmatchcase(names[0], wanted[0]) and _matches(names[1:], wanted[1:])


def _identity(file: File) -> tuple[Any, ...]:
    """Equal for one file reached through different folders. A link to a file is a file of its own."""
    if not file.is_local:
        return (file.path,)
    return _real(file.folder), os.path.basename(file.path)


@functools.lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _plain_root(pattern: str) -> str:
    """The part of a glob pattern before its first wildcard."""
    parts = pathlib.Path(pattern).parts[:-1]
    return str(pathlib.Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts)))


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


# ---- Addresses


def _file_system(address: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(address)


def _inner(address: str) -> str:
    return _file_system(address)[1]


def _at_address(address: str) -> Iterator[File]:
    try:
        system, path = _file_system(address)
        if glob.has_magic(path):
            root = _plain_root(path)
            paths = [p for hit in sorted(system.glob(path)) for p in (system.find(hit) if system.isdir(hit) else [hit])]
        elif system.isdir(path):
            root, paths = path, system.find(path)
        elif system.exists(path):
            root, paths = path.rpartition("/")[0], [path]
        else:
            raise ImageError(f"{address}: no such file or folder")
    except ImageError:
        raise
    except Exception as error:  # every file system has its own: credentials, network, a package that is missing
        raise ImageError(f"{address}: cannot be listed ({type(error).__name__}: {error})") from error
    for found in sorted(paths):
        name = record_name(os.path.relpath(found, root)) if root else record_name(found)
        if not kinds.is_hidden(name):
            yield File(system.unstrip_protocol(found), name, given=paths == [path])
