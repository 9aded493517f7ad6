"""Scene images to annotated records: an annotator (a VLM, or the sandbox's oracle) writes tasks and solutions.

Annotators are slow and cost money, so every answer goes at once into NAME.journal.jsonl, under the image's hash; a
restarted job asks nothing twice. The records, and the data card NAME.card.json, are written from the journal when all
images have been asked about.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from world_distill.data.pair_rules import check_pair, task_key
from world_distill.data.record_types import decode_png, encode_png
from world_distill.data.records import AnnotatedRecord, RecordError, write_atomically, write_records
from world_distill.interfaces import Annotator, TaskPair


class ImageError(ValueError):
    """An image that cannot be used. The message names its path."""


def read_image(path: str | os.PathLike, *, min_side: int = 16) -> np.ndarray:
    """An image file as RGB [H W 3] uint8, upright (EXIF orientation applied), transparency on white.

    Raises ImageError if it is missing, damaged, of more than 8 bits a channel, or has a side below `min_side` pixels.
    """
    return _decode_and_hash(pathlib.Path(path), min_side)[0]


def _decode_and_hash(path: pathlib.Path, min_side: int) -> tuple[np.ndarray, str]:
    from PIL import Image, ImageOps

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{path}: mode {image.mode} has more than 8 bits a channel: convert it to 8-bit RGB")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            pixels = np.array(image.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise ImageError(f"{path}: not a whole image ({type(error).__name__}: {error})") from error
    if min(pixels.shape[:2]) < min_side:
        raise ImageError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, and a side has at least {min_side}")
    return pixels, hashlib.sha256(data).hexdigest()


def _as_png(path: pathlib.Path, pixels: np.ndarray) -> bytes:
    """The file's own bytes if it is a PNG of just these pixels, with whatever its text chunks say; else a new PNG."""
    data = path.read_bytes()
    if data.startswith(b"\x89PNG") and np.array_equal(decode_png(data), pixels):
        return data
    return encode_png(pixels)


