"""Validation and test sets that are split off by image.

An image's set depends on the hash of its file and on the shares alone: not on the order of the records, their number,
or the machine. A larger share keeps all images of a smaller one, and each set is taken from an end of its own, so that
changing one share leaves the other set as it is.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable

from world_distill.data.records.reader import RecordReader
from world_distill.data.records.record_format import RecordError

VALIDATION, TEST = "validation", "test"
_SPLIT_OF = "split_of"  # metadata: the annotated set that a set was split off from, or is the rest of
_SHARES = "split"  # metadata: the shares


@dataclasses.dataclass(frozen=True)
class Splits:
    """Shares of the images in [0, 1) that the sets `validation` and `test` get; the rest is the training set's."""

    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self):
        for name in (VALIDATION, TEST):
            if not 0 <= getattr(self, name) < 1:
                raise RecordError(f"a share of {getattr(self, name):g} for {name}: it is from 0 to below 1")
        if self.validation + self.test >= 1:
            raise RecordError(f"shares of {self.validation:g} and {self.test:g} leave nothing to train on")

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> list[str]:
        """The sets that are split off."""
        return [name for name in (VALIDATION, TEST) if getattr(self, name)]

    def set_of(self, image_id: str) -> str | None:
        """The set that an image is split off to; None: it stays."""
        place = _place(image_id)
        if place < self.validation:
            return VALIDATION
        return TEST if 1 - place <= self.test else None

    def metadata(self, annotated: str) -> dict[str, str]:
        """What the index of each part of the records `annotated` says; {} if nothing is split off."""
        if not self:
            return {}
        return {_SPLIT_OF: annotated, _SHARES: self.flags}

    @property
    def flags(self) -> str:
        """As they are given to `encode`."""
        return " ".join(f"--{name} {getattr(self, name):g}" for name in self.names)

    def check(self, image_ids: Iterable[str]) -> None:
        """Raises RecordError, with the smallest share that would do, if a set gets no image, or none is left."""
        places = sorted({_place(image) for image in image_ids})
        for name in self.names:
            nearest = places[0] if name == VALIDATION else 1 - places[-1]
            if not any(self._takes(name, place) for place in places):
                raise RecordError(
                    f"none of {len(places)} images falls into {name} at a share of {getattr(self, name):g}: give"
                    f" --{name} {nearest + 1e-4:.4f} or more, which takes one"
                )
        if all(self._takes(VALIDATION, place) or self._takes(TEST, place) for place in places):
            raise RecordError(f"{self.flags} leaves none of {len(places)} images to train on: give smaller shares")

    def _takes(self, name: str, place: float) -> bool:
        return place < self.validation if name == VALIDATION else 1 - place <= self.test


def _place(image_id: str) -> float:
    """Where an image stands in [0, 1): an even spread over all images."""
    return int.from_bytes(hashlib.sha256(f"split {image_id}".encode()).digest()[:7], "big") / (1 << 56)


def check_names(folder: pathlib.Path, name: str, splits: Splits) -> None:
    """Raises RecordError if splitting `name` would replace other sets, or if not splitting would mix them.

    Args:
      folder: of the records.
      name: the set that is encoded, from NAME_annotated.
      splits: what is split off this time.
    """
    if name in splits.names:
        raise RecordError(f"--name {name} and --{name}: one set cannot be split off from itself")
    for other in (VALIDATION, TEST):
        if other == name:
            continue
        try:
            found = RecordReader(folder, other).metadata
        except RecordError:
            found = None  # missing, unfinished or damaged
        split_off = found is not None and found.get(_SPLIT_OF) == f"{name}_annotated"
        if other in splits.names:
            if (folder / f"{other}_annotated.json").exists() or (found is not None and not split_off):
                raise RecordError(
                    f"{folder} has a set {other} of its own, which --{other} would replace: leave --{other} out, or"
                    f" move {other}.json and {other}_annotated.json away"
                )
        elif split_off and found is not None:
            raise RecordError(
                f"{folder}/{other} was split off from {name}_annotated with `{found[_SHARES]}`: without that, {name}"
                f" would hold its images. Give the same flags, or delete {other}.json"
            )
