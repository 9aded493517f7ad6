"""Heads of records: what one has to know about each to list, count and deal them out, without pictures and arrays.

The last row of a shard holds the heads of its records: `WDHEAD`, one byte of version, and a msgpack map of columns.
Shards of earlier versions have no such row; their heads are read from the records, whole.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax import serialization

from world_distill.data.records.record_format import Record, RecordError, without_solution

_MAGIC, _VERSION = b"WDHEAD", 1


@dataclasses.dataclass(frozen=True)
class Heads:
    """A column for each field, one entry a record."""

    id: list[str]
    image_id: list[str]
    task: list[str]
    agent: list[str]
    kind: list[str]
    characters: list[int]  # of task and solution together

    def __len__(self) -> int:
        return len(self.id)

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Heads":
        """The heads of records."""
        heads = cls.empty()
        for record in records:
            heads.append(record)
        return heads

    @classmethod
    def empty(cls) -> "Heads":
        return cls(*([] for _ in dataclasses.fields(cls)))

    def append(self, record: Record) -> None:
        """Adds the head of one more record."""
        for name in ("id", "image_id", "task", "agent", "kind"):
            getattr(self, name).append(getattr(record, name))
        self.characters.append(len(record.task) + len(record.solution))

    def take(self, numbers: Iterable[int]) -> "Heads":
        """The heads of these records, in this order."""
        numbers = list(numbers)
        return Heads(*([column[i] for i in numbers] for column in self._columns()))

    @staticmethod
    def joined(parts: Iterable["Heads"]) -> "Heads":
        """Heads of one part after the other."""
        whole = Heads.empty()
        for part in parts:
            for column, more in zip(whole._columns(), part._columns(), strict=True):
                column += more
        return whole

    def check_solutions(self) -> None:
        """Raises RecordError, naming the record, if one has no solution to tell the Demonstrator."""
        for record, task, characters in zip(self.id, self.task, self.characters, strict=True):
            if characters <= len(task):
                raise without_solution(record)

    def to_bytes(self) -> bytes:
        """The row of a shard."""
        columns = dict(zip(_NAMES, self._columns(), strict=True))
        return _MAGIC + bytes([_VERSION]) + serialization.msgpack_serialize(columns)

    @classmethod
    def from_bytes(cls, data: bytes, count: int) -> "Heads":
        """The heads in the row of a shard of `count` records. Raises RecordError if it is damaged, or of others."""
        if data[: len(_MAGIC) + 1] != _MAGIC + bytes([_VERSION]):
            raise RecordError("not the heads of records, or of a later version")
        try:
            columns: Any = serialization.msgpack_restore(data[len(_MAGIC) + 1 :])
            heads = cls(**columns)
            sound = all(
                len(column) == count and all(type(x) is (int if name == "characters" else str) for x in column)
                for name, column in columns.items()
            )
        except Exception as error:  # msgpack has its own exceptions: all mean damaged bytes
            raise RecordError(f"damaged heads of records ({type(error).__name__}: {error})") from error
        if not sound:
            raise RecordError(f"damaged heads: not those of {count} records")
        return heads

    def _columns(self) -> list[list]:
        return [getattr(self, name) for name in _NAMES]


_NAMES = tuple(field.name for field in dataclasses.fields(Heads))
