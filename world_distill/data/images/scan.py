"""The first look at images, before any annotator: which are whole, new and good enough."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from world_distill.data.images.decode import decode_image, shrink
from world_distill.data.images.filters import Filters, Measures, NearDuplicates, measure, reject
from world_distill.data.images.ordered import map_ordered
from world_distill.data.images.png import ImageError
from world_distill.data.images.sources import ImageSource


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why an image is left out."""

    reason: str  # broken, repeated (the same bytes), duplicate, or one of `image_filters.reject`
    value: Any  # what was measured, or what was wrong
    of: str | None = None  # the image that it repeats


@dataclasses.dataclass(frozen=True)
class Scanned:
    """An image as it will be annotated, or why it will not be."""

    source: ImageSource
    digest: str = ""  # sha256 of the file
    pixels: np.ndarray | None = None  # [H W 3] uint8
    rejection: Rejection | None = None


@dataclasses.dataclass(frozen=True)
class _Look:
    """What can be said about an image without the others."""

    source: ImageSource
    digest: str
    pixels: np.ndarray | None
    measures: Measures | None
    error: ImageError | None


def scan(
    sources: Sequence[ImageSource], part: range, filters: Filters, *, min_side: int, max_side: int
) -> Iterator[Scanned]:
    """The images of `part` (indices into `sources`) in order, each with what is against it, if anything.

    An image that is like an earlier one of `sources` is left out, wherever the earlier one is: parts that are scanned
    on different machines keep together what one scan would keep. For that, all before `part` are looked at as well.

    Raises:
      ImageError: an image cannot be read, unless `filters.broken`.
    """
    near = NearDuplicates(filters.near) if filters.near >= 0 else None
    measured = near is not None or filters != Filters(broken=filters.broken)
    first: dict[str, str] = {}  # name of the first image of these bytes

    def look(item: tuple[int, bytes | ImageError]) -> _Look:
        i, data = item
        if isinstance(data, ImageError):
            return _Look(sources[i], "", None, None, data)
        digest = hashlib.sha256(data).hexdigest()
        if i < part.start and near is None:  # only whether its bytes come again will matter
            return _Look(sources[i], digest, None, None, None)
        try:
            pixels = decode_image(data, sources[i].where, min_side=min_side)
        except ImageError as error:
            return _Look(sources[i], digest, None, None, error)
        return _Look(sources[i], digest, shrink(pixels, max_side), measure(pixels) if measured else None, None)

    def against(seen: _Look) -> Rejection | None:
        if seen.error is not None:
            return Rejection("broken", str(seen.error))
        if seen.measures is not None and (reason := reject(seen.measures, filters)):
            return Rejection(*reason)
        if seen.digest in first:
            return Rejection("repeated", 0, first[seen.digest])
        if near is not None:
            assert seen.measures is not None  # `measured`, then
            if found := near.add(seen.measures.hash, seen.source.name):
                return Rejection("duplicate", *found)
        first[seen.digest] = seen.source.name
        return None

    # Bytes are read in this thread, in order, as compressed archives want it.
    for i, seen in enumerate(map_ordered(look, _bytes(sources[: part.stop]))):
        rejection = against(seen)
        if i < part.start:
            continue
        if seen.error is not None and not filters.broken:
            raise seen.error
        yield Scanned(seen.source, seen.digest, seen.pixels if rejection is None else None, rejection)


def _bytes(sources: Sequence[ImageSource]) -> Iterator[tuple[int, bytes | ImageError]]:
    for i, source in enumerate(sources):
        try:
            yield i, source.read()
        except ImageError as error:
            yield i, error
