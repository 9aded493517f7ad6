"""The one reader of pictures and of what is said about them, behind `annotate` and `import-tasks`.

    pictures        with a text of the same name beside them (0.jpg, 0.txt, 0.json)
    archives        tar, compressed or not, and zip, with side files, as webdatasets are
    rows            JSONL, JSON, CSV, compressed or not: a path a row; metadata.* describes the pictures of its folder;
                    a text with a path a line
    tables          Parquet and Arrow (`save_to_disk`), with pictures or paths in them

`read_rows` gives a `Row` for each; `find_images` gives the images themselves. What is passed over is counted in
`Unused`, and damage stops either of them, unless `skip_bad`.
"""

import base64
import binascii
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from world_distill.data import field_names
from world_distill.data.images import kinds
from world_distill.data.images.archives import SIDE_FILES, fields_of, in_archive
from world_distill.data.images.compression import DAMAGE, MissingExtraError
from world_distill.data.images.decode import clean_text
from world_distill.data.images.files import File, find_files, is_address
from world_distill.data.images.lookup import MISSING, WORDS, ImageLookup
from world_distill.data.images.png import ImageError
from world_distill.data.images.rows import Row, path_rows, text_rows
from world_distill.data.images.sources import EmbeddedImage, FileImage, ImageSource, as_metadata, image_file
from world_distill.data.images.tables import has_pictures, table_rows
from world_distill.data.images.unused import Unused
from world_distill.data.images.zips import in_zip

_METADATA = "metadata"  # rows in a file of this name are about the pictures of their folder


def find_images(
    spec: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    skip_bad: bool = False,
    unused: Unused | None = None,
) -> list[ImageSource]:
    """All images that `spec` stands for, in order, each once, with what is said of it as metadata.

    Args:
      spec: a folder (with all below it), or a file or glob pattern, with braces `{a,b}` and `{000..012}` if need be;
        local, or an address of fsspec.
      image_root: folder that has the images that rows name; None: the folder of the rows.
      skip_bad: leave out rows and archives that are damaged, and count them.
      unused: learns what was passed over.

    Returns:
      The sources; [] if a folder or a pattern holds none.

    Raises:
      ImageError: a name without a pattern does not exist; an archive, a table or a row is damaged, or its path leads
        out of its folder, unless `skip_bad`.
    """
    unused = Unused() if unused is None else unused
    finder = _Finder(image_root, skip_bad, unused)
    files = for_images(find_files(spec, unused), unused)
    return finder.images(read_rows(files, unused, skip_bad=skip_bad))


def read_rows(files: Sequence[File], unused: Unused, *, skip_bad: bool = False) -> Iterator[Row]:
    """What the files say of pictures, in order: first the rows, then archives, tables and pictures as they come.

    Raises ImageError for a file that is damaged, unless `skip_bad`: of that one, what comes before the damage counts.
    Raises MissingExtraError for a file whose package is not installed.
    """
    sides = side_files(files)
    passed = {side for found in sides.values() for side in found.values()}
    for file in sorted(files, key=lambda file: not _is_text_rows(file)):
        if file in passed:
            continue
        try:
            yield from _rows_of(file, sides.get(file, {}), unused, skip_bad)
        except (ImageError, *DAMAGE) as error:
            text = str(error) if isinstance(error, ImageError) else f"{file.path}: damaged or cut off ({error})"
            if isinstance(error, MissingExtraError):
                raise  # nothing is wrong with the file, which may be the whole data set
            if not skip_bad:
                raise ImageError(text) from error
            unused.skip(file.name, "container", text.removeprefix(f"{file.path}: "), "damaged or cut off")


def _rows_of(file: File, sides: Mapping[str, File], unused: Unused, skip_bad: bool) -> Iterator[Row]:
    if kinds.is_tar(file.name):
        for number, sample in enumerate(in_archive(file, unused, skip_bad=skip_bad), 1):
            yield Row(file, number, fields_of(sample.texts), image=sample.image)
    elif kinds.is_archive(file.name):
        for number, sample in enumerate(in_zip(file, unused), 1):
            yield Row(file, number, fields_of(sample.texts), image=sample.image)
    elif (kind := kinds.rows_of(file.name)) in ("parquet", "arrow"):
        yield from table_rows(file)
    elif kind is not None:
        yield from text_rows(file)
    elif file.given and file.name.lower().endswith(kinds.LISTS):
        yield from path_rows(file)
    else:
        texts = {end: _text_of(side) for end, side in sides.items()}
        yield Row(file, 1, fields_of(texts), image=image_file(file))


