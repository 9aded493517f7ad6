"""Annotated records to encoded ones: every scene and every text to arrays, before training.

An image is encoded once: its tasks stand together, whatever the order of the annotated records, and share its scene. A
shard holds whole images, in the order in which each first comes. Shards are finished one after another (`resumable`),
so a job that was cut off goes on at the first unfinished one, and several machines with one folder can do a shard each.

A task whose text the encoder or the model cannot take is left out, counted, and listed in NAME.left_out.jsonl; so is an
image whose picture is damaged, or whose video makes no clip. Nothing of this stops a job.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.data.records.clips import ClipSource
from world_distill.data.records.encode_job import EncodeJob, Images, exceeds
from world_distill.data.records.estimate import disk_warning
from world_distill.data.records.reader import AnnotatedRecord, RecordError, RecordReader
from world_distill.data.records.record_format import TEXT
from world_distill.data.records.resumable import ResumableSet

# Order of the records in a request: as given, an image's scene once a run (earlier versions); by image; dealt out to
# the shards in turn (version 1).
_AS_GIVEN, _GROUPED = {"order": "images"}, {"order": "grouped"}
_ORDERS = (_AS_GIVEN, _GROUPED, {})


def encode_records(
    reader: RecordReader,
    out_dir: str | os.PathLike,
    *,
    name: str,
    encode_scene: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    encode_text: Callable[[Sequence[str]], Mapping[str, Sequence[np.ndarray]]],
    shards: int = 1,
    only: Collection[int] | None = None,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    lengths: Mapping[str, int] | None = None,
    scenes: Mapping[str, Any] | None = None,
    scene_dtype: str | None = None,
    clips: ClipSource | None = None,
    chosen: Callable[[str], bool] = lambda image_id: True,
    metadata: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Writes data set `name` of EncodedRecords, or what is missing of it.

    Records come in the order of their images' first ones. Finished shards are kept if they are of the same request: the
    same annotated records, `shards`, `size`, `scene_dtype` and `metadata`, which therefore has to name whatever the
    encoders and `chosen` depend on. Shards and complete data sets of the same request that an earlier version wrote
    are kept, too. The first new shard takes away the index of an older data set of that name; the new index is written
    by whoever finds all shards finished.

    Args:
      reader: annotated records, in any order.
      out_dir: folder of the new data set.
      name: of the new data set; not that of `reader` if in the same folder.
      encode_scene: as `Encoders.scene`; always called with `batch` images, so that it compiles once.
      encode_text: as `Encoders.text`; called with at most `batch` texts.
      shards: files to spread the images over.
      only: the shards to write, from 0; None writes all. Each may be written by another process.
      batch: images, and texts, at a time.
      size: (height, width) to bring every image to; None takes them as they are. The record keeps the image as fitted.
      lengths: tokens that the model takes of each text, by the name of the states; a task with more is left out.
      scenes: as `Encoders.scenes`, for an estimate of the disk; None makes none.
      scene_dtype: type that wider arrays of scenes and clips are stored in; None: their own. They are read in their
        own type again.
      clips: gives each record the clip of its video; None: records have none. `metadata` names the clips' sizes.
      chosen: whether an image, by its id, is in this data set.
      metadata: texts to keep in the index, such as the family's name and weights.
      say: is told what will be written, what it will take, and that shards of another request are replaced.
      progress: called with (records done, records) of the shards that are asked for, those that are kept at once.

    Returns:
      Counts: records (chosen), encoded and left_out (by this call), bytes (of what it wrote), shards,
      shards_kept (of those asked for), shards_missing (of all: at 0 the data set is complete).

    Raises:
      RecordError: not annotated records, no such shard, images of different sizes, an encoder that returns the wrong
        number or shape, all records left out, or the disk refuses. Shards that are finished by then stay.
    """
    if reader.record_type is not AnnotatedRecord:
        raise RecordError(f"{reader} is encoded already")
    out_dir = pathlib.Path(out_dir)
    if (out_dir / f"{name}.json").absolute() == reader.index_path.absolute():
        raise RecordError(
            f"{reader.index_path}: the encoded data set would replace the annotated one: name it otherwise"
        )
    asked = range(shards) if only is None else sorted(only)
    if outside := [shard for shard in asked if not 0 <= shard < shards]:
        raise RecordError(f"no shard {outside[0]} among {shards}: they are counted from 0 to {shards - 1}")
    metadata = dict(metadata or {}) | ({"scene_dtype": scene_dtype} if scene_dtype else {})
    request = {"annotated": reader.fingerprint, "records": len(reader), "size": size}
    make_set = functools.partial(
        ResumableSet, out_dir, name, shards, metadata=metadata, sequential=True,
        accepts=functools.partial(_fits, lengths=lengths or {}),
    )  # fmt: skip
    counts = {"records": len(reader), "encoded": 0, "left_out": 0, "bytes": 0, "shards": shards}
    for order in _ORDERS:
        if (held := _complete(make_set(request=request | order))) is not None:
            if progress is not None:
                progress(held, held)
            return counts | {"records": held, "shards_kept": len(asked), "shards_missing": 0}
    if not reader.has_heads:
        say(f"{reader.index_path} is of an earlier version: reading it once, to put the tasks of each image together")
    heads = reader.heads()
    images = by_image(heads.image_id, chosen)
    if not images:
        raise RecordError(f"{reader.index_path}: none of its images is to be encoded")
    target = make_set(request=request | _GROUPED)
    begun = make_set(request=request | _AS_GIVEN)
    if list(itertools.chain(*images)) == list(range(len(reader))):
        target = begun  # the order is the same
    elif any(begun.note(shard) is not None for shard in range(shards)):
        say(f"{name} was begun by an earlier version: going on in its order, in which an image may be encoded again")
        target, images = begun, _runs(heads.image_id)
    parts = _whole_images(images, shards)
    wanted = {shard: parts[shard] for shard in asked}
    missing = [shard for shard in wanted if target.note(shard) is None]
    total, counts["records"] = sum(_records(part) for part in wanted.values()), _records(images)
    job = EncodeJob(reader, encode_scene, encode_text, batch, size, lengths or {}, clips)
    if missing and (changes := target.changes()):
        say(f"finished shards of {name} are of another request and are written anew: {'; '.join(changes)}")
    to_write = [image for shard in missing for image in wanted[shard]]
    if to_write and scenes is not None:
        expected = job.estimate(to_write, heads, files=len(missing), scenes=scenes, scene_dtype=scene_dtype)
        counts["estimated_bytes"] = round(expected.total)
        say(f"{name}: {expected.describe()}")
        if warning := disk_warning(out_dir, expected.total):
            say(warning)
    done = total - _records(to_write)

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    report(0)
    for shard in missing:
        left_out: list[dict[str, Any]] = []
        records = job.encode(wanted[shard], left_out, report)
        note = target.write(shard, records, scene_dtype=scene_dtype, left_out=left_out)
        counts["left_out"] += len(left_out)
        counts["encoded"] += _records(wanted[shard]) - len(left_out)
        counts["bytes"] += note["bytes"]
    left = target.join()
    return counts | {"shards_kept": len(wanted) - len(missing), "shards_missing": len(left)}


