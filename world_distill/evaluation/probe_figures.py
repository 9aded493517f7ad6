"""What a probe found: Demonstrator and Executor side by side, and in words.

Log-odds are clipped as the reward clips them, so that one answer of a very certain judge does not outweigh many. A
task counts once, with the mean over its clips; intervals are over tasks, at 95 %: Student's for log-odds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from world_distill import console
from world_distill.core.metrics import score_difference, student_interval

ROLES = ("demonstrator", "executor")
AVERAGE = "average"  # over the questions
FEWEST = 8  # tasks below which an interval says nothing
_MOST_KINDS = 12  # kinds of task in a table or a sentence, those of the most tasks


@dataclasses.dataclass(frozen=True)
class Probed:
    """A judge's answers about pairs of clips that start from the same noise.

    Attributes:
      ids, tasks, kinds: [n] of the tasks.
      scores: role -> question -> log-odds [n k] of k clips a task, NaN where there is no answer.
      clip: log-odds are clipped to +-clip; 0 does not clip.
    """

    ids: Sequence[str]
    tasks: Sequence[str]
    kinds: Sequence[str]
    scores: Mapping[str, Mapping[str, Float[np.ndarray, "n k"]]]
    clip: float

    @property
    def questions(self) -> list[str]:
        return list(self.scores[ROLES[0]])

    @property
    def valid(self) -> np.ndarray:
        """Pairs of clips about which every question is answered, [n k] bool."""
        return np.all([np.isfinite(values) for of in self.scores.values() for values in of.values()], axis=0)

    @property
    def judged(self) -> np.ndarray:
        """Tasks that have such a pair, [n] bool."""
        return np.any(self.valid, axis=1)

    def by_task(self, role: str, question: str, figure: str) -> Float[np.ndarray, " n"]:
        """Mean over a task's valid pairs of its "log_odds" or its "rate"; NaN without any."""
        if question == AVERAGE:
            return np.mean([self.by_task(role, name, figure) for name in self.questions], axis=0)
        values = self.scores[role][question]
        if figure == "rate":
            values = (values > 0).astype(np.float64)
        elif self.clip:
            values = np.clip(values, -self.clip, self.clip)
        counts = self.valid.sum(axis=1)
        return np.where(counts > 0, np.where(self.valid, values, 0).sum(axis=1) / np.maximum(counts, 1), np.nan)

    def advantage(self) -> Float[np.ndarray, " n"]:
        """By how much the Demonstrator's mean over questions is above the Executor's; NaN for tasks not judged."""
        best, told = (self.by_task(role, AVERAGE, "log_odds") for role in ROLES)
        return best - told


def figures(probed: Probed) -> dict[str, Any]:
    """Counts, one row for each question of all tasks and of each kind, and one for each task."""
    pairs, judged = probed.valid, probed.judged
    kinds = np.array(probed.kinds)
    groups = {"all": judged} | {kind: judged & (kinds == kind) for kind in sorted(set(probed.kinds))}
    names = [*probed.questions, AVERAGE]
    return {
        "tasks": len(judged),
        "clips": pairs.shape[1],
        "judged": int(judged.sum()),
        "invalid": int((~pairs).sum()),
        "clip": probed.clip,
        "rows": [_row(probed, group, name, of) for group, of in groups.items() if of.any() for name in names],
        "by_task": [_task(probed, i, advantage) for i, advantage in enumerate(probed.advantage())],
    }


def _row(probed: Probed, group: str, question: str, chosen: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"group": group, "question": question, "tasks": int(chosen.sum())}
    row |= {role: {} for role in ROLES} | {"difference": {}}
    for figure in ("rate", "log_odds"):
        values = [probed.by_task(role, question, figure)[chosen] for role in ROLES]
        for role, of_role in zip(ROLES, values, strict=True):
            row[role][figure] = float(of_role.mean())
        one, other = values
        interval = score_difference(one, other) if figure == "rate" else student_interval(one - other)
        row["difference"][figure] = list(interval)
    return row


