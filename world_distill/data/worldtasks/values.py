"""What a cell of a row says: texts without labels, lists, ids, and tasks with their agent."""

import json
import re
from typing import Any

from world_distill.data import field_names
from world_distill.data.images.decode import clean_text

_MOST_VALUE = 200  # characters of a text in a report
_PREFIX = re.compile(r"\[([^\[\]]+)\]\s*:\s*(\S.*)")
_ANSWERS = ("assistant", "gpt", "model", "bot")  # whose turn of a conversation holds the tasks


def shorten(text: str) -> str:
    """A value for a report: on one line, not long, and without what a terminal would obey."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(clean_text(text).split()))
    return text if len(text) <= _MOST_VALUE else text[: _MOST_VALUE - 1] + "…"


def has_agent(value: Any) -> bool:
    """Whether a text, or one of a list, begins with `[agent]:`."""
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and _PREFIX.match(text.strip()) for text in texts)


def with_agent(task: str, agent: str) -> tuple[str, str]:
    """(task with its agent in front, agent): the one that the task names, else `agent`, else none."""
    match = _PREFIX.fullmatch(task)
    if match and match[1].strip():
        return f"[{match[1].strip()}]: {match[2]}", match[1].strip()
    agent = " ".join(agent.strip("[]: ").replace("[", "(").replace("]", ")").split())
    return (f"[{agent}]: {task}", agent) if agent else (task, "")


def as_text(value: Any) -> str | None:
    """A text on one line; None if there is none, or if it is JSON."""
    text = " ".join(clean_text(value).split()) if isinstance(value, str) else ""
    return (field_names.without_label(text) or None) if not isinstance(decoded(text), (dict, list)) else None


def as_id(value: Any) -> str | None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    return str(value) if is_number else as_text(value)


def as_paragraphs(value: Any) -> str | None:
    """A text as it is, without its label."""
    text = clean_text(value).strip() if isinstance(value, str) else ""
    return field_names.without_label(text) or None


def as_texts(value: Any) -> list[Any] | None:
    """A list that has a text; also from an object by numbers, or from JSON in a text."""
    value = decoded(value)
    if isinstance(value, dict) and value and all(str(key).strip().isdigit() for key in value):
        value = [value[key] for key in sorted(value, key=lambda key: int(str(key)))]
    return value if isinstance(value, list) and any(isinstance(item, str) for item in value) else None


def as_answer(value: Any) -> Any:
    """What a model wrote: a text, the last turn of a conversation, or what is there in place of a text."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        turns = [turn for turn in value if str(turn.get("role", turn.get("from", ""))).lower() in _ANSWERS]
        if not turns:
            return value
        value = turns[-1].get("content", turns[-1].get("value"))
        if isinstance(value, list):  # parts, of which texts have a type
            value = "\n".join(part["text"] for part in value if isinstance(part, dict) and "text" in part)
    return value if value and isinstance(value, (str, list, dict)) else None


def decoded(value: Any) -> Any:
    """What a text of JSON says; anything else as it is."""
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] + text[-1:] not in ("{}", "[]"):
        return value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return value
