"""What a VLM wrote about a picture, as pairs of task and solution; in any form, and nothing that it did not write.

    {"possible": true, "pairs": [{"task": "[agent]: ...", "solution": "...", "kind": "..."}]}     as is asked for
    the same under other names, fenced, in prose, with comments, cut off                          (`loose_json`)
    [agent]: ...
    Description: ...                                                                              as plain text

Thoughts are left out first (`thoughts`). A model may write drafts: of objects with a list of pairs the last whole one
counts. Where a thought was never closed, the object with pairs that ends it is the answer. Texts are data: they are
cleaned of control characters and put on one line a paragraph, and never looked at for anything else. Whether a pair is
of use is for `pair_rules` to say.
"""

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from world_distill.data.annotation.loose_json import find_values
from world_distill.data.annotation.prompt import Prompt
from world_distill.data.annotation.thoughts import split_thoughts
from world_distill.data.field_names import without_label
from world_distill.interfaces import TaskPair

_LONGEST = 50_000  # characters that are read, thoughts left out
_MOST = 200  # pairs that are read
_DEPTH = 6  # of objects and lists in which pairs are looked for

_TASK = ("task", "task_prompt", "short_task", "instruction", "prompt", "short_prompt", "goal", "tasks", "instructions")
_SOLUTION = (
    "solution", "solution_prompt", "detailed_solution", "description", "detailed_description", "caption",
    "detailed_prompt", "detailed_caption", "narration", "solutions", "descriptions",
)  # fmt: skip
_AGENT = ("agent", "actor", "subject", "character", "who")
_KIND = ("kind", "task_kind", "type", "task_type", "category", "skill", "label")
_POSSIBLE = ("possible", "feasible", "suitable", "anything_to_do", "has_tasks", "is_suitable")
_LISTS = ("pairs", "task_pairs", "tasks", "items", "results", "task_solution_pairs")

