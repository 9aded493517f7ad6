"""What became of the images of an annotated data set: its card, and the list of the images that were left out.

NAME.card.json says how the data set was made, and counts; NAME.rejected.jsonl has a line for each image that has no
record, with the reason and what was measured. Both depend on images and answers only, not on how often a job was
interrupted. Where several machines do a part each, each leaves both files for its part, and the last adds them up.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from world_distill.data.images.scan import Rejection
from world_distill.data.images.sources import ImageSource
from world_distill.data.images.unused import Skipped
from world_distill.data.records.reader import RecordError, write_atomically
from world_distill.data.records.shard_files import disk, part_suffix
from world_distill.interfaces import TaskPair

FILTERED = ("tiny", "dark", "bright", "flat", "blur", "duplicate")  # reasons, in the order of the counts


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of a data set, or of one machine's part of it."""

    counts: dict[str, int]
    kinds: dict[str, int]  # tasks of each kind
    licences: dict[str, int]  # images of each licence
    rejected: list[dict[str, Any]]  # lines of the list

    @classmethod
    def of(
        cls,
        counts: Mapping[str, int],
        pairs: Iterable[TaskPair],
        licences: Iterable[str],
        rejected: Iterable[tuple[ImageSource, Rejection]],
        skipped: Iterable[Skipped] = (),
    ) -> "Findings":
        """What `annotate_images` has found; `pairs` are those that are kept, `licences` those of their images.

        `skipped` are rows and archives that gave no image.
        """
        counts = dict(counts)
        # How many were asked about in this call, and how many before, is no property of the data.
        counts["asked"] += counts.pop("remembered") + counts["failed"]
        kinds, of_each = collections.Counter(p.kind for p in pairs), collections.Counter(licences)
        lines = [*(skip.as_json() for skip in skipped), *(_line(*item) for item in rejected)]
        return cls(counts, dict(kinds), dict(of_each), lines)

    def write(self, folder: pathlib.Path, name: str, part: int, parts: int) -> None:
        """Leaves a part's findings for the one that adds up. Raises RecordError if the disk refuses."""
        suffix = part_suffix(part, parts)
        figures = {"counts": self.counts, "kinds": self.kinds, "licences": self.licences}
        _write(folder, f"{name}{suffix}", figures, self.rejected)

    @classmethod
    def read(cls, folder: pathlib.Path, name: str, part: int, parts: int) -> "Findings":
        """What `write` left. Raises RecordError if it is not there, or damaged."""
        path = folder / f"{name}{part_suffix(part, parts)}.card.json"
        try:
            card = json.loads(path.read_bytes())
            lines = path.with_name(path.name.replace(".card.json", ".rejected.jsonl")).read_bytes().splitlines()
            return cls(card["counts"], card["kinds"], card["licences"], [json.loads(line) for line in lines])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} is damaged or missing ({error}): do shard {part}/{parts} again") from error


@dataclasses.dataclass(frozen=True)
class DataCard:
    """Where a data set's card goes, and what it says besides the findings."""

    folder: pathlib.Path
    name: str
    head: Mapping[str, Any]

    def write(self, parts: Sequence[Findings]) -> None:
        """Writes the card and the list, adding up the findings of all parts, in order. Raises RecordError."""
        figures = {}
        for kind in ("counts", "kinds", "licences"):
            total = collections.Counter()
            for part in parts:
                total.update(getattr(part, kind))  # keeps zeros
            figures[kind] = dict(sorted(total.items(), key=_place if kind == "counts" else None))
        _write(self.folder, self.name, {**self.head, **figures}, [line for part in parts for line in part.rejected])


def _place(count: tuple[str, int]) -> tuple[int, str]:
    """Where a count stands on the card: those of images in the order of the work, then those of rejected pairs."""
    order = [
        "images", "bad_images", "repeated_images", *(f"filtered_{reason}" for reason in FILTERED), "asked", "failed",
        "nothing_to_do", "pairs", "kept",
    ]  # fmt: skip
    return (order.index(count[0]) if count[0] in order else len(order)), count[0]


def _line(source: ImageSource, rejection: Rejection) -> dict[str, Any]:
    value = rejection.value
    if isinstance(value, str):  # an error's text, which begins with the machine's own name of the image
        value = value.removeprefix(f"{source.where}: ")
    line = {"file": source.name, "reason": rejection.reason, "value": value}
    return line if rejection.of is None else line | {"of": rejection.of}


def _write(folder: pathlib.Path, stem: str, card: Mapping[str, Any], rejected: Iterable[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected)
    with disk(folder):
        write_atomically(folder / f"{stem}.rejected.jsonl", lines.encode("utf-8", "replace"))
        write_atomically(
            folder / f"{stem}.card.json", json.dumps(card, indent=1, ensure_ascii=False).encode("utf-8", "replace")
        )
