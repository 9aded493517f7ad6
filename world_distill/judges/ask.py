"""From clips to a `Judgment`, through the memory of judgments."""

from collections.abc import Sequence

import numpy as np
from absl import logging

from world_distill.interfaces import Judge, JudgeRequest
from world_distill.judges.memory.cache import JudgmentCache, clip_digest, make_key
from world_distill.judges.memory.entries import About
from world_distill.judges.rubric import Rubric
from world_distill.structs import Judgment


def check_judge(judge: Judge | None) -> list[str]:
    """What a judge's own test (`check`) says, in a line each; nothing of a judge that has none.

    Raises:
      UserError: it cannot judge. The error is a ConnectionError, too, if the judge cannot be reached.
    """
    check = getattr(judge, "check", None)
    return [] if check is None else check()


def judge_clips(
    judge: Judge,
    cache: JudgmentCache | None,
    clips: np.ndarray,
    tasks: Sequence[str],
    agents: Sequence[str],
    rubric: Rubric,
    questions: Sequence[str],
    *,
    records: Sequence[str | None] | None = None,
) -> Judgment:
    """Answers about every clip, from the cache where it has them.

    Args:
      judge: is asked once, for what is not cached, each clip's questions together; equal requests are asked as one.
      cache: None asks about everything.
      clips: [b F H W 3] uint8.
      tasks: [b] texts.
      agents: [b] names.
      rubric: has the templates.
      questions: names in `rubric`.
      records: [b] ids of the tasks' records, which the cache notes; None where one is not known.

    Returns:
      Judgment with `scores[question]` [b] float64. An answer with an error, or that is not finite, is NaN there and
      makes the clip invalid; how many there were, and why the first, is logged.

    Raises:
      ValueError: lengths differ, no questions, clips are not uint8, or the judge returns another number of answers.
      KeyError: a question that the rubric does not have.
      CacheError: the cache's file fails.
    """
    clips = np.asarray(clips)
    names: Sequence[str | None] = [None] * len(clips) if records is None else records
    if len({len(clips), len(tasks), len(agents), len(names)}) > 1 or not questions:
        raise ValueError(f"{len(clips)} clips, {len(tasks)} tasks, {len(agents)} agents, {len(questions)} questions")
    requests: dict[str, JudgeRequest] = {}  # by key, clip by clip: a judge can then share the video's part of the work
    about: dict[str, About] = {}
    keys = np.empty((len(clips), len(questions)), object)
    digests, version = [clip_digest(clip) for clip in clips], rubric.version
    for i, clip in enumerate(clips):
        for j, name in enumerate(questions):
            text = rubric.render(name, tasks[i], agents[i])
            key = keys[i, j] = make_key(digests[i], text, judge.name)
            requests.setdefault(key, JudgeRequest(clip=clip, question=text))
            about.setdefault(key, About(digests[i].hex(), name, text, tasks[i], agents[i], names[i], version))
    known = cache.get_many(list(requests)) if cache is not None else {}
    asked = [key for key in requests if key not in known]
    if asked:
        known |= _ask(judge, cache, {key: requests[key] for key in asked}, about)
    scores = np.array([[known.get(key, np.nan) for key in row] for row in keys], np.float64)
    if cache is not None and cache.keep is not None:
        for digest, clip, row in zip(digests, clips, scores, strict=True):
            if np.isfinite(row).any():
                cache.keep(digest.hex(), clip)
    return Judgment(
        scores={name: scores[:, j] for j, name in enumerate(questions)},
        valid=np.all(np.isfinite(scores), axis=1),
        hits=len(requests) - len(asked),
        misses=len(asked),
    )


def _ask(
    judge: Judge, cache: JudgmentCache | None, requests: dict[str, JudgeRequest], about: dict[str, About]
) -> dict[str, float]:
    """The judge's finite answers by key, stored."""
    answers = judge.ask(list(requests.values()))
    if len(answers) != len(requests):
        raise ValueError(f"judge {judge.name} returned {len(answers)} answers to {len(requests)} requests")
    good, reasons = {}, []
    for key, answer in zip(requests, answers, strict=True):
        if answer.error is None and answer.log_odds is not None and np.isfinite(answer.log_odds):
            good[key] = float(answer.log_odds)
        else:
            reasons.append(answer.error or f"log-odds {answer.log_odds}")
    if reasons:
        logging.warning("judge %s failed on %d of %d; first: %s", judge.name, len(reasons), len(requests), reasons[0])
    if cache is None or not good:
        return good
    return cache.put_many(good, judge_name=judge.name, about=about)
