"""Rows whose field names are not published: which field is what, row by row.

A row is one task about one image, or one image with many. Its tasks may be

    a list of objects, of [task, solution], or of texts beside a list of solutions
    a map: {task: solution}, or numbers or tasks to objects
    numbered fields: task_0 ... task_7 beside solution_0 ... solution_7
    any of these as JSON in a text, or in a model's whole answer (`response`, `conversations`)

A field is known by any of its names in `field_names.ALIASES`; where a row has several, the first counts (for a task,
the first that begins with `[agent]:`), and it is reported. A row that has a known name twice is not used.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from world_distill.data import field_names
from world_distill.data.annotation.pair_parsing import parse_pairs
from world_distill.data.field_names import ALIASES as ALIASES
from world_distill.data.images.reader import image_value
from world_distill.data.images.rows import Row
from world_distill.data.images.sources import ImageSource
from world_distill.data.worldtasks.values import (
    as_answer,
    as_id,
    as_paragraphs,
    as_text,
    as_texts,
    decoded,
    has_agent,
    shorten,
    with_agent,
)

_OF_TASK = ("task", "solution")  # fields that an image's own ones do not stand in for
_FIELDS = ("image", "task", "solution", "agent", "kind", "id", *field_names.PROVENANCE)
_MOST_KEYS = 40  # of a row in a report
IN_THE_FILE = "the file itself"  # in a report, in place of the name of the field that has the picture


@dataclasses.dataclass(frozen=True)
class Item:
    """One task, as its row has it."""

    rows: str  # name of the file
    line: int  # from 1
    number: int | None  # of the task in its row, from 0; None for a row of its own
    image: ImageSource | str  # or its path
    task: str  # `[agent]: imperative.`
    solution: str  # empty if there is none
    agent: str
    kind: str
    id: str  # the data set's own; may be empty
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)  # licence, url, author, as far as known
    keys: tuple[str, ...] = ()  # of its row


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A row, or a task of one, that makes no record."""

    rows: str
    line: int
    number: int | None
    reason: str  # one word, for counting
    keys: tuple[str, ...]
    value: str = ""  # what is wrong, if that is a value

    @classmethod
    def of(cls, item: Item, reason: str, value: str = "") -> "Unusable":
        return cls(item.rows, item.line, item.number, reason, item.keys, shorten(value))

    def as_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {"rows": self.rows, "line": self.line}
        if self.number is not None:
            line["task"] = self.number
        return (
            line
            | {"reason": self.reason, "keys": [shorten(key) for key in self.keys[:_MOST_KEYS]]}
            | ({"value": self.value} if self.value else {})
        )