def side_files(files: Sequence[File]) -> dict[File, dict[str, File]]:
    """The texts beside pictures: by picture, and by their endings (`txt`, `json`)."""
    sides: dict[tuple[str, str], dict[str, File]] = {}
    for file in files:
        if _is_side(file):
            sides.setdefault(_stem(file), {})[os.path.splitext(file.name)[1].lower()[1:]] = file
    return {file: sides[_stem(file)] for file in files if kinds.is_image(file.name) and _stem(file) in sides}


def for_images(files: Sequence[File], unused: Unused) -> list[File]:
    """Those of the files that hold pictures, or say something of them; the others are counted."""
    taken = []
    stems = {_stem(file) for file in files if kinds.is_image(file.name)}
    archives = {_stem(file) for file in files if kinds.is_archive(file.name)}
    arrows = _arrows_of_sets(files)
    for file in files:
        kind = kinds.rows_of(file.name)
        metadata = kinds.base_name(file.name).partition(".")[0] == _METADATA
        if kinds.is_image(file.name) or kinds.is_archive(file.name) or (kind is not None and (file.given or metadata)):
            taken.append(file)
        elif kind == "parquet" and _stem(file) in archives and not _has_pictures(file):
            continue  # img2dataset's, which says again what the archive beside it has
        elif kind == "parquet" or (kind == "arrow" and _belongs(file, arrows)):
            taken.append(file)
        elif (_is_side(file) and _stem(file) in stems) or file.given or _is_unnamed_picture(file):
            taken.append(file)
        elif kind == "arrow":
            unused.add(file.name, "a cache of `datasets`")
        elif kind is not None and not kinds.is_unremarkable(file.name):
            unused.add(file.name, "rows: name the file itself")
        elif not kinds.is_unremarkable(file.name):
            packed = kinds.base_name(file.name).endswith(kinds.PACKED)
            unused.add(file.name, "to be unpacked" if packed else "no picture by its name")
    return taken


def _image_in(row: Row) -> tuple[str, ImageSource | str] | None:
    """(plain name of the field that has the picture, "" if it is no field; the picture or its path) of a row."""
    if row.image is not None:
        return "", row.image
    for name, value in field_names.values_of("image", field_names.with_plain_names(row.fields)):
        if (found := image_value(value, row)) is not None:
            return name, found
    return None


