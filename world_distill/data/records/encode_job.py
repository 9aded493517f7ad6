"""The work of `encode` on some images: pictures are read and fitted in threads, ahead of the encoders.

What cannot be encoded (a text that is too long, a damaged picture or video) is left out with a line that says why.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.data.images.ordered import map_ordered
from world_distill.data.images.png import ImageError, decode_png, encode_png
from world_distill.data.records.clips import ClipSource
from world_distill.data.records.encoder_calls import fit_image, scenes_of, text_states
from world_distill.data.records.estimate import Estimate, estimate
from world_distill.data.records.heads import Heads
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordError, RecordReader
from world_distill.interfaces import TextError

_ALL_OF = 100  # records that are all left out: then it is not the records' fault
_VIDEO_THREADS = 2  # a clip takes 100 MB and more, and a decoder has threads of its own
_SHOWN = 200  # characters of a text that was left out, in the list of those
Images = Sequence[Sequence[int]]  # numbers of the records of each image


@dataclasses.dataclass(frozen=True)
class _Image:
    """An image that has been read, with its records."""

    image_id: str
    picture: bytes  # as it will be stored
    pixels: np.ndarray | None  # [H W 3] uint8; None: the picture is damaged
    trouble: str
    records: list[AnnotatedRecord]


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """What `encode_records` does with some images."""

    reader: RecordReader
    encode_scene: Callable
    encode_text: Callable
    batch: int
    size: tuple[int, int] | None
    lengths: Mapping[str, int]
    clips: ClipSource | None = None  # None: records have no clips

    def estimate(self, images: Images, heads: Heads, **options: Any) -> Estimate:
        """`estimate.estimate` of these images, from a small sample."""

        def texts(number: int) -> tuple[str, str]:
            record = self.reader.without_scene(number)
            return record.task, record.solution

        return estimate(
            images, heads, picture=lambda number: self._fit(self.reader[number].image_png)[0], texts=texts,
            states=self._states, clip=self.clips.latents if self.clips else {}, **options,
        )  # fmt: skip

    def encode(
        self, images: Images, left_out: list[dict[str, Any]], report: Callable[[int], None]
    ) -> Iterator[EncodedRecord]:
        """The encoded records of a shard; `left_out` gets the others, `report` how many are done, a batch at a time."""
        done = 0
        batches = [images[start : start + self.batch] for start in range(0, len(images), self.batch)]
        # Pictures are read and fitted in threads, ahead of the encoders.
        for part in map_ordered(lambda numbers: [self._read(n) for n in numbers], batches):
            yield from self._encode(part, left_out)
            done += sum(len(image.records) for image in part)
            report(sum(len(image.records) for image in part))
            if len(left_out) == done >= _ALL_OF:
                raise RecordError(f"none of the first {done} records can be encoded, such as {left_out[0]}")

    def _read(self, numbers: Sequence[int]) -> _Image:
        first, *rest = numbers
        records = [self.reader[first], *(self.reader.without_scene(number) for number in rest)]
        try:
            picture, pixels = self._fit(records[0].image_png)
        except ImageError as error:
            return _Image(records[0].image_id, b"", None, str(error), records)
        return _Image(records[0].image_id, picture, pixels, "", records)

    def _fit(self, picture: bytes) -> tuple[bytes, np.ndarray]:
        """A picture of the job's size, and its pixels. One that needs no change stays as it is, byte for byte."""
        pixels = decode_png(picture)
        fitted = pixels if self.size is None else fit_image(pixels, self.size)
        return (picture if fitted is pixels else encode_png(fitted)), fitted

    def _encode(self, images: Iterable[_Image], left_out: list[dict[str, Any]]) -> Iterator[EncodedRecord]:
        whole = []
        for image in images:
            if image.pixels is not None:
                whole.append(image)
            else:
                left_out += [_line(record, "picture", image.trouble) for record in image.records]
        records = [record for image in whole for record in image.records]
        texts = iter(self._states([t for r in records for t in (r.task, r.solution) if t]))
        states: dict[str, tuple[dict, dict]] = {}
        for record in records:
            task = next(texts)
            solution = next(texts) if record.solution else None
            line = self._problem(record, task, solution)
            if line is not None:
                left_out.append(line)
                continue
            assert not isinstance(task, str) and not isinstance(solution, str)  # `_problem` says so
            states[record.id] = task, solution or {key: array[:0] for key, array in task.items()}
        used = [image for image in whole if any(record.id in states for record in image.records)]
        pixels = {image.image_id: image.pixels for image in used if image.pixels is not None}
        scenes = scenes_of(pixels, self.encode_scene, self.batch) if pixels else {}
        for image, clip in self._with_clips(used):
            kept = [record for record in image.records if record.id in states]
            if not _finite(scenes[image.image_id]):
                left_out += [_line(record, "picture", "its latents are not finite") for record in kept]
                continue
            if isinstance(clip, str):
                left_out += [_line(record, "video", clip) for record in kept]
                continue
            for record in kept:
                task, solution = states[record.id]
                yield EncodedRecord(
                    id=record.id, image_id=record.image_id, task=record.task, solution=record.solution,
                    agent=record.agent, kind=record.kind, scene=scenes[image.image_id], task_states=task,
                    solution_states=solution, image_png=image.picture, clip=clip,
                )  # fmt: skip

    def _with_clips(self, images: Sequence[_Image]) -> Iterator[tuple[_Image, dict[str, np.ndarray] | str]]:
        """Each image with the latents of its clip, or why it has none; {} where records have no clips."""
        source = self.clips
        if source is None:
            yield from ((image, {}) for image in images)
            return

        def read(image: _Image) -> np.ndarray | str:
            assert image.pixels is not None  # damaged ones are left out before
            return source.read(image.records[0], image.pixels)

        waiting: list[tuple[_Image, np.ndarray | str]] = []
        for image, clip in zip(images, map_ordered(read, images, threads=_VIDEO_THREADS), strict=True):
            waiting.append((image, clip))
            if sum(not isinstance(clip, str) for _, clip in waiting) == source.rows:
                yield from _encoded(source, waiting)
                waiting = []
        yield from _encoded(source, waiting)

    def _states(self, texts: Sequence[str]) -> list[dict[str, np.ndarray] | str]:
        """States [l d] of every text, by name, or why the encoder cannot take it."""
        found: list[dict[str, np.ndarray] | str] = []
        for start in range(0, len(texts), self.batch):
            part = texts[start : start + self.batch]
            try:
                found += text_states(part, self.encode_text, self.batch)
            except TextError:  # of one of them, which its message need not name
                found += [self._states_alone(text) for text in part]
        return found

    def _states_alone(self, text: str) -> dict[str, np.ndarray] | str:
        try:
            return text_states([text], self.encode_text, self.batch)[0]
        except TextError as error:
            return str(error)

    def _problem(self, record: AnnotatedRecord, task: Any, solution: Any) -> dict[str, Any] | None:
        """Why a record is left out, as a line of the list; None: it is not."""
        for role, states in (("task", task), ("solution", solution)):
            if isinstance(states, str):
                return _line(record, role, states)
            tokens = {name: len(array) for name, array in (states or {}).items()}
            if not all(tokens.values()):
                return _line(record, role, "the text encoder makes no tokens of it")
            if not _finite(states or {}):
                return _line(record, role, "its states are not finite")
            if exceeds(tokens, self.lengths):
                name = next(name for name in tokens if exceeds({name: tokens[name]}, self.lengths))
                why = f"{tokens[name]} tokens, and texts are padded to {self.lengths[name]}: raise config.text_length"
                return _line(record, role, why) | {"tokens": tokens}
        return None


def _encoded(
    source: ClipSource, read: Sequence[tuple[_Image, np.ndarray | str]]
) -> Iterator[tuple[_Image, dict[str, np.ndarray] | str]]:
    """The same with latents in the place of clips, or why there are none; at most `source.rows` clips."""
    latents = iter(source.encoded([clip for _, clip in read if not isinstance(clip, str)]))
    for image, clip in read:
        if isinstance(clip, str):
            yield image, clip
            continue
        found = next(latents)
        yield image, found if _finite(found) else "its latents are not finite"


def _finite(arrays: Mapping[str, np.ndarray]) -> bool:
    return all(np.isfinite(array.astype(np.float32)).all() for array in arrays.values())


def _line(record: AnnotatedRecord, what: str, why: str) -> dict[str, Any]:
    line = {"id": record.id, "image_id": record.image_id, "what": what, "why": why[:1000]}
    return line | ({"text": getattr(record, what)[:_SHOWN]} if what in ("task", "solution") else {})


def exceeds(tokens: Mapping[str, int], lengths: Mapping[str, int]) -> bool:
    """Whether a text has more tokens, by the name of its states, than a model takes."""
    return any(count > lengths.get(name, math.inf) for name, count in tokens.items())
