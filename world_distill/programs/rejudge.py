"""Judging kept clips again with another judge or other wordings, and comparing with what was said at first."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from world_distill import console
from world_distill.errors import UserError
from world_distill.evaluation.agreement import agreement, agreement_text
from world_distill.interfaces import Judge
from world_distill.judges.ask import check_judge, judge_mixed
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.entries import Entry
from world_distill.judges.memory.kept_clips import KeptClips, judged_clips
from world_distill.judges.rubric import Rubric

_CLIPS = 16  # held in memory, and given to the judge, at once


def rejudge(cache: JudgmentCache, clips: KeptClips, judge: Judge, rubric: Rubric) -> dict[str, Any]:
    """Has `judge` answer the rubric's questions about every kept clip of the cache, and compares question by question.

    Answers are stored, under this judge's name. What it answered before with the same words is no comparison.

    Raises:
      UserError: no judged clip is kept, none of the questions is in the rubric, or the judge fails its own test.
      ValueError: a kept clip is damaged.
    """
    first = judged_clips(cache, clips)
    asked = {e.about.question for entries in first.values() for e in entries}
    questions = [name for name in rubric.names if name in asked]
    if not questions:
        raise UserError(f"the rubric has none of the questions {', '.join(sorted(map(str, asked)))}")
    for line in check_judge(judge):
        console.say(f"judge: {line}")
    pairs: dict[tuple[str, str], list[tuple[Entry, Entry]]] = defaultdict(list)
    invalid, groups = 0, list(first)
    with console.Progress("clip", len(groups)) as progress:
        for start in range(0, len(groups), _CLIPS):
            part = groups[start : start + _CLIPS]
            found = _scores(part, first, cache, clips, judge, rubric, questions)
            for group, (scores, frames) in zip(part, found, strict=True):
                invalid += sum(not np.isfinite(value) for value in scores.values())
                for entry in first[group]:
                    name = entry.about.question
                    if name in scores and np.isfinite(scores[name]) and not _is_same(entry, judge, rubric, frames):
                        pairs[name, entry.judge].append((entry, _answer(entry, judge, scores[name])))
            progress.at(start + len(part))
    return {
        "judge": judge.name,
        "rubric": rubric.version,
        "clips": len({clip for clip, *_ in groups}),
        "invalid": invalid,
        "by_question": [
            {"question": name, "judge": other} | agreement(found) for (name, other), found in sorted(pairs.items())
        ],
    }


def _scores(
    groups: list[tuple[str, str, str]],
    first: Mapping[tuple[str, str, str], list[Entry]],
    cache: JudgmentCache,
    clips: KeptClips,
    judge: Judge,
    rubric: Rubric,
    questions: list[str],
) -> list[tuple[dict[str, float], int]]:
    """(the judge's log-odds by question, frames of the clip) for each group."""
    loaded = [clips.load(digest) for digest, *_ in groups]
    scores = judge_mixed(
        judge, cache, loaded, [task for _, task, _ in groups], [agent for *_, agent in groups], rubric, questions,
        records=[first[group][0].about.record for group in groups],
    )  # fmt: skip
    return [({name: float(scores[name][i]) for name in questions}, len(clip)) for i, clip in enumerate(loaded)]


def _is_same(entry: Entry, judge: Judge, rubric: Rubric, frames: int) -> bool:
    about = entry.about
    assert about.question is not None and about.task is not None and about.agent is not None  # else it is not compared
    return entry.judge == judge.name and about.text == rubric.render(about.question, about.task, about.agent, frames)


def _answer(entry: Entry, judge: Judge, log_odds: float) -> Entry:
    return Entry(entry.key, log_odds, judge.name, entry.created, entry.about)


def text(result: Mapping[str, Any], *, limit: int) -> str:
    """The figures as lines."""
    lines = [f"{result['judge']} (rubric {result['rubric']}) on {result['clips']} kept clips"]
    if result["invalid"]:
        lines.append(f"{result['invalid']} questions have no answer")
    if not result["by_question"]:
        lines.append("This judge gave all the answers itself, to the same questions: nothing to compare")
    for row in result["by_question"]:
        lines += ["", f"{row['question']}, beside {row['judge']}", agreement_text(row, limit=limit)]
    return "\n".join(lines)
