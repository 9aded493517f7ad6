"""Which file of a WorldTasks folder holds the rows."""

import pathlib
from collections.abc import Sequence

from world_distill.errors import UserError

TRAIN = ("train/train_filtered.jsonl", "train/train.jsonl", "train_filtered.jsonl", "train.jsonl")
BENCH = ("bench/bench.jsonl", "bench/test.jsonl", "bench.jsonl", "test.jsonl")


def rows_file(folder: pathlib.Path, given: str | None, known: Sequence[str]) -> pathlib.Path:
    """The JSONL file of a data set: the one given, a known one, or the only one that there is.

    Raises:
      UserError: there is none, or it lies outside of the folder.
    """
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    if given is not None:
        path = folder / given
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--rows {given}: no such file in {folder}")
        return folder / path.resolve().relative_to(folder.resolve())
    if found := [folder / name for name in known if (folder / name).is_file()]:
        return found[0]
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jsonl"))
    if len(others) == 1:
        return folder / others[0]
    raise UserError(f"{folder} has none of {', '.join(known)}: --rows says which of {', '.join(others) or 'no .jsonl'}")