class Schema:
    """Takes rows apart, and remembers how it understood them."""

    def __init__(self, fields: Mapping[str, str] | None = None, *, agent: str = "", needs_solution: bool = True):
        """
        Args:
          fields: names that are to be taken for a field, and for no other.
          agent: of tasks that name none.
          needs_solution: a task without a solution is unusable.

        Raises:
          ValueError: an unknown field.
        """
        given = dict(fields or {})
        if unknown := given.keys() - ALIASES.keys():
            raise ValueError(f"no field {', '.join(sorted(unknown))}: there are {', '.join(ALIASES)}")
        taken = {field_names.plain(name) for field, name in given.items() if field not in ("tasks", "response")}
        self.aliases = {
            field: (field_names.plain(given[field]),) if field in given else tuple(n for n in names if n not in taken)
            for field, names in ALIASES.items()
        }
        self.agent, self.needs_solution = agent.strip(), needs_solution
        self.rows = self.listed = 0  # rows, and those of them that have a list of tasks
        self.keys: collections.Counter[str] = collections.Counter()  # of rows, and of objects in their lists
        self.taken: dict[str, collections.Counter[str]] = {field: collections.Counter() for field in ALIASES}
        self.ambiguous: collections.Counter[tuple[str, str, str]] = collections.Counter()  # field, taken, other
        self._numbered: set[str] = set()  # names of fields with a number that were taken

    def items(self, row: Row) -> list[Item | Unusable]:
        """The tasks of one row."""
        self.rows += 1
        if row.bad is not None:
            return [Unusable(row.file.name, row.number, None, row.bad[0], (), shorten(row.bad[1]))]
        fields = field_names.with_plain_names(row.fields)
        self.keys.update(fields.keys())
        parts = self._parts(fields)
        if isinstance(parts, str):
            return [Unusable(row.file.name, row.number, None, parts, tuple(fields))]
        if parts is None:
            return [self._item(row, None, fields, {})]
        self.listed += 1
        return [self._item(row, i, part, fields) for i, part in enumerate(parts)]

    def report(self) -> dict[str, Any]:
        """What was taken for what, in how many tasks."""
        used = {name for names in self.taken.values() for name in names} | self._numbered
        return {
            "rows": self.rows,
            "rows_with_a_list": self.listed,
            "fields": {field: dict(names.most_common()) for field, names in self.taken.items()},
            "ambiguous": [
                {"field": field, "taken": taken, "not": other, "tasks": count}
                for (field, taken, other), count in sorted(self.ambiguous.items())
            ],
            "unused": {shorten(name): count for name, count in sorted(self.keys.items()) if name not in used},
        }

    # ---- The tasks of a row

    def _parts(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | str | None:
        """The tasks of a row that lists them; None for one that is a task; a reason if the lists do not fit."""
        found = self._choose("tasks", row, self._as_parts)
        if found is None:
            found = self._numbered_parts(row)
        if found is not None:
            self.keys.update(key for part in found for key in part)
            return found
        tasks = self._peek("task", row, as_texts)
        if tasks is None:
            return None if self._peek("task", row, as_text) else self._answered(row)
        solutions = self._peek("solution", row, as_texts)
        if solutions is None:
            return [{tasks[0]: text} for text in tasks[1]]
        if len(tasks[1]) != len(solutions[1]):
            return "uneven_lists"
        pairs = zip(tasks[1], solutions[1], strict=True)
        return [{tasks[0]: task, solutions[0]: solution} for task, solution in pairs]

    def _as_parts(self, value: Any) -> list[dict[str, Any]] | None:
        """Objects, from a list or an object of them, [task, solution], {task: solution}; None unless one has a task."""
        value = decoded(value)
        task, solution = self.aliases["task"][0], self.aliases["solution"][0]
        if isinstance(value, dict):
            value = self._of_map(value)
        if not isinstance(value, list):
            return None
        parts = []
        for item in value:
            if isinstance(item, list) and len(item) == 2:
                item = {task: item[0], solution: item[1]}
            parts.append(field_names.with_plain_names(item) if isinstance(item, dict) else {})
        return parts if any(self._peek("task", part, as_text) for part in parts) else None

    def _of_map(self, value: dict[Any, Any]) -> list[Any] | None:
        """The tasks of an object: one of its own, its objects, or its pairs of task and solution."""
        task, solution = self.aliases["task"][0], self.aliases["solution"][0]
        plain = field_names.with_plain_names(value)
        if self._peek("task", plain, as_text) or not value:
            return [value]
        if all(isinstance(item, str) for item in value.values()):
            if all(str(key).strip().isdigit() for key in value):
                return None  # a list of texts, which `as_texts` reads
            return [{task: key, solution: text} for key, text in value.items()]
        if all(isinstance(item, dict) for item in value.values()):
            whole = [self._peek("task", field_names.with_plain_names(item), as_text) for item in value.values()]
            return [item if has else {task: key, **item} for has, (key, item) in zip(whole, value.items(), strict=True)]
        return [value]

    def _numbered_parts(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The tasks of fields such as task_0 and solution_0, in the order of their numbers."""
        parts: dict[int, dict[str, Any]] = {}
        for key, value in row.items():
            split = field_names.numbered(key)
            if split and any(split[0] in self.aliases[field] for field in ("task", "solution", "agent", "kind", "id")):
                if key not in (name for names in self.aliases.values() for name in names):
                    parts.setdefault(split[1], {})[split[0]] = value
                    self._numbered.add(key)
        found = [part for _, part in sorted(parts.items()) if self._peek("task", part, as_text)]
        return found or None

    def _answered(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The tasks of a model's whole answer in a text."""
        answer = self._choose("response", row, as_answer)
        if answer is None:
            return None
        found = self._as_parts(answer)
        if found is not None:
            return found
        names = [self.aliases[field][0] for field in ("task", "solution", "agent", "kind")]
        pairs = parse_pairs(answer).pairs if isinstance(answer, str) else ()
        texts = [(pair.task, pair.solution, pair.agent, "" if pair.kind == "other" else pair.kind) for pair in pairs]
        return [dict(zip(names, text, strict=True)) for text in texts] or None

    # ---- One task

    def _item(
        self, row: Row, number: int | None, inner: Mapping[str, Any], outer: Mapping[str, Any]
    ) -> Item | Unusable:
        found: dict[str, Any] = {}
        for field in _FIELDS:
            convert = _CONVERT.get(field, as_text)
            if field == "image":
                convert = row_image(row)
                if row.image is not None:
                    found[field] = row.image
                    self.taken[field][IN_THE_FILE] += 1
                    continue
            value = self._choose(field, inner, convert)
            if value is None and field not in _OF_TASK:
                value = self._choose(field, outer, convert)
            found[field] = value or ""
        keys = tuple(dict.fromkeys((*outer, *inner)))
        for field in ("image", "task", *(("solution",) if self.needs_solution else ())):
            if not found[field]:
                return Unusable(row.file.name, row.number, number, f"no_{field}", keys)
        task, agent = with_agent(found["task"], found["agent"] or self.agent)
        if not agent:
            return Unusable(row.file.name, row.number, number, "no_agent", keys, shorten(found["task"]))
        origin = {field: found.pop(field) for field in field_names.PROVENANCE}
        origin = {field: text for field, text in origin.items() if text}
        return Item(
            row.file.name, row.number, number, **(found | {"task": task, "agent": agent}), origin=origin, keys=keys
        )

    def _choose(self, field: str, row: Mapping[str, Any], convert) -> Any:
        """The value of a field, None if the row has none that can be used; notes which name it had."""
        found = self._peek(field, row, convert, note=True)
        return None if found is None else found[1]

    def _peek(self, field: str, row: Mapping[str, Any], convert, *, note: bool = False) -> tuple[str, Any] | None:
        names = [name for name in self.aliases[field] if name in row and convert(row[name]) is not None]
        if not names:
            return None
        if field == "task":
            names.sort(key=lambda name: not has_agent(convert(row[name])))
        if note:
            self.taken[field][names[0]] += 1
            self.ambiguous.update((field, names[0], other) for other in names[1:] if _clashes(field, other))
        return names[0], convert(row[names[0]])


def row_image(row: Row):
    """Reads a cell as the picture of `row`, for `Schema`."""
    return lambda value: image_value(value, row)


def _clashes(field: str, other: str) -> bool:
    """An image's id beside its path, or beside the task's id, is nothing to report."""
    return not (other == "image_id" and field in ("image", "id")) and field not in field_names.PROVENANCE


_CONVERT = {"id": as_id, "solution": as_paragraphs}
