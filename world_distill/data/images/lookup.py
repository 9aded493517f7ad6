"""Finding a data set's images by what its rows call them, and never outside of its folder."""

import functools
import os
import pathlib
import re

from world_distill.data.images.decode import SUFFIXES, is_image

OUTSIDE, MISSING, AMBIGUOUS = "image_outside", "image_missing", "image_ambiguous"


class ImageLookup:
    """Images of the data set in folder `root`, as rows of the JSONL file `rows` in it call them.

    A path is looked for beside the rows, in `images` there, in the root, in `train` and `bench` and their `images`, and
    in every folder `shard_*`; with the endings of pictures where it has none; then so is its last part alone. A name
    that only several shards have says nothing.
    """

    def __init__(self, root: pathlib.Path, rows: pathlib.Path):
        self._root = root.resolve()
        shards = sorted(path for path in _folders(root) if re.match(r"shard_", path.name, re.IGNORECASE))
        plain = [rows.parent, rows.parent / "images", root]
        plain += [root / name for name in ("images", "train", "train/images", "bench", "bench/images")]
        plain = [path for path in dict.fromkeys(plain) if path.is_dir()]
        self._plain, self._shards = plain, [path for path in shards if path not in plain]
        self.find = functools.cache(self._find)

    def _find(self, name: str) -> pathlib.Path | str:
        """An image's path, or why there is none."""
        name = name.replace("\\", "/")
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:|[a-z]+://", name) or "\0" in name:
            return OUTSIDE
        outside = False
        for wanted in dict.fromkeys((name, path.name)):
            if wanted in ("", "."):
                continue
            found = [self._in(folder, wanted) for folder in self._plain]
            in_shards = [self._in(folder, wanted) for folder in self._shards]
            outside |= OUTSIDE in (*found, *in_shards)
            if inside := [p for p in found if isinstance(p, pathlib.Path)]:
                return inside[0]
            if inside := [p for p in in_shards if isinstance(p, pathlib.Path)]:
                return inside[0] if len({p.resolve() for p in inside}) == 1 else AMBIGUOUS
        return OUTSIDE if outside else MISSING

    def _in(self, folder: pathlib.Path, name: str) -> pathlib.Path | str | None:
        endings = ("",) if is_image(name) else ("", *SUFFIXES)
        for ending in endings:
            path = folder / f"{name}{ending}"
            try:
                if path.is_file():
                    return path if path.resolve().is_relative_to(self._root) else OUTSIDE
            except (OSError, ValueError, RuntimeError):  # a name that is too long, or that no file can have
                continue
        return None


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    """All folders below `root`; links are not followed."""
    return [pathlib.Path(where) / name for where, names, _ in os.walk(root) for name in names]
