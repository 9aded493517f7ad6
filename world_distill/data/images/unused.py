"""What was not used and why: counted by ending and reason, said in one line at the end."""

import collections
import dataclasses
from typing import Any

from world_distill.data.images import kinds

_MOST = 12  # reasons in the line; the rest is counted


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file, a container or a row that gives no image. As a line of the list of rejected images."""

    name: str
    reason: str  # one word: container, row, file
    value: str  # what is wrong

    def as_json(self) -> dict[str, Any]:
        """As a line of a list."""
        return {"file": self.name, "reason": self.reason, "value": self.value}


class Unused:
    """Counts of what was passed over.

    Attributes:
      lines: damaged containers and rows, in the order in which they were met; for the list of rejected images.
    """

    def __init__(self):
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.lines: list[Skipped] = []

    def add(self, name: str, why: str, count: int = 1) -> None:
        """Counts a file, or what else has a name with an ending, under a reason of a few words."""
        self._counts[kinds.ending(name), why] += count

    def skip(self, name: str, reason: str, value: str, why: str) -> None:
        """Counts and lists a container or a row that is damaged."""
        self._counts["rows" if reason == "row" else kinds.ending(name), why] += 1
        self.lines.append(Skipped(name, reason, value))

    def count(self, what: str, why: str, count: int) -> None:
        """Counts `count` of `what` ("rows", "images", ".jpg") under a reason."""
        if count:
            self._counts[what, why] += count

    def line(self) -> str:
        """`not used: 12 .txt (no picture), 3 rows (not_json)`; "" if everything was used."""
        if not self._counts:
            return ""
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count:,} {what} ({why})" for (what, why), count in ordered[:_MOST]]
        if rest := sum(count for _, count in ordered[_MOST:]):
            parts.append(f"{rest:,} more for other reasons")
        return "not used: " + ", ".join(parts)
