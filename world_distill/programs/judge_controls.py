"""Negative controls of a judge, made from the clips that a run has kept."""

from typing import Any

import numpy as np

from world_distill import console
from world_distill.errors import UserError
from world_distill.evaluation.controls import ask_controls
from world_distill.interfaces import Judge
from world_distill.judges.ask import check_judge
from world_distill.judges.controls import CONTROLS, Shown
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.kept_clips import KeptClips, judged_clips
from world_distill.judges.rubric import Rubric


def judge_controls(
    cache: JudgmentCache, clips: KeptClips, judge: Judge, rubric: Rubric, *, limit: int
) -> dict[str, Any]:
    """Has `judge` answer about up to `limit` kept clips and their controls (0: all); see `ask_controls`.

    The clips are spread evenly over those of the cache, in the order in which they were judged. Answers are stored, so
    that a call that was interrupted goes on where it stopped.

    Raises:
      UserError: no judged clip is kept, none of their questions is in the rubric, or the judge fails its own test.
      ValueError: a kept clip is damaged.
    """
    first = judged_clips(cache, clips)
    asked = {entry.about.question for entries in first.values() for entry in entries}
    # A learned reward has names of its own, which nobody may have asked for before.
    own = getattr(judge, "measures", None) is not None
    questions = [name for name in rubric.names if own or name in asked]
    if not questions:
        raise UserError(f"the rubric has none of the questions {', '.join(sorted(map(str, asked)))}")
    for line in check_judge(judge):
        console.say(f"judge: {line}")
    groups = list(first)
    if limit and len(groups) > limit:
        groups = [groups[i] for i in np.linspace(0, len(groups) - 1, limit).round().astype(int)]
    shown = [
        Shown(clips.load(digest), task, agent, first[digest, task, agent][0].about.record)
        for digest, task, agent in groups
    ]
    with console.Progress("control", len(CONTROLS)) as progress:
        return ask_controls(judge, cache, shown, rubric, questions, progress=progress.at)
