"""Annotated records to encoded ones: every scene to a latent and every text to its states, once, before training."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from world_distill.data.record_types import decode_png, encode_png
from world_distill.data.records import AnnotatedRecord, EncodedRecord, RecordError, RecordReader, write_records


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
    encode_scene: Callable[[np.ndarray], np.ndarray],
    encode_text: Callable[[Sequence[str]], list[np.ndarray]],
    shards: int = 1,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pathlib.Path:
    """Writes data set `name` of EncodedRecords, in the order of `reader`, and returns the path of its index.

    Args:
      reader: annotated records; those of one image should stand together, for then it is encoded once.
      out_dir: folder of the new data set.
      name: of the new data set; not that of `reader` if in the same folder.
      encode_scene: as `ModelFamily.encode_scene`; always called with `batch` images, so that it compiles once.
      encode_text: as `ModelFamily.encode_text`; called with at most `batch` texts.
      shards: files to spread the records over.
      batch: images, and texts, at a time.
      size: (height, width) to bring every image to; None takes them as they are. The record keeps the image as fitted.
      metadata: texts to keep in the index, such as the family's name and weights.
      progress: called with (records done, records).

    Raises:
      RecordError: not annotated records, images of different sizes, an encoder that returns the wrong number or shape,
        or the disk refuses.
    """
    if reader.record_type is not AnnotatedRecord:
        raise RecordError(f"{reader} is encoded already")
    out_dir = pathlib.Path(out_dir)
    if (out_dir / f"{name}.json").absolute() == reader.index_path.absolute():
        raise RecordError(
            f"{reader.index_path}: the encoded data set would replace the annotated one: name it otherwise"
        )

    def encoded() -> Iterator[EncodedRecord]:
        done = 0
        for records in _by_images(reader, batch):
            pngs = {r.image_id: r.image_png for r in records}
            images = {i: decode_png(png) for i, png in pngs.items()}
            if size is not None:
                fitted = {i: fit_image(image, size) for i, image in images.items()}
                # A file that needs no change stays as it is, with whatever its text chunks say.
                pngs = {i: pngs[i] if fitted[i] is images[i] else encode_png(fitted[i]) for i in images}
                images = fitted
            scenes = _scenes(images, encode_scene, batch)
            texts = _texts([t for r in records for t in (r.task, r.solution)], encode_text, batch)
            for k, record in enumerate(records):
                fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "source"}
                fields |= {"image_png": pngs[record.image_id], "scene": scenes[record.image_id]}
                yield EncodedRecord(**fields, task_text=texts[2 * k], solution_text=texts[2 * k + 1])
            done += len(records)
            if progress is not None:
                progress(done, len(reader))

    return write_records(out_dir, name, encoded(), shards, metadata=metadata)


def _by_images(reader: RecordReader, batch: int) -> Iterator[list[AnnotatedRecord]]:
    """Consecutive records with at most `batch` images between them."""
    records: list[AnnotatedRecord] = []
    images: set[str] = set()
    for record in reader:
        if len(images) == batch and record.image_id not in images:
            yield records
            records, images = [], set()
        records.append(record)
        images.add(record.image_id)
    yield records


def _scenes(images: dict[str, np.ndarray], encode_scene: Callable, batch: int) -> dict[str, np.ndarray]:
    """Latent [1 h w c] of every image."""
    sizes = {image.shape for image in images.values()}
    if len(sizes) > 1:
        raise RecordError(f"images of different sizes {sorted(sizes)} (such as {next(iter(images))}): give `size`")
    pixels = np.stack(list(images.values()))
    filling = np.repeat(pixels[-1:], batch - len(pixels), axis=0)
    latents = np.asarray(encode_scene(np.concatenate([pixels, filling])))
    if latents.ndim != 5 or latents.shape[:2] != (batch, 1):
        raise RecordError(f"encode_scene returned shape {latents.shape} for {batch} images, not [{batch} 1 h w c]")
    return dict(zip(images, latents, strict=False))


def _texts(texts: list[str], encode_text: Callable, batch: int) -> list[np.ndarray]:
    """States [l d] of every text."""
    states = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        states.append([np.asarray(s) for s in encode_text(part)])
        if len(states[-1]) != len(part) or any(s.ndim != 2 for s in states[-1]):
            shapes = [s.shape for s in states[-1]]
            raise RecordError(f"encode_text returned shapes {shapes} for {len(part)} texts, not one [l d] a text")
    return [s for part in states for s in part]
