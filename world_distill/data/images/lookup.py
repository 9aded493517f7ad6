"""Finding pictures by what rows call them, and never outside of the folders that are given."""

import dataclasses
import functools
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from world_distill.data.images.archives import in_archive
from world_distill.data.images.decode import clean_text
from world_distill.data.images.files import File, find_files, in_folder, is_address
from world_distill.data.images.kinds import SUFFIXES, base_name, is_archive, is_image, is_tar
from world_distill.data.images.png import ImageError
from world_distill.data.images.sources import FileImage, ImageSource, image_file, is_inside
from world_distill.data.images.unused import Unused
from world_distill.data.images.zips import in_zip

OUTSIDE, MISSING, AMBIGUOUS = "image_outside", "image_missing", "image_ambiguous"
WORDS = {
    OUTSIDE: "leads out of the folder of its rows: images lie there, or in the folder that --image-root names",
    MISSING: "is not there: --image-root names the folder that has the images",
    AMBIGUOUS: "is the name of several images: rows have to give the folder, too",
}
_BESIDE = ("", "images", "train", "train/images", "bench", "bench/images")  # folders in which paths may begin


@dataclasses.dataclass(frozen=True)
class _Place:
    """An image and where it lies."""

    name: str  # below the root
    source: ImageSource
    real: str  # equal for one image under several names

    @functools.cached_property
    def names(self) -> tuple[str, str]:
        """The name to compare with, and the same without its ending."""
        return _key(self.name), _key(os.path.splitext(self.name)[0])


class ImageLookup:
    """Images below `root`, as rows in the folder `beside` of it call them.

    A path is taken as it stands, beside the rows, in `images` there, in the root, in `train` and `bench` and their
    `images`; with the endings of pictures where it has none. Otherwise, and for a path of another machine, its end is
    looked for anywhere below the root, the longest first: `/scratch/a/b/0.jpg` is `b/0.jpg` before it is `0.jpg`.
    Letters may differ in case and in how accents are written. An end that several images share says nothing. Where no
    file fits, images in archives below the root count.
    """

    def __init__(self, root: str | os.PathLike, beside: str | os.PathLike | None = None):
        """`root` and `beside` are folders, or addresses of fsspec; `beside` is the root if it is None."""
        self._root = os.fspath(root)
        self._beside = self._root if beside is None else os.fspath(beside)
        self._is_local = not is_address(self._root)
        starts = [self._beside, os.path.join(self._beside, "images")]
        starts += [os.path.join(self._root, name) if name else self._root for name in _BESIDE]
        self._starts = [start for start in dict.fromkeys(starts) if not self._is_local or os.path.isdir(start)]
        self.find = functools.cache(self._find)

    def _find(self, name: str) -> ImageSource | str:
        """The image that a row calls `name`, or why there is none: OUTSIDE, MISSING or AMBIGUOUS."""
        wanted = name.replace("\\", "/").strip()
        parts = [part for part in pathlib.PurePosixPath(wanted).parts if part not in ("/", ".")]
        if not parts or "\0" in wanted:
            return OUTSIDE if "\0" in wanted else MISSING
        foreign = wanted.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:|[a-z0-9]+://", wanted) is not None
        outside = foreign
        if self._is_local and (not foreign or wanted.startswith("/")):
            for start in self._starts:
                found = self._at(start, wanted)
                if found is not None and not isinstance(found, str):
                    return found
                outside |= found == OUTSIDE
        if ".." not in parts[-1:] and (found := self._ending(parts)):
            return found[0].source if len({place.real for place in found}) == 1 else self._nearest(found)
        return OUTSIDE if outside else MISSING

    def _at(self, start: str, wanted: str) -> ImageSource | str | None:
        for end in ("",) if is_image(wanted) else ("", *SUFFIXES):
            path = pathlib.Path(start, wanted + end)
            try:
                if path.is_file():
                    inside = is_inside(pathlib.Path(self._root), path)
                    return self._source(File(str(path), "")) if inside else OUTSIDE
            except (OSError, ValueError, RuntimeError):  # a name that is too long, or that no file can have
                continue
        return None

    def _nearest(self, found: Sequence[_Place]) -> ImageSource | str:
        """Of several images with one end, the one in the folder of the rows, if there is one."""
        near = [place.source for place in found if os.path.dirname(place.real) in map(os.path.realpath, self._starts)]
        return near[0] if len(near) == 1 else AMBIGUOUS

    def _ending(self, parts: Sequence[str]) -> list[_Place]:
        """The images whose paths share the longest end with `parts`."""
        keys = [_key(part) for part in parts]
        for index in (lambda: self._index, lambda: self._packed):
            found = index().get("/".join(keys[-2:])) or index().get(keys[-1], [])
            for length in range(len(keys), 2, -1):
                end = "/" + "/".join(keys[-length:])
                if longer := [place for place in found if any(f"/{name}".endswith(end) for name in place.names)]:
                    return longer
            if found:
                return found
        return []

    @functools.cached_property
    def _files(self) -> list[File]:
        """All files below the root that may be read. Listed when needed."""
        if not self._is_local:
            return find_files(self._root, Unused())
        root = pathlib.Path(self._root)
        files = in_folder(root, Unused(), stay_inside=True)
        return [file for file in files if is_inside(root, pathlib.Path(file.path))]

    @functools.cached_property
    def _index(self) -> dict[str, list[_Place]]:
        """The images below the root by the last part and the last two of their paths."""
        files = [file for file in self._files if is_image(file.name)]
        return _by_end(
            _Place(file.name, self._source(file), os.path.realpath(file.path) if self._is_local else file.path)
            for file in files
        )

    @functools.cached_property
    def _packed(self) -> dict[str, list[_Place]]:
        """The same for images in archives: `0.jpg` in `shard_1.tar` is `shard_1/0.jpg`."""
        places = []
        for file in self._files:
            if is_archive(file.name):
                stem = file.name[: len(file.name) - len(base_name(file.name))] + base_name(file.name).partition(".")[0]
                try:
                    samples = in_archive(file, Unused(), skip_bad=True) if is_tar(file.name) else in_zip(file, Unused())
                except ImageError:
                    continue
                places += [_Place(f"{stem}/{s.image.member}", s.image, s.image.where) for s in samples]
        return _by_end(places)

    def _source(self, file: File) -> ImageSource:
        if self._is_local:
            name = clean_text(pathlib.PurePath(os.path.relpath(file.path, self._root)).as_posix())
            return FileImage(pathlib.Path(file.path), name, root=pathlib.Path(self._root))
        return image_file(file)


def _by_end(places: Iterable[_Place]) -> dict[str, list[_Place]]:
    index: dict[str, list[_Place]] = {}
    for place in places:
        for name in place.names:
            parts = name.split("/")
            for key in {parts[-1], "/".join(parts[-2:])}:
                index.setdefault(key, []).append(place)
    return index


def _key(end: str) -> str:
    """How names are compared: macOS takes accents apart, and Windows does not tell letters by their case."""
    return unicodedata.normalize("NFC", clean_text(end)).casefold()
