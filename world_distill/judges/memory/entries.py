"""What a judgment cache holds of a judgment, and the same as a line of JSON."""

import dataclasses
import json
import math
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class About:
    """What was asked. None where it is not known: a cache of format 1 did not keep it."""

    clip: str | None = None  # hex sha256 of the clip as judged
    question: str | None = None  # its name in the rubric
    text: str | None = None  # the full question, task included
    task: str | None = None
    agent: str | None = None
    record: str | None = None  # id of the task's record
    rubric: str | None = None  # version


NOTHING = About()
_TEXTS = tuple(field.name for field in dataclasses.fields(About))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored judgment."""

    key: str  # what it is looked up by: `cache.JudgmentCache.key`
    log_odds: float  # log p(yes) - log p(no), finite
    judge: str
    created: float  # seconds since 1970
    about: About = NOTHING


def flat(entry: Entry) -> dict[str, Any]:
    """Its fields by name, those of `about` among them."""
    fields = {"key": entry.key, "log_odds": entry.log_odds, "judge": entry.judge, "created": entry.created}
    return fields | {name: getattr(entry.about, name) for name in _TEXTS}


def to_line(entry: Entry) -> str:
    """One line of JSON, from which `from_line` makes the same entry."""
    return json.dumps(flat(entry), ensure_ascii=False, allow_nan=False)


def from_line(line: str) -> Entry:
    """The entry of a line. Raises ValueError for anything that `to_line` does not write; more fields do not matter."""
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    texts = {name: value.get(name) for name in _TEXTS}
    bad = [name for name, text in texts.items() if not (text is None or _is_text(text))]
    bad += [name for name in ("key", "judge") if not (_is_text(value.get(name)) and value[name])]
    bad += [name for name in ("log_odds", "created") if not _is_number(value.get(name))]
    if isinstance(texts["clip"], str) and not re.fullmatch("[0-9a-f]{64}", texts["clip"]):
        bad.append("clip")
    if bad:
        raise ValueError(f"no judgment: {', '.join(bad)} missing or of another type")
    return Entry(value["key"], float(value["log_odds"]), value["judge"], float(value["created"]), About(**texts))


def _is_text(value: Any) -> bool:
    # JSON can spell halves of surrogate pairs, which are no text and cannot be stored.
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
