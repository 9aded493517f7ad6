"""The index of a data set, NAME.json: what its shards hold, and which record is where. It is written last.

It is the promise that every shard is whole. Nothing in it is believed that contradicts something else.
"""

import json
import operator
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.data.records.record_format import READ, TEXT, VERSIONS, EncodedRecord, RecordError
from world_distill.data.records.shard_files import TYPES, fsync, json_bytes, shards_of, write_atomically

INDEX_FORMAT = "world_distill records"
# An index's "order". Without one, records are dealt out to the shards in turn, as earlier versions did.
SEQUENTIAL = "sequential"  # shards follow one another
WITH_CLIPS = 4  # version of the index of encoded records with clips, which earlier versions cannot read
RUNS = "runs"  # the index's "runs" are [shard, count] of neighbouring records in one shard


def index_of(
    kind: str,
    shards: Sequence[dict],
    longest: dict | None,
    metadata: Mapping[str, str] | None,
    *,
    runs: Sequence[Sequence[int]] | None = None,
    sequential: bool = False,
    left_out: int = 0,
) -> dict:
    """The index of a data set of these shards.

    Args:
      kind: type of the records.
      shards: as `entry_of`.
      longest: of `Written`.
      metadata: texts to keep.
      runs: of `Written`, where records were dealt out to several shards.
      sequential: shards follow one another.
      left_out: annotated records that were not encoded.
    """
    index = {
        "format": INDEX_FORMAT,
        "version": WITH_CLIPS if any(shard.get("clips") for shard in shards) else VERSIONS[TYPES[kind]],
        "type": kind,
        "count": sum(s["count"] for s in shards),
        "shards": list(shards),
        "longest_text": longest,
        "metadata": dict(metadata or {}),
    }
    index |= {"left_out": left_out} if left_out else {}
    if runs is not None and len(shards) > 1:
        return index | {"order": RUNS, "runs": [list(run) for run in runs]}
    return index | ({"order": SEQUENTIAL} if sequential or runs is not None else {})


def write_index(folder: pathlib.Path, name: str, index: dict) -> None:
    """Makes the promise that the shards of `index` are whole, and removes those of another number of shards."""
    write_atomically(folder / f"{name}.json", json_bytes(index))
    current = {shard["file"] for shard in index["shards"]}
    for path in shards_of(folder, name, r"(\.note)?"):
        if path.name.removesuffix(".note") not in current:
            path.unlink(missing_ok=True)


def remove_index(folder: pathlib.Path, name: str) -> None:
    """Takes the promise back: old promises must never stand beside new shards."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    fsync(folder)


def places(runs: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(shards, rows) of all records, from the runs of an index."""
    shards = np.repeat([shard for shard, _ in runs], [count for _, count in runs])
    rows = np.empty(len(shards), np.int64)
    for shard in np.unique(shards):
        of_shard = shards == shard
        rows[of_shard] = np.arange(of_shard.sum())
    return shards, rows


def read_index(path: pathlib.Path) -> dict:
    """The index at `path`. Raises RecordError if there is none, or one that cannot be trusted."""
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise RecordError(f"{path}: no readable index of a data set: {_absent(path)}") from error
    except ValueError as error:
        raise RecordError(f"{path}: the index is damaged ({error}): write the data set again") from error
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT:
        raise RecordError(f"{path} is not the index of a data set: give the folder and name of one")
    kind = index.get("type")
    cls = TYPES.get(kind, EncodedRecord) if isinstance(kind, str) else EncodedRecord
    known = (*READ[cls], *((WITH_CLIPS,) if cls is EncodedRecord else ()))
    version = index.get("version")
    if isinstance(version, int) and version > max(known):
        raise RecordError(
            f"{path}: format version {version} is of a later version of world-distill, and this one reads"
            f" {', '.join(map(str, known))}: update it"
        )
    if version not in known:
        raise RecordError(
            f"{path}: format version {version}, this program reads {', '.join(map(str, known))}: write"
            " the data set again"
        )
    try:
        problem = _contradiction(index)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: the index is damaged (lacks {error}): write the data set again") from error
    if problem:
        raise RecordError(f"{path}: the index contradicts itself ({problem}): write the data set again")
    return index


def _absent(path: pathlib.Path) -> str:
    """Why there is no index at `path`, and what to do."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if shards_of(path.parent, path.name.removesuffix(".json")):
        return "shards are there, so its writing was cut off: write the data set again"
    names = {re.sub(r"-\d{5}-of-\d{5}\.arrayrecord$", "", file.name) for file in path.parent.glob("*.arrayrecord")}
    return f"it has no shards; the sets in that folder are {', '.join(sorted(names)) or 'none'}"


def longest_texts(index: dict) -> dict[str, dict]:
    """{name of text states: {"length", "id"}} of the longest text; {} of annotated records."""
    longest = index["longest_text"]
    if longest is None:
        return {}
    if not isinstance(longest, dict):
        raise TypeError("a table of longest texts")
    return {TEXT: longest} if index["version"] == 1 else longest


def _contradiction(index: dict) -> str | None:
    """What in an index cannot be; None if all of it can. Raises KeyError where something is missing, or TypeError."""
    shards = [{key: s[key] for key in ("file", "count", "bytes", "sha256")} for s in index["shards"]]
    counts, files = [s["count"] for s in shards], [s["file"] for s in shards]
    total, order = index["count"], index.get("order")
    typed: list[tuple[Any, type]] = [(index["type"], str)]
    for name, longest in longest_texts(index).items():
        typed += [(name, str), (longest["length"], int), (longest["id"], str)]
    typed += [(s[key], int) for s in shards for key in ("count", "bytes")]
    typed += [(s[key], str) for s in shards for key in ("file", "sha256")]
    typed += [(s.get(flag, False), bool) for s in index["shards"] for flag in ("heads", "clips")]
    typed += [(index.get("left_out", 0), int)]
    metadata = index["metadata"] if isinstance(index["metadata"], dict) else {None: None}
    typed += [(text, str) for item in metadata.items() for text in item]
    if not all(type(value) is kind for value, kind in [*typed, (total, int)]):
        return "a value is of another type"
    if len(set(files)) < len(files) or not all(re.fullmatch(r"[\w.-]+\.arrayrecord", file) for file in files):
        return "shards have no names of their own"
    if min(counts, default=0) < 0 or sum(counts) != total:
        return f"shards have {sum(counts)} records, of {total}"
    with_clips = {s.get("clips", False) for s in index["shards"] if s["count"]}
    if len(with_clips) > 1 or (True in with_clips) != (index["version"] == WITH_CLIPS):
        return "some shards have clips, or the version says otherwise"
    if order == RUNS:
        held = [0] * len(shards)
        for shard, length in index["runs"]:
            if not 0 <= operator.index(shard) < len(shards) or operator.index(length) < 1:
                return f"a run of {length!r} records in shard {shard!r}"
            held[shard] += length
        return None if held == counts else f"shards have {counts} records, and runs {held}"
    if order not in (None, SEQUENTIAL):
        return f"order {order!r}"
    if order is None and counts != [len(range(i, total, len(shards))) for i in range(len(shards))]:
        return f"shards have {counts} records, which were not dealt out in turn"
    return None