def annotate_images(
    image_paths: Sequence[str | os.PathLike],
    annotator: Annotator,
    out_dir: str | os.PathLike,
    *,
    name: str,
    max_pairs: int,
    seed: int,
    shards: int = 1,
    validate: bool = True,
    skip_bad: bool = False,
    min_side: int = 16,
    licence: str = "unspecified",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Asks the annotator about every image and writes data set `name` of AnnotatedRecords into `out_dir`.

    Args:
      image_paths: files; taken in sorted order, and files with the same bytes once.
      annotator: is asked with a seed of its own for each image, drawn from `seed` and the image.
      out_dir: for the data set, its card and the journal.
      name: of the data set.
      max_pairs: tasks an image at most.
      seed: changes what is asked; answers to another seed are not taken from the journal.
      shards: files to spread the records over.
      validate: drop tasks that `check_pair` rejects, and repeated ones of an image.
      skip_bad: count images that cannot be used instead of stopping.
      min_side: pixels below which an image cannot be used.
      licence: of images and texts, for the card.
      progress: called with (images done, images).

    Returns:
      Counts: images, bad_images, repeated_images, asked, remembered, pairs, kept, and rejected_REASON.

    Raises:
      ImageError: an image cannot be used; missing ones are listed all at once, before anything is asked.
      RecordError: the journal is damaged or in use by another process, no task is left, or the disk refuses.
    """
    paths = sorted(pathlib.Path(p) for p in image_paths)
    missing = [str(p) for p in paths if not p.is_file()]
    if missing and not skip_bad:
        raise ImageError(f"{len(missing)} of {len(paths)} images are missing: {', '.join(missing[:20])}")
    out_dir = pathlib.Path(out_dir)
    counts = collections.Counter(images=len(paths), bad_images=0, repeated_images=0, asked=0, remembered=0)
    images: dict[str, pathlib.Path] = {}  # by hash
    request = {"annotator": annotator.name, "seed": seed, "max_pairs": max_pairs}
    with _Journal(out_dir / f"{name}.journal.jsonl", request) as journal:
        for done, path in enumerate(paths):
            try:
                pixels, digest = _decode_and_hash(path, min_side)
                if digest in images:
                    counts["repeated_images"] += 1
                elif digest in journal.answers:
                    counts["remembered"] += 1
                else:
                    image_seed = int(hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()[:7], 16)
                    try:
                        pairs = annotator.annotate(pixels, max_pairs=max_pairs, seed=image_seed)
                    except Exception as error:
                        error.add_note(f"while annotating {path}; start again to go on from there")
                        raise
                    journal.add(digest, pairs)
                    counts["asked"] += 1
                images.setdefault(digest, path)
            except ImageError as error:
                if not skip_bad:
                    raise
                counts["bad_images"] += 1
                logging.warning("%s", error)
            if progress is not None:
                progress(done + 1, len(paths))
        kept = {d: _choose(journal.answers[d], max_pairs, validate, counts) for d in images}
    if not any(kept.values()):
        raise RecordError(f"{out_dir}: no task is left to write; counts: {dict(counts)}")
    source = {"annotator": annotator.name, "licence": licence}

    def records() -> Iterator[AnnotatedRecord]:
        for digest, path in images.items():
            if not kept[digest]:
                continue
            pixels, digest_now = _decode_and_hash(path, min_side)
            if digest_now != digest:
                raise ImageError(f"{path} has changed since it was annotated")
            png = _as_png(path, pixels)
            for i, pair in enumerate(kept[digest]):
                fields = dataclasses.asdict(pair) | {"image_png": png, "source": {"file": path.name} | source}
                yield AnnotatedRecord(id=f"{digest[:16]}-{i}", image_id=digest[:16], **fields)

    write_records(out_dir, name, records(), shards)
    kinds = collections.Counter(pair.kind for pairs in kept.values() for pair in pairs)
    card = {"name": name, "licence": licence} | request | {"counts": dict(counts), "kinds": dict(sorted(kinds.items()))}
    write_atomically(out_dir / f"{name}.card.json", json.dumps(card, indent=1, ensure_ascii=False).encode())
    return dict(counts)


def _choose(pairs: list[TaskPair], max_pairs: int, validate: bool, counts: collections.Counter) -> list[TaskPair]:
    """The pairs of one image that go into the data set; `counts` learns what became of the others."""
    kept, tasks = [], set()
    for pair in pairs:
        reason = check_pair(pair) if validate else None
        if reason is None and validate and task_key(pair.task) in tasks:
            reason = "repeated"
        if reason is None and len(kept) == max_pairs:
            reason = "above_max_pairs"
        if reason is None:
            tasks.add(task_key(pair.task))
            kept.append(dataclasses.replace(pair, task=pair.task.strip(), solution=pair.solution.strip()))
        else:
            counts[f"rejected_{reason}"] += 1
    counts["pairs"] += len(pairs)
    counts["kept"] += len(kept)
    return kept


class _Journal:
    """Answers by image hash, one JSON line each, on the disk before the next question is asked."""

    def __init__(self, path: pathlib.Path, request: dict):
        self.answers: dict[str, list[TaskPair]] = {}
        self._path, self._request = path, request

    def __enter__(self) -> "_Journal":
        with contextlib.ExitStack() as stack:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context(open(self._path, "a+b"))
            except OSError as error:
                raise RecordError(f"{self._path}: cannot be written ({error})") from error
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecordError(f"{self._path}: another process is annotating this data set") from error
            except OSError:
                logging.warning("%s: this file system has no locks; run one annotation at a time", self._path)
            self._load()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _load(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                pairs = [TaskPair(**pair) for pair in entry["pairs"]]
                if entry["request"] == self._request:
                    self.answers[entry["image"]] = pairs
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(f"{self._path}, line {number}: damaged ({error}): delete the line") from error
        # A line without its end was being written when the job was killed: that answer is lost.
        self._file.truncate(len(whole))

    def add(self, digest: str, pairs: Sequence[TaskPair]) -> None:
        entry = {"image": digest, "request": self._request, "pairs": [dataclasses.asdict(p) for p in pairs]}
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RecordError(f"{self._path}: cannot be written ({error})") from error
        # Read back from JSON on purpose: a restarted job must see the same answer.
        self.answers[digest] = [TaskPair(**pair) for pair in json.loads(json.dumps(entry))["pairs"]]