def by_image(image_ids: Sequence[str], chosen: Callable[[str], bool] = lambda image_id: True) -> Images:
    """Numbers of the records of each chosen image, in the order of their first ones."""
    images: dict[str, list[int]] = {}
    for number, image in enumerate(image_ids):
        images.setdefault(image, []).append(number)
    return [numbers for image, numbers in images.items() if chosen(image)]


def _runs(image_ids: Sequence[str]) -> Images:
    """Numbers of neighbouring records of one image."""
    numbers = itertools.groupby(range(len(image_ids)), key=lambda number: image_ids[number])
    return [list(run) for _, run in numbers]


def _records(images: Images) -> int:
    return sum(map(len, images))


def _complete(target: ResumableSet) -> int | None:
    """Records that a finished data set holds, with those that it left out; None if it is not finished."""
    if not (target.folder / f"{target.name}.json").exists():
        return None
    notes = [note for shard in range(target.shards) if (note := target.note(shard)) is not None]
    if len(notes) < target.shards:
        return None
    return sum(note["count"] + len(note.get("left_out", ())) for note in notes)


def _fits(note: Mapping[str, Any], lengths: Mapping[str, int]) -> bool:
    """Whether a finished shard holds what these lengths let through, and no more."""
    longest = note["longest_text"] or {}
    if "length" in longest:  # records of version 1
        longest = {TEXT: longest}
    if exceeds({name: text["length"] for name, text in longest.items()}, lengths):
        return False
    return all(exceeds(line["tokens"], lengths) for line in note.get("left_out", ()) if "tokens" in line)


def _whole_images(images: Images, shards: int) -> list[Images]:
    """The images of each shard: neighbours, with about as many records in each."""
    # A shard begins at the first image that begins at or behind its share of the records.
    begins = np.cumsum([0, *(len(numbers) for numbers in images)])
    cuts = np.searchsorted(begins, [begins[-1] * shard // shards for shard in range(1, shards)])
    bounds = [0, *cuts.tolist(), len(images)]
    return [images[start:end] for start, end in itertools.pairwise(bounds)]
