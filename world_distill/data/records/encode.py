"""Annotated records to encoded ones: every scene and every text to arrays, before training.

A shard holds whole images, in the order of the annotated records, so that the tasks of an image can share its scene.
Shards are finished one after another (`resumable`), so a job that was cut off goes on at the first unfinished one, and
several machines with one folder can do a shard each.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from world_distill.data.images.png import decode_png, encode_png
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordError, RecordReader
from world_distill.data.records.resumable import ResumableSet


def fit_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image [H W 3] uint8 scaled and cut around its centre to `size`, (height, width)."""
    from PIL import Image, ImageOps

    if image.shape[:2] == tuple(size):
        return image
    return np.array(ImageOps.fit(Image.fromarray(image), (size[1], size[0]), Image.Resampling.LANCZOS))


def encode_records(
    reader: RecordReader,
    out_dir: str | os.PathLike,
    *,
    name: str,
    encode_scene: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    encode_text: Callable[[Sequence[str]], Mapping[str, Sequence[np.ndarray]]],
    shards: int = 1,
    only: int | None = None,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Writes data set `name` of EncodedRecords, in the order of `reader`, or what is missing of it.

    Finished shards are kept if they are of the same request: the same annotated records, `shards`, `size` and
    `metadata`, which therefore has to name whatever the encoders depend on. A complete data set of the same request
    that an earlier version of this program wrote is kept, too. The first new shard takes away the index of an older
    data set of that name; the new index is written by whoever finds all shards finished.

    Args:
      reader: annotated records; those of one image should stand together, for then it is encoded and stored once.
      out_dir: folder of the new data set.
      name: of the new data set; not that of `reader` if in the same folder.
      encode_scene: as `Encoders.scene`; always called with `batch` images, so that it compiles once.
      encode_text: as `Encoders.text`; called with at most `batch` texts.
      shards: files to spread the records over.
      only: the one shard to write, from 0; None writes all. Each may be written by another process.
      batch: images, and texts, at a time.
      size: (height, width) to bring every image to; None takes them as they are. The record keeps the image as fitted.
      metadata: texts to keep in the index, such as the family's name and weights.
      progress: called with (records done, records) of the shards that are asked for, those that are kept at once.

    Returns:
      Counts: records, encoded (by this call), shards, shards_kept (of those asked for), shards_missing (of all: at 0
      the data set is complete).

    Raises:
      RecordError: not annotated records, no such shard, images of different sizes, an encoder that returns the wrong
        number or shape, or the disk refuses. Shards that are finished by then stay.
    """
    if reader.record_type is not AnnotatedRecord:
        raise RecordError(f"{reader} is encoded already")
    out_dir = pathlib.Path(out_dir)
    if (out_dir / f"{name}.json").absolute() == reader.index_path.absolute():
        raise RecordError(
            f"{reader.index_path}: the encoded data set would replace the annotated one: name it otherwise"
        )
    if only is not None and not 0 <= only < shards:
        raise RecordError(f"no shard {only} among {shards}: they are counted from 0 to {shards - 1}")
    request = {"annotated": reader.fingerprint, "records": len(reader), "size": size}
    counts = {"records": len(reader), "encoded": 0, "shards": shards, "shards_kept": 0, "shards_missing": 0}
    if _is_kept(ResumableSet(out_dir, name, shards, request=request, metadata=metadata)):
        if progress is not None:
            progress(len(reader), len(reader))
        return counts | {"shards_kept": shards if only is None else 1}
    parts = _whole_images(reader, shards)
    target = ResumableSet(
        out_dir, name, shards, request=request | {"order": "images"}, metadata=metadata, sequential=True
    )
    wanted = dict(enumerate(parts)) if only is None else {only: parts[only]}
    missing = [shard for shard in wanted if target.note(shard) is None]
    total, encoded = sum(map(len, wanted.values())), 0
    kept = total - sum(len(wanted[shard]) for shard in missing)

    def report(count: int) -> None:
        nonlocal encoded
        encoded += count
        if progress is not None:
            progress(kept + encoded, total)

    report(0)
    for shard in missing:
        records = (reader[i] for i in wanted[shard])
        target.write(shard, _encode(records, encode_scene, encode_text, batch, size, report))
    left = target.join()
    return counts | {"encoded": encoded, "shards_kept": len(wanted) - len(missing), "shards_missing": len(left)}


def _is_kept(target: ResumableSet) -> bool:
    """Whether an earlier version has finished this data set, whose records were dealt out to the shards in turn."""
    if not (target.folder / f"{target.name}.json").exists():
        return False
    return all(target.note(shard) is not None for shard in range(target.shards))


def _whole_images(reader: RecordReader, shards: int) -> list[range]:
    """The records of each shard: neighbours, about as many in each, and all of an image's in one."""
    starts = [0]
    for shard in range(1, shards):
        at = max(len(reader) * shard // shards, starts[-1])
        while 0 < at < len(reader) and reader[at].image_id == reader[at - 1].image_id:
            at += 1
        starts.append(at)
    ends = [*starts[1:], len(reader)]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def _encode(
    records: Iterable[AnnotatedRecord],
    encode_scene: Callable,
    encode_text: Callable,
    batch: int,
    size: tuple[int, int] | None,
    report: Callable[[int], None],
) -> Iterator[EncodedRecord]:
    """The encoded records of a shard; `report` is told how many are done, a batch at a time."""
    for part in _by_images(records, batch):
        pngs = {r.image_id: r.image_png for r in part}
        images = {i: decode_png(png) for i, png in pngs.items()}
        if size is not None:
            fitted = {i: fit_image(image, size) for i, image in images.items()}
            # A file that needs no change stays as it is, with whatever its text chunks say.
            pngs = {i: pngs[i] if fitted[i] is images[i] else encode_png(fitted[i]) for i in images}
            images = fitted
        scenes = _scenes(images, encode_scene, batch)
        texts = iter(text_states([t for r in part for t in (r.task, r.solution) if t], encode_text, batch))
        for record in part:
            fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "source"}
            fields |= {"image_png": pngs[record.image_id], "scene": scenes[record.image_id]}
            task = next(texts)
            solution = next(texts) if record.solution else {key: states[:0] for key, states in task.items()}
            yield EncodedRecord(**fields, task_states=task, solution_states=solution)
        report(len(part))


def _by_images(records: Iterable[AnnotatedRecord], batch: int) -> Iterator[list[AnnotatedRecord]]:
    """Consecutive records with at most `batch` images between them."""
    part: list[AnnotatedRecord] = []
    images: set[str] = set()
    for record in records:
        if len(images) == batch and record.image_id not in images:
            yield part
            part, images = [], set()
        part.append(record)
        images.add(record.image_id)
    if part:
        yield part


def _scenes(images: dict[str, np.ndarray], encode_scene: Callable, batch: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every image, by name."""
    sizes = {image.shape for image in images.values()}
    if len(sizes) > 1:
        raise RecordError(f"images of different sizes {sorted(sizes)} (such as {next(iter(images))}): give `size`")
    pixels = np.stack(list(images.values()))
    filling = np.repeat(pixels[-1:], batch - len(pixels), axis=0)
    arrays = {name: np.asarray(array) for name, array in encode_scene(np.concatenate([pixels, filling])).items()}
    for name, array in arrays.items():
        if array.ndim < 2 or array.shape[0] != batch:
            raise RecordError(f"encode_scene returned {name!r} of shape {array.shape} for {batch} images")
    return {image: {name: array[i] for name, array in arrays.items()} for i, image in enumerate(images)}


def scene_arrays(image: np.ndarray, encode_scene: Callable) -> dict[str, np.ndarray]:
    """The arrays of one image [H W 3] uint8, by name."""
    return _scenes({"image": image}, encode_scene, 1)["image"]


def text_states(texts: Sequence[str], encode_text: Callable, batch: int = 8) -> list[dict[str, np.ndarray]]:
    """States [l d] of every text, by name; `encode_text` is called with at most `batch` texts."""
    found = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        states = {name: [np.asarray(s) for s in arrays] for name, arrays in encode_text(part).items()}
        for name, arrays in states.items():
            if len(arrays) != len(part) or any(s.ndim != 2 for s in arrays):
                shapes = [s.shape for s in arrays]
                raise RecordError(
                    f"encode_text returned {name!r} of shapes {shapes} for {len(part)} texts, not one [l d] a text"
                )
        found += [{name: arrays[i] for name, arrays in states.items()} for i in range(len(part))]
    return found
