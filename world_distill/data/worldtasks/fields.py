"""WorldTasks' JSONL, whose field names are not published: which field is what, row by row.

A row is one task about one image, or one image with many: a list of objects with a task each, a list of [task,
solution], or a list of tasks beside one of solutions. A field is known by any of its names in ALIASES, upper or lower
case, with spaces or hyphens for underscores; where a row has several, the first counts (for a task, the first that
begins with `[agent]:`), and it is reported. A row that has a known name twice is not used.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from world_distill.data.images.decode import clean_text
from world_distill.data.images.png import ImageError

ALIASES = {
    "image": ("image", "image_path", "file_name", "filename", "image_file", "image_name", "img", "path", "image_id"),
    "task": (
        "task", "task_prompt", "prompt", "instruction", "compact_prompt", "short_prompt", "text",
        "tasks", "task_prompts", "prompts", "instructions",
    ),
    "solution": (
        "solution", "solution_prompt", "description", "caption", "detailed_prompt", "long_prompt", "video_prompt",
        "solutions", "solution_prompts", "descriptions", "captions", "detailed_prompts",
    ),
    "tasks": ("tasks", "pairs", "task_solution_pairs", "annotations", "items", "samples", "prompts", "task"),
    "agent": ("agent", "agent_name", "actor"),
    "kind": ("kind", "category", "task_type", "task_kind"),
    "id": ("id", "uid", "sample_id", "task_id", "index", "image_id"),
}  # fmt: skip
_KNOWN = {name for names in ALIASES.values() for name in names}
_OF_TASK = ("task", "solution")  # fields that an image's own ones do not stand in for
_MOST_VALUE = 200  # characters of a text in a report
_MOST_KEYS = 40  # of a row in a report
_PREFIX = re.compile(r"\[([^\[\]]+)\]\s*:\s*(\S.*)")


@dataclasses.dataclass(frozen=True)
class Item:
    """One task, as its row has it."""

    line: int  # from 1
    number: int | None  # of the task in its row, from 0; None for a row of its own
    image: str  # path
    task: str  # `[agent]: imperative.`
    solution: str  # empty if there is none
    agent: str
    kind: str
    id: str  # the data set's own; may be empty
    keys: tuple[str, ...] = ()  # of its row


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A row, or a task of one, that makes no record."""

    line: int
    number: int | None
    reason: str  # one word, for counting
    keys: tuple[str, ...]
    value: str = ""  # what is wrong, if that is a value

    @classmethod
    def of(cls, item: Item, reason: str, value: str = "") -> "Unusable":
        return cls(item.line, item.number, reason, item.keys, shorten(value))

    def as_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {"line": self.line}
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
        taken = {_plain_key(name) for field, name in given.items() if field != "tasks"}
        self.aliases = {
            field: (_plain_key(given[field]),) if field in given else tuple(n for n in names if n not in taken)
            for field, names in ALIASES.items()
        }
        self.agent, self.needs_solution = agent.strip(), needs_solution
        self.rows = self.listed = 0  # rows, and those of them that have a list of tasks
        self.keys: collections.Counter[str] = collections.Counter()  # of rows, and of objects in their lists
        self.taken: dict[str, collections.Counter[str]] = {field: collections.Counter() for field in ALIASES}
        self.ambiguous: collections.Counter[tuple[str, str, str]] = collections.Counter()  # field, taken, other

    def read(self, path: pathlib.Path) -> Iterator[Item | Unusable]:
        """All tasks of a JSONL file, in order. Raises ImageError if it cannot be read."""
        try:
            lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from self.items(number, line)

    def items(self, number: int, line: bytes) -> list[Item | Unusable]:
        """The tasks of one line."""
        self.rows += 1
        try:
            row = json.loads(line, object_pairs_hook=_without_repeats)
        except _Repeated as error:
            return [Unusable(number, None, "repeated_key", (), shorten(str(error)))]
        except (ValueError, RecursionError) as error:
            return [Unusable(number, None, "not_json", (), shorten(type(error).__name__))]
        if not isinstance(row, dict):
            return [Unusable(number, None, "not_an_object", (), type(row).__name__)]
        row = _keyed(row)
        self.keys.update(row.keys())
        parts = self._parts(row)
        if isinstance(parts, str):
            return [Unusable(number, None, parts, tuple(row))]
        if parts is None:
            return [self._item(number, None, row, {})]
        self.listed += 1
        return [self._item(number, i, part, row) for i, part in enumerate(parts)]

    def report(self) -> dict[str, Any]:
        """What was taken for what, in how many tasks."""
        used = {name for names in self.taken.values() for name in names}
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

    def _parts(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | str | None:
        """The tasks of a row that lists them; None for one that is a task; a reason if the lists do not fit."""
        found = self._choose("tasks", row, self._as_parts)
        if found is not None:
            self.keys.update(key for part in found for key in part)
            return found
        tasks = self._peek("task", row, _as_texts)
        if tasks is None:
            return None
        solutions = self._peek("solution", row, _as_texts)
        if solutions is None:
            return [{tasks[0]: text} for text in tasks[1]]
        if len(tasks[1]) != len(solutions[1]):
            return "uneven_lists"
        pairs = zip(tasks[1], solutions[1], strict=True)
        return [{tasks[0]: task, solutions[0]: solution} for task, solution in pairs]

    def _as_parts(self, value: Any) -> list[dict[str, Any]] | None:
        """Objects, from a list or an object of them, or a list of [task, solution]; None unless one has a task."""
        if isinstance(value, dict):
            objects = list(value.values())
            value = objects if objects and all(isinstance(item, dict) for item in objects) else [value]
        if not isinstance(value, list):
            return None
        task, solution = self.aliases["task"][0], self.aliases["solution"][0]
        parts = []
        for item in value:
            if isinstance(item, list) and len(item) == 2:
                item = {task: item[0], solution: item[1]}
            parts.append(_keyed(item) if isinstance(item, dict) else {})
        return parts if any(self._peek("task", part, _as_text) for part in parts) else None

    def _item(
        self, line: int, number: int | None, inner: Mapping[str, Any], outer: Mapping[str, Any]
    ) -> Item | Unusable:
        found = {}
        for field in ("image", "task", "solution", "agent", "kind", "id"):
            value = self._choose(field, inner, _CONVERT.get(field, _as_text))
            if value is None and field not in _OF_TASK:
                value = self._choose(field, outer, _CONVERT.get(field, _as_text))
            found[field] = value or ""
        keys = tuple(dict.fromkeys((*outer, *inner)))
        for field in ("image", "task", *(("solution",) if self.needs_solution else ())):
            if not found[field]:
                return Unusable(line, number, f"no_{field}", keys)
        task, agent = _with_agent(found["task"], found["agent"] or self.agent)
        if not agent:
            return Unusable(line, number, "no_agent", keys, shorten(found["task"]))
        return Item(line, number, **(found | {"task": task, "agent": agent}), keys=keys)

    def _choose(self, field: str, row: Mapping[str, Any], convert) -> Any:
        """The value of a field, None if the row has none that can be used; notes which name it had."""
        found = self._peek(field, row, convert, note=True)
        return None if found is None else found[1]

    def _peek(self, field: str, row: Mapping[str, Any], convert, *, note: bool = False) -> tuple[str, Any] | None:
        names = [name for name in self.aliases[field] if name in row and convert(row[name]) is not None]
        if not names:
            return None
        if field == "task":
            names.sort(key=lambda name: not _has_agent(convert(row[name])))
        if note:
            self.taken[field][names[0]] += 1
            self.ambiguous.update((field, names[0], other) for other in names[1:] if _clashes(field, other))
        return names[0], convert(row[names[0]])


def shorten(text: str) -> str:
    """A value for a report: on one line, not long, and without what a terminal would obey."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(clean_text(text).split()))
    return text if len(text) <= _MOST_VALUE else text[: _MOST_VALUE - 1] + "…"


def _has_agent(value: Any) -> bool:
    """Whether a text, or one of a list, begins with `[agent]:`."""
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and _PREFIX.match(text.strip()) for text in texts)


def _with_agent(task: str, agent: str) -> tuple[str, str]:
    """(task with its agent in front, agent): the one that the task names, else `agent`, else none."""
    match = _PREFIX.fullmatch(task)
    if match and match[1].strip():
        return f"[{match[1].strip()}]: {match[2]}", match[1].strip()
    agent = " ".join(agent.strip("[]: ").replace("[", "(").replace("]", ")").split())
    return (f"[{agent}]: {task}", agent) if agent else (task, "")


def _clashes(field: str, other: str) -> bool:
    """An image's id beside its path, or beside the task's id, is nothing to report."""
    return not (other == "image_id" and field in ("image", "id"))


class _Repeated(Exception):
    """A name that a field is known by stands twice in one object; the message is the name."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(_plain_key(key) for key, _ in pairs)
    for key, count in counts.items():
        if count > 1 and key in _KNOWN:
            raise _Repeated(key)
    return dict(pairs)


def _keyed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with plain keys; of unknown ones that become the same, the first."""
    plain: dict[str, Any] = {}
    for key, value in row.items():
        plain.setdefault(_plain_key(key), value)
    return plain


def _plain_key(key: str) -> str:
    return re.sub(r"[\s-]+", "_", clean_text(key).strip().casefold())


def _as_text(value: Any) -> str | None:
    """A text on one line; None if there is none."""
    text = " ".join(clean_text(value).split()) if isinstance(value, str) else ""
    return text or None


def _as_id(value: Any) -> str | None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    return str(value) if is_number else _as_text(value)


def _as_paragraphs(value: Any) -> str | None:
    """A text as it is."""
    text = clean_text(value).strip() if isinstance(value, str) else ""
    return text or None


def _as_path(value: Any) -> str | None:
    """A path, from a text, a list of one, or an object such as `datasets` writes for a picture."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = next((value[k] for k in ("path", "file_name", "image_path") if isinstance(value.get(k), str)), None)
    return (value.strip() or None) if isinstance(value, str) else None


_CONVERT = {"image": _as_path, "id": _as_id, "solution": _as_paragraphs}


def _as_texts(value: Any) -> list[Any] | None:
    """A list that has a text."""
    return value if isinstance(value, list) and any(isinstance(item, str) for item in value) else None
