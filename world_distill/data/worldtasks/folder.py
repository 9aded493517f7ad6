"""Which files of a data set hold its rows."""

import os
import pathlib
import re
from collections.abc import Sequence

from world_distill.data.images import kinds
from world_distill.data.images.files import File, find_files, is_address, record_name
from world_distill.data.images.reader import for_images, side_files
from world_distill.data.images.sources import is_inside
from world_distill.data.images.unused import Unused
from world_distill.errors import UserError

TRAIN = ("train/train_filtered.jsonl", "train/train.jsonl", "train_filtered.jsonl", "train.jsonl")
BENCH = ("bench/bench.jsonl", "bench/test.jsonl", "bench.jsonl", "test.jsonl")
_SPLITS = {"train": ("train", "training"), "bench": ("bench", "benchmark", "test", "testing", "eval", "evaluation")}
_OTHER = ("validation", "valid", "val", "dev")
_ANY = {word for words in (*_SPLITS.values(), _OTHER) for word in words}


def rows_files(folder: str | os.PathLike, given: str | None, *, bench: bool, unused: Unused) -> tuple[str, list[File]]:
    """(folder of the data set, the files of its rows).

    They are the ones given, WorldTasks' own, the only JSONL, or whatever else holds rows or pictures with their texts:
    metadata.*, tables, archives, pictures with text files, at last the only CSV or JSON. Where names tell splits apart,
    those of one split count: `bench` for the benchmark's, otherwise the training set's.

    Args:
      folder: of the data set; or a file or a pattern of its files; local, or an address of fsspec.
      given: file or pattern in it.
      bench: which split.
      unused: learns which files do not count.

    Raises:
      UserError: there are none, or one lies outside of the folder.
      ImageError: an address cannot be listed.
    """
    folder = os.fspath(folder)
    if not is_address(folder) and not os.path.isdir(folder):
        if not os.path.exists(folder) and not any(sign in folder for sign in "*?[{"):
            raise UserError(f"--folder {folder}: no such folder")
        return _of_pattern(folder, given, unused)
    if given is not None:
        return folder, _given(folder, given, unused)
    known = BENCH if bench else TRAIN
    if not is_address(folder):
        for name in known:
            if os.path.isfile(os.path.join(folder, name)):
                return folder, [File(os.path.join(folder, name), name, given=True)]
    files = find_files(folder, unused)
    lists = [file for file in files if kinds.rows_of(file.name) == "jsonl" and not _is_metadata(file)]
    chosen = lists if len(lists) == 1 else _of_split(lists, bench, Unused())
    if len(chosen) == 1:
        return folder, [_as_given(chosen[0])]
    if not lists and _with_words(files, Unused()):
        found = _of_split(_with_words(files, unused), bench, unused)
        if not found:
            raise UserError(f"{folder} has no files of the split {'bench' if bench else 'train'}: --rows says which")
        return folder, found
    tables = [f for f in files if kinds.rows_of(f.name) in ("csv", "json") and not kinds.is_unremarkable(f.name)]
    if not lists and len(tables) == 1:
        return folder, [_as_given(tables[0])]
    if not (lists or tables):
        raise UserError(
            f"--folder {folder} has no rows among its {len(files)} files: it takes a JSONL, JSON or CSV file with"
            " image, task and solution, or a text beside each picture; `world-distill annotate` has a VLM write them"
        )
    others = ", ".join(file.name for file in (lists or tables)[:20])
    raise UserError(f"{folder} has none of {', '.join(known)}: --rows says which of {others}")


def _of_pattern(pattern: str, given: str | None, unused: Unused) -> tuple[str, list[File]]:
    if given is not None:
        raise UserError(f"--folder {pattern} is no folder, in which --rows {given} could be")
    files = for_images(find_files(pattern, unused), unused)
    if not files:
        raise UserError(f"--folder {pattern}: no files there")
    folders = [file.folder or "." for file in files]
    return folders[0] if is_address(pattern) else os.path.commonpath(folders), files


def _given(folder: str, given: str, unused: Unused) -> list[File]:
    if is_address(folder):
        return [_as_given(file) for file in find_files(f"{folder.rstrip('/')}/{given}", unused)]
    path = os.path.join(folder, given)
    if not os.path.exists(path) and os.path.exists(given):  # a path as the shell completes it
        path = given
    found = find_files(path, unused) if os.path.exists(path) or any(sign in given for sign in "*?[{") else []
    if not found:
        raise UserError(f"--rows {given}: no such file in --folder {folder}")
    if not all(is_inside(pathlib.Path(folder), pathlib.Path(file.path)) for file in found):
        raise UserError(
            f"--rows {given} lies outside of --folder {folder}: move it there, or let --folder name a folder that holds"
            f" rows and pictures, with --image-root {folder}"
        )
    return [File(file.path, record_name(os.path.relpath(file.path, folder)), given=True) for file in found]


def _with_words(files: Sequence[File], unused: Unused) -> list[File]:
    """The files that hold pictures and words, or words about pictures; [] if there are but pictures."""
    taken = for_images(files, unused)
    beside = side_files(taken)
    words = [f for f in taken if not kinds.is_image(f.name) or beside.get(f)]
    return taken if words else []


def _of_split(files: Sequence[File], bench: bool, unused: Unused) -> list[File]:
    """Those of the files whose names say that they are of a split, if any does; else those that say nothing."""
    wanted = set(_SPLITS["bench" if bench else "train"])
    said = {file: set(re.split(r"[^a-z]+", file.name.lower())) & _ANY for file in files}
    mine = [file for file in files if said[file] & wanted]
    chosen = set(mine or [file for file in files if not said[file]])
    for file in files:
        if file not in chosen:
            unused.add(file.name, "of another split: --rows says which")
    return [file for file in files if file in chosen]


def _as_given(file: File) -> File:
    return File(file.path, file.name, given=True)


def _is_metadata(file: File) -> bool:
    return kinds.base_name(file.name).partition(".")[0] == "metadata"