def image_value(value: Any, row: Row) -> ImageSource | str | None:
    """What a cell says of a picture: its path, or the picture itself where the cell has its bytes as base64."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        keys = ("bytes", "path", "file_name", "image_path", "url")
        value = next((value[k] for k in keys if isinstance(value.get(k), str) and value[k]), None)
    if not isinstance(value, str) or not value.strip():
        return None
    text = value.strip()
    if text.startswith("data:image/") or (len(text) > 200 and text.startswith(("/9j/", "iVBOR", "UklGR", "R0lGOD"))):
        name, where = f"{row.file.name}/{row.where.rpartition(', ')[2]}", row.where
        return EmbeddedImage(
            clean_text(name), where, lambda: _from_base64(text.partition(";base64,")[2] or text, where)
        )
    return text


class _Finder:
    """Makes images of rows."""

    def __init__(self, image_root: str | os.PathLike | None, skip_bad: bool, unused: Unused):
        self._root, self._skip_bad, self._unused = image_root, skip_bad, unused
        self._lookups: dict[str, ImageLookup] = {}
        self._names: set[str] = set()  # paths of the images that are there
        self._described: set[str] = set()  # those of them that rows named

    def images(self, rows: Iterator[Row]) -> list[ImageSource]:
        found = []
        for row in rows:
            source = self._image(row)
            if source is None:
                continue
            key = os.path.realpath(source.path) if isinstance(source, FileImage) else source.where
            if key in self._names:
                if row.image is None:
                    self._unused.count("rows", "of an image with a row before", 1)
                elif key not in self._described:  # by a row, and met again where it lies
                    self._unused.add(row.file.name, "there under another name")
                continue
            self._names.add(key)
            if row.image is None:
                self._described.add(key)
            found.append(source)
        return found

    def _image(self, row: Row) -> ImageSource | None:
        if row.bad is not None:
            return self._bad(row, *row.bad)
        field = _image_in(row)
        if field is None:
            has = clean_text(", ".join(map(str, row.fields))[:200])
            names = ", ".join(field_names.ALIASES["image"][:4])
            return self._bad(row, "no_image", f"no path in any of {names}, ...; it has {has}")
        name, found = field
        if isinstance(found, str):
            folder = row.file.folder
            root = folder if self._root is None else os.fspath(self._root)
            if root not in self._lookups:
                self._lookups[root] = ImageLookup(root)
            path, found = found, self._lookups[root].find(found)
            if found == MISSING:
                found = self._not_there(root, path)
            if isinstance(found, str):
                return self._bad(row, found, f"{clean_text(path)!r} {WORDS[found]}")
            if root == folder and isinstance(found, FileImage):  # named as the pictures that no row names
                below = os.path.dirname(row.file.name)
                found = dataclasses.replace(found, name=f"{below}/{found.name}" if below else found.name)
        metadata = as_metadata({key: v for key, v in row.fields.items() if field_names.plain(key) != name})
        return dataclasses.replace(found, metadata=metadata) if metadata else found  # pyright: ignore

    def _not_there(self, root: str, path: str) -> ImageSource | str:
        """An image that is missing: `annotate` names all such at once. A link to itself, or no name, is a bad row."""
        place = pathlib.Path(root, path)
        try:
            if not is_address(root):
                os.lstat(place)
        except FileNotFoundError:
            return FileImage(place, clean_text(path), root=pathlib.Path(root))
        except (OSError, ValueError):  # what no name has
            pass
        return MISSING

    def _bad(self, row: Row, reason: str, message: str) -> None:
        if not self._skip_bad:
            raise ImageError(f"{row.where}: {message}")
        self._unused.skip(f"{row.file.name}:{row.number}", "row", message, reason)


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{where}: a picture whose base64 is damaged ({error})") from error


def _text_of(side: File) -> str:
    with side.open() as opened:
        return opened.read(1 << 24).decode("utf-8-sig", "replace")


def _stem(file: File) -> tuple[str, str]:
    """Folder and name without ending: equal for files that belong together."""
    base = os.path.basename(file.name)
    ends = sorted((end for end in kinds.TARS if base.lower().endswith(end)), key=len)
    return file.folder, base[: -len(ends[-1])] if ends else os.path.splitext(base)[0]


def _is_side(file: File) -> bool:
    return file.name.lower().endswith(SIDE_FILES) and not file.given


def _is_text_rows(file: File) -> bool:
    return kinds.rows_of(file.name) in ("jsonl", "json", "csv")


def _arrows_of_sets(files: Sequence[File]) -> dict[str, set[str]]:
    """By folder of `save_to_disk`, the Arrow files that are the data; caches lie beside them."""
    found = {}
    for file in files:
        if kinds.base_name(file.name) == "state.json":
            try:
                state = json.loads(_text_of(file))
                found[file.folder] = {entry["filename"] for entry in state["_data_files"]}
            except (ValueError, KeyError, TypeError, OSError):
                continue
    return found


def _belongs(file: File, sets: Mapping[str, set[str]]) -> bool:
    base = os.path.basename(file.path)
    return base in sets[file.folder] if file.folder in sets else not base.startswith("cache-")


def _has_pictures(file: File) -> bool:
    try:
        return has_pictures(file)
    except ImageError:  # damaged, or pyarrow is missing; neither matters for what is said again
        return False


def _is_unnamed_picture(file: File) -> bool:
    """Whether a file without an ending, as caches have them, begins as a picture does."""
    if not file.is_local or kinds.ending(file.name) != "no ending":
        return False
    try:
        with file.open() as opened:
            return kinds.begins_as_picture(opened.read(16))
    except OSError:
        return False