_BRACKETS = re.compile(r"\[([^\[\]\n]{1,200})\][ ]*:[ ]*(\S[^\n]*)")
_LEAD = r"^[\s>#*_\-•\d.)(]*"  # a bullet, a number, emphasis
_TASK_LINE = re.compile(
    _LEAD + r"(?:(?:short )?(?:task|instruction|prompt)[\s\d]*[*_]*:[\s*_]*)?(\[[^\[\]\n]{1,200}\][ *_]*:.*)$", re.I
)
_SOLUTION_LINE = re.compile(_LEAD + r"(?:detailed )?(?:description|solution|caption|narration)[\s\d]*[*_]*:(.*)$", re.I)
_KIND_LINE = re.compile(_LEAD + r"(?:kind|type|category|skill)[*_]*:(.*)$", re.I)
_NOTHING = re.compile(r"(?:nothing to do|none|no tasks?|nothing)[.!]?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What was understood.

    Attributes:
      pairs: in order.
      nothing_to_do: the text says that there is nothing to do.
      cut_off: the text ends before it should; what was whole is in `pairs`.
      problems: what was not understood, in words.
    """

    pairs: tuple[TaskPair, ...]
    nothing_to_do: bool
    cut_off: bool
    problems: tuple[str, ...]


def parse_pairs(text: str, *, finished: bool = True) -> Parsed:
    """Reads a VLM's answer; never raises.

    Args:
      text: the answer, thoughts included.
      finished: the model ended it, and not the limit of its length: only then an unclosed thought may end in an answer.
    """
    text = answer_part(text, finished=finished)
    found, said_empty, cut_off, problems = [], False, False, []
    values = [(value, whole) for value, whole in find_values(text) if whole or _is_about_pairs(value)]  # no prose
    cut_off = not all(whole for _, whole in values)
    drafts = [(value, whole) for value, whole in values if _lists_pairs(value, 0)]
    if len(drafts) > 1:
        values = [next((draft for draft in reversed(drafts) if draft[1]), drafts[-1])]
    for value, whole in values:
        said_empty |= whole and _says_nothing(value)
        for item in _items(value, 0):
            pair, problem = _read_item(item)
            found += [pair] if pair else []
            problems += [problem] if problem else []
    if not found and not said_empty:
        found = list(_read_lines(text))
        said_empty = _NOTHING.fullmatch(text) is not None
    if not found and not said_empty:
        problems.append(f"no task in it; it begins with {text[:60]!r}" if text else "it is empty")
    if len(found) > _MOST:
        problems.append(f"{len(found) - _MOST} tasks more than are read")
    return Parsed(tuple(found[:_MOST]), said_empty and not found, cut_off, tuple(problems))


def without_example(parsed: Parsed, prompt: Prompt) -> Parsed:
    """Without the pairs that repeat the prompt: small models write its example about any picture."""
    pairs = tuple(pair for pair in parsed.pairs if not prompt.repeated(pair))
    if pairs == parsed.pairs:
        return parsed
    problem = f"{len(parsed.pairs) - len(pairs)} tasks that repeat the prompt's own example"
    return dataclasses.replace(parsed, pairs=pairs, problems=(*parsed.problems, problem))


def answer_part(text: str, *, finished: bool = True) -> str:
    """The part of a VLM's text that is its answer; "" if there is none."""
    answer, open_thought = split_thoughts(text)
    answer = answer.strip()[:_LONGEST]
    if answer or not open_thought or not finished:
        return answer
    thought = open_thought[-_LONGEST:].strip().removesuffix("```").rstrip()
    if not thought.endswith(("}", "]")):
        return ""
    values = [value for value, whole in find_values(thought) if whole and _lists_pairs(value, 0)]
    return json.dumps(values[-1]) if values else ""


def clean(text: str) -> str:
    """One line a paragraph, without control, format and half characters."""
    kept = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn", "Co"))
    paragraphs = re.split(r"\n[^\S\n]*\n", kept)
    return "\n\n".join(line for line in (" ".join(p.split()) for p in paragraphs) if line)


# ---- Objects and lists


def _plain_keys(item: dict) -> dict[str, Any]:
    return {re.sub(r"[^a-z0-9]+", "_", str(key).lower()).strip("_"): value for key, value in item.items()}


def _first(item: dict[str, Any], names: tuple[str, ...], kinds: type | tuple[type, ...]) -> Any:
    return next((item[name] for name in names if isinstance(item.get(name), kinds)), None)


def _says_nothing(value: Any) -> bool:
    if isinstance(value, list):
        return not value
    keys = _plain_keys(value)
    flag = next((keys[name] for name in _POSSIBLE if name in keys), None)
    listed = _first(keys, _LISTS, list)
    return flag is False or flag == "false" or (listed == [] and flag is not True)


def _is_about_pairs(value: Any) -> bool:
    return any(isinstance(item, dict) for item in _items(value, 0)) or (
        isinstance(value, dict) and bool(_plain_keys(value).keys() & {*_LISTS, *_POSSIBLE, *_TASK, *_SOLUTION})
    )


def _lists_pairs(value: Any, depth: int) -> bool:
    """Whether there is a list of pairs in an object, by its name, be it an empty one."""
    if depth > _DEPTH:
        return False
    if isinstance(value, list):
        return any(_lists_pairs(item, depth + 1) for item in value)
    if not isinstance(value, dict):
        return False
    return isinstance(_first(_plain_keys(value), _LISTS, list), list) or any(
        _lists_pairs(inner, depth + 1) for inner in value.values()
    )


def _items(value: Any, depth: int) -> Iterator[Any]:
    """What may be a pair, from the outside in."""
    if depth > _DEPTH:
        return
    if isinstance(value, list):
        for item in value:
            yield from _items(item, depth + 1)
    elif isinstance(value, dict):
        keys = _plain_keys(value)
        flag = next((keys[name] for name in _POSSIBLE if name in keys), None)
        if flag is False or flag == "false":
            return
        tasks, solutions = _first(keys, _TASK, list), _first(keys, _SOLUTION, list)
        if _first(keys, _TASK, str) is not None:
            yield keys
        elif tasks and solutions and len(tasks) == len(solutions) and all(isinstance(t, str) for t in tasks):
            yield from ({"task": t, "solution": s} for t, s in zip(tasks, solutions, strict=True))
        elif (nested := [v for v in value.values() if isinstance(v, (dict, list))]) and any(nested):
            for inner in nested:
                yield from _items(inner, depth + 1)
        elif depth and value:
            yield keys
    elif depth and isinstance(value, str) and value.strip():
        yield value


def _read_item(item: Any) -> tuple[TaskPair | None, str | None]:
    """(pair, None) or (None, why not)."""
    if isinstance(item, str):
        (pair, *_), shown = [*_read_lines(item), None], item[:60]
        return pair, None if pair else f"not a task with its solution: {shown!r}"
    task, solution = _first(item, _TASK, str), _first(item, _SOLUTION, (str, list))
    if isinstance(solution, list):  # in steps
        solution = " ".join(step for step in solution if isinstance(step, str))
    if task is None or not solution:
        return None, f"neither task nor solution in the fields {sorted(item)[:8]}" if task is None else "a task alone"
    return _make_pair(task, solution, _first(item, _AGENT, str) or "", _first(item, _KIND, str) or ""), None


def _make_pair(task: str, solution: str, agent: str, kind: str) -> TaskPair:
    task, agent = clean(task), clean(agent).strip("[] ")
    task = without_label(_unquoted(task.strip("*_ ")))
    if match := _BRACKETS.fullmatch(task):
        agent, task = agent or match[1].strip(), f"[{match[1].strip()}]: {match[2]}"
    elif agent:
        task = f"[{agent}]: {task}"
    return TaskPair(task, without_label(_unquoted(clean(solution).strip("*_ "))), agent, _label(kind))


def _unquoted(text: str) -> str:
    return text[1:-1].strip() if len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”", "``") else text


def _label(kind: str) -> str:
    """A kind as a short lower-case label."""
    words = re.findall(r"[^\W_]+", clean(kind).lower())
    return " ".join(words[:3])[:40] or "other"


# ---- Lines


def _read_lines(text: str) -> Iterator[TaskPair]:
    """Pairs from `[agent]: task` and `Description: ...`; a task without a description is none."""
    task, kind, told = "", "", None
    for line in [*re.split(r"\r\n?|\n", text), "[end]: end"]:
        if match := _TASK_LINE.match(line):
            if task and told and (solution := "\n".join(told).strip()):
                yield _make_pair(task, solution, "", kind)
            task, kind, told = re.sub(r"\][ *_]*:", "]:", match[1], count=1), "", None
        elif match := _SOLUTION_LINE.match(line):
            told = [match[1].strip("*_ ")]
        elif match := _KIND_LINE.match(line):
            kind = match[1]
        elif told is not None and not line.strip().startswith("```"):
            told.append(line)