def _task(probed: Probed, i: int, advantage: float) -> dict[str, Any]:
    row = {"id": probed.ids[i], "task": probed.tasks[i], "kind": probed.kinds[i], "difference": float(advantage)}
    for role in ROLES:
        row[role] = {name: float(probed.by_task(role, name, "log_odds")[i]) for name in probed.questions}
    return row


def standing(row: Mapping[str, Any]) -> str:
    """What a row's interval of the log-odds says of the Demonstrator: better, worse, equal, or too few tasks."""
    _, low, high = row["difference"]["log_odds"]
    if row["tasks"] < FEWEST:
        return "too few"
    return "better" if low > 0 else "worse" if high < 0 else "equal"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown: Demonstrator, Executor and their difference, as rates and as log-odds; the largest kinds."""
    sizes = {row["group"]: row["tasks"] for row in rows}
    shown = sorted(sizes, key=sizes.__getitem__, reverse=True)[: 1 + _MOST_KINDS]  # all tasks together come first
    lines = [
        "| tasks | question | rate, Demonstrator | rate, Executor | difference"
        " | log-odds, Demonstrator | log-odds, Executor | difference | n |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        if row["group"] not in shown:
            continue
        cells = [_plain(row["group"]), row["question"]]
        for figure, form, change in (("rate", console.percent, console.points), ("log_odds", *2 * ("{:+.2f}".format,))):
            cells += [form(row[role][figure]) for role in ROLES]
            cells.append(_with_bounds(row["difference"][figure], change))
        lines.append("| " + " | ".join([*cells, str(row["tasks"])]) + " |")
    return "\n".join(lines)


def words(found: Mapping[str, Any]) -> str:
    """Whether the Demonstrator is better at all, on which questions it is not, and for which kinds of task."""
    if not found["judged"]:
        return "No task has judged clips of both: nothing can be said."
    rows = [row for row in found["rows"] if row["group"] == "all"]
    questions, average = rows[:-1], rows[-1]
    says = {
        "better": "The Demonstrator is better than the Executor:",
        "worse": "The Demonstrator is WORSE than the Executor, which would learn from it what is wrong:",
        "equal": "The Demonstrator is NOT seen to be better than the Executor, which may learn nothing from it:",
        "too few": f"Too few tasks to say whether the Demonstrator is better (fewer than {FEWEST}):",
    }
    lines = [f"{says[standing(average)]} {_difference(average)} log-odds a question, over {average['tasks']} tasks."]
    if average["tasks"] < FEWEST:
        return lines[0]
    for row in questions:
        if standing(row) != "better":
            how = "is worse" if standing(row) == "worse" else "is not seen to be better"
            lines.append(f"On the question {row['question']!r} it {how}: {_difference(row)}.")
    if all(standing(row) == "better" for row in questions):
        lines.append("So it is on every question.")
    kinds = [row for row in found["rows"] if row["group"] != "all" and row["question"] == AVERAGE]
    if behind := [row for row in kinds if standing(row) in ("worse", "equal")]:
        named = _listed([f"{_plain(row['group'])} ({_difference(row)})" for row in behind])
        lines.append(f"It is not seen to be better for tasks of the kind {named}.")
    if few := [_plain(row["group"]) for row in kinds if standing(row) == "too few"]:
        lines.append(f"Too few tasks to say so of the kind {_listed(few)}.")
    return "\n".join(lines)


def _plain(kind: str) -> str:
    """A kind as a cell of a table: it is a text that a model wrote."""
    return "".join(c if c.isprintable() and c != "|" else "?" for c in kind)[:40]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_KINDS
    return ", ".join(names[:_MOST_KINDS]) + (f" and {more} others" if more > 0 else "")


def _difference(row: Mapping[str, Any]) -> str:
    return _with_bounds(row["difference"]["log_odds"], "{:+.2f}".format)


def _with_bounds(interval: Sequence[float], form: Callable[[float], str]) -> str:
    """A difference with its bounds, which that of a single task has not."""
    middle, low, high = interval
    return form(middle) + (f" [{form(low)}, {form(high)}]" if np.isfinite([low, high]).all() else "")
