"""What data sets call their fields: the one table of names, and how a name is recognised.

A name counts in upper or lower case, with spaces or hyphens for underscores. `annotate` takes the image, the licence
and whatever else there is from a row by this table; `import-tasks` takes the tasks, too.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

ALIASES = {
    "image": (
        "image", "image_path", "file_name", "filename", "image_file", "image_name", "img", "img_path", "path",
        "image_id", "picture", "photo", "first_frame", "jpg", "jpeg", "png", "webp", "images",
    ),
    "task": (
        "task", "task_prompt", "prompt", "instruction", "compact_prompt", "short_prompt", "text",
        "tasks", "task_prompts", "prompts", "instructions", "txt",
    ),
    "solution": (
        "solution", "solution_prompt", "description", "caption", "detailed_prompt", "long_prompt", "video_prompt",
        "solutions", "solution_prompts", "descriptions", "captions", "detailed_prompts",
    ),
    "tasks": ("tasks", "pairs", "task_solution_pairs", "annotations", "items", "samples", "prompts", "task"),
    "response": (
        "response", "responses", "output", "answer", "completion", "generated_text", "conversations", "messages",
    ),
    "agent": ("agent", "agent_name", "actor"),
    "kind": ("kind", "category", "task_type", "task_kind"),
    "id": ("id", "uid", "sample_id", "task_id", "index", "image_id", "__key__", "key"),
    "licence": ("licence", "license", "license_name", "image_license"),
    "url": ("url", "image_url", "source_url", "original_url"),
    "author": ("author", "credit", "attribution", "photographer", "creator"),
}  # fmt: skip
PROVENANCE = ("licence", "url", "author")  # fields that go into every record of the image

# `Description: ` and the like in front of a text, with emphasis around it.
_LABEL = re.compile(
    r"[*_#\s]*(?:(?:short|compact|detailed|long)\s+)?"
    r"(?:task|instruction|description|solution|caption|narration|prompt)(?:\s*\d+)?\s*[*_]*\s*:[*_]*\s*",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(.*?\D)_?(\d{1,4})")


def plain(name: Any) -> str:
    """A field's name in lower case, with underscores: how names are compared."""
    text = str(name).encode("utf-8", "replace").decode()
    return re.sub(r"[\s-]+", "_", text.strip().casefold())


def with_plain_names(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row under plain names; of several that become the same, the first."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        found.setdefault(plain(key), value)
    return found


def values_of(field: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of a field in a row with plain names, the name that counts most first."""
    return ((name, row[name]) for name in ALIASES[field] if name in row)


def numbered(name: str) -> tuple[str, int] | None:
    """("task", 3) for `task_3` or `task3`; None for a name without a number at its end."""
    match = _NUMBERED.fullmatch(name)
    return (match[1].rstrip("_"), int(match[2])) if match else None


def without_label(text: str) -> str:
    """`text` without a `Description: `, `**Solution:** ` or `Task 2: ` in front; as it is, if nothing else is in it."""
    return text[match.end() :] if (match := _LABEL.match(text)) and text[match.end() :].strip() else text
