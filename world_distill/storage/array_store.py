"""Converted models on disk: an Orbax checkpoint of arrays by dotted path, such as `transformer.blocks.mlp.up.kernel`.

Written piece by piece, so that memory holds the largest array and little more; there as a whole or not at all.
"""

import glob
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from world_distill.errors import UserError
from world_distill.structs import PyTree

BATCH_BYTES = 64 * 2**20  # small arrays are written together: each write costs a round of files
CHUNK_BYTES = 16 * 2**20  # of an array that are compressed at a time, and read at least


class ConvertedError(UserError):
    """A converted model that cannot be read. The message names the folder and what to do."""


class Writer:
    """Writes a converted model, array by array; `finish` makes it appear.

    Args:
      path: folder of the checkpoint; what an interrupted writer left beside it is cleared away.
      metadata: to be kept with it (JSON).
    """

    def __init__(self, path: pathlib.Path, metadata: dict[str, Any]):
        self.path, self._metadata = path.resolve(), metadata
        self.arrays = self.bytes = 0
        self._batch: dict[str, np.ndarray] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.discard()

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one array, which must not change any more, and writes those that wait when they are enough."""
        self._batch[name] = array.view(_Borrowed)
        self.arrays, self.bytes = self.arrays + 1, self.bytes + array.nbytes
        if sum(x.nbytes for x in self._batch.values()) >= BATCH_BYTES:
            self._write()

    def finish(self) -> None:
        """Writes the rest, and gives the checkpoint its name."""
        if self._batch:
            self._write()
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # it warns that there is no OCDBT to merge
        try:
            ocp.partial.finalize(os.fspath(self.path))
        finally:
            logging.set_verbosity(verbosity)

    def discard(self) -> None:
        """Clears away what was written and not finished, by this writer or one before it."""
        for leftover in self.path.parent.glob(f"{glob.escape(self.path.name)}.partial_save*"):
            shutil.rmtree(leftover)

    def _write(self) -> None:
        context = ocp.Context()
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        # Its files would be fewer, but it keeps all that was compressed in memory until an array is complete.
        context.array.saving.use_ocdbt = False
        context.array.saving.use_zarr3 = False  # Orbax takes folders of it for damaged unless they are OCDBT
        with context:
            ocp.partial.save(os.fspath(self.path), self._batch, custom_metadata=self._metadata)
        self._batch.clear()


class _Borrowed(np.ndarray):
    """An array that Orbax does not copy: it does so lest others change it during the writing, and no one does."""

    def __deepcopy__(self, memo: dict[int, Any] | None) -> "_Borrowed":
        return self


def by_name(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path."""
    return flatten_dict(tree, sep=".")


def describe(path: str | os.PathLike) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """(shape of every array, metadata) of a converted model. Raises ConvertedError if there is none."""
    try:
        found = ocp.metadata(os.path.realpath(path))
        kept: Any = found.custom_metadata or {}
        return {name: tuple(x.shape) for name, x in found.metadata.items()}, dict(kept)
    except Exception as error:  # whatever Orbax says of another kind of folder
        raise ConvertedError(f"{path}: no checkpoint of `world-distill convert` ({_first_line(error)})") from error


def types(path: str | os.PathLike) -> dict[str, np.dtype]:
    """Type of every array of a converted model, as it is stored."""
    return {name: np.dtype(x.dtype) for name, x in ocp.metadata(os.path.realpath(path)).metadata.items()}


def load(path: str | os.PathLike, wanted: PyTree) -> PyTree:
    """Arrays of a converted model, each read straight into its place.

    Args:
      path: the checkpoint.
      wanted: nested dict of `ShapeDtypeStruct`s with shardings; arrays of the checkpoint that it lacks are not read.

    Raises:
      ConvertedError: the checkpoint is damaged.
    """
    shapes, _ = describe(path)
    leaves = by_name(wanted)
    try:
        found = ocp.load(os.path.realpath(path), {name: leaves.get(name, ocp.PLACEHOLDER) for name in shapes})
    except Exception as error:
        raise ConvertedError(f"{path}: damaged ({_first_line(error)}); convert the model again") from error
    return unflatten_dict({name: found[name] for name in leaves}, sep=".")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
