"""From clips to a `Judgment`, through the memory of judgments."""

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from absl import logging

from world_distill.errors import UserError
from world_distill.interfaces import Judge, JudgeAnswer, JudgeRequest
from world_distill.judges.controls import label
from world_distill.judges.memory.cache import JudgmentCache, clip_digests, make_key
from world_distill.judges.memory.entries import About
from world_distill.judges.rubric import Rubric, load_rubric
from world_distill.structs import Judgment
from world_distill.vlm.chat_marks import ForbiddenText, refuse_marks

_STORE_EVERY = 1.0  # seconds; what was answered since is lost if the process is killed


def check_judge(judge: Judge | None) -> list[str]:
    """What a judge's own test (`check`) says, in a line each; nothing of a judge that has none.

    Raises:
      UserError: it cannot judge. The error is a ConnectionError, too, if the judge cannot be reached.
    """
    check = getattr(judge, "check", None)
    return [] if check is None else check()


def has_rate(judge: Judge | None, question: str) -> bool:
    """Whether a judge's answer above 0 is a yes: a learned reward's is one where it has a threshold."""
    thresholds = getattr(judge, "thresholds", None)
    return thresholds is None or question in thresholds


def refuse_clip(judge: Judge, clip: float) -> None:
    """Raises UserError where a learned reward's numbers would be clipped to +-`clip`, which is in log-odds."""
    if clip and getattr(judge, "measures", None) is not None:
        raise UserError(
            f"config.rollout.clip = {clip:g} is in log-odds, and {judge.name} gives numbers of its own scale: set the"
            " clip to 0"
        )


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
    control: str = "",
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
      control: name of the control that the clips are (`controls.CONTROLS`). The cache notes it with the question's
        name, and keeps none of the clips.

    Returns:
      Judgment with `scores[question]` [b] float64. An answer with an error, or that is not finite, is NaN there and
      makes the clip invalid; how many there were, and why the first, is logged. Nobody is asked about a clip whose task
      has a mark of a chat in it (`vlm.chat_marks`).

    Raises:
      ValueError: lengths differ, no questions, clips are not uint8, or the judge returns another number of answers.
      KeyError: a question that the rubric does not have.
      CacheError: the cache's file fails.
      Exception: what stops the judge. Answers that it gave before are in the cache.
    """
    clips = np.asarray(clips)
    names: Sequence[str | None] = [None] * len(clips) if records is None else records
    if len({len(clips), len(tasks), len(agents), len(names)}) > 1 or not questions:
        raise ValueError(f"{len(clips)} clips, {len(tasks)} tasks, {len(agents)} agents, {len(questions)} questions")
    requests: dict[str, JudgeRequest] = {}  # by key, clip by clip: a judge can then share the video's part of the work
    about: dict[str, About] = {}
    keys = np.empty((len(clips), len(questions)), object)
    refused: list[str] = []
    digests, version = clip_digests(clips), rubric.version
    for i, clip in enumerate(clips):
        for j, name in enumerate(questions):
            try:
                text = refuse_marks(rubric.render(name, refuse_marks(tasks[i]), refuse_marks(agents[i]), len(clip)))
            except ForbiddenText as error:
                refused.append(f"{error} ({name}, {names[i] or tasks[i]!r})")
                continue
            key = keys[i, j] = make_key(digests[i], text, judge.name)
            requests.setdefault(key, JudgeRequest(clip, text, name, tasks[i]))
            noted = label(name, control) if control else name
            about.setdefault(key, About(digests[i].hex(), noted, text, tasks[i], agents[i], names[i], version))
    known = cache.get_many(list(requests)) if cache is not None else {}
    asked = [key for key in requests if key not in known]
    if asked or refused:
        known |= _ask(judge, cache, {key: requests[key] for key in asked}, about, refused)
    scores = np.array([[np.nan if key is None else known.get(key, np.nan) for key in row] for row in keys], np.float64)
    if cache is not None and cache.keep is not None and not control:
        for digest, clip, row in zip(digests, clips, scores, strict=True):
            if np.isfinite(row).any():
                cache.keep(digest.hex(), clip)
    return Judgment(
        scores={name: scores[:, j] for j, name in enumerate(questions)},
        valid=np.all(np.isfinite(scores), axis=1),
        hits=len(requests) - len(asked),
        misses=len(asked),
    )


def judge_mixed(
    judge: Judge,
    cache: JudgmentCache | None,
    clips: Sequence[np.ndarray],
    tasks: Sequence[str],
    agents: Sequence[str],
    rubric: Rubric,
    questions: Sequence[str],
    *,
    records: Sequence[str | None],
    control: str = "",
) -> dict[str, np.ndarray]:
    """`judge_clips` of clips [F H W 3] that may differ in their shapes: its scores [b] by question."""
    scores = {name: np.full(len(clips), np.nan) for name in questions}
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, clip in enumerate(clips):
        rows[clip.shape].append(i)
    for same in rows.values():
        judgment = judge_clips(
            judge, cache, np.stack([clips[i] for i in same]), [tasks[i] for i in same], [agents[i] for i in same],
            rubric, questions, records=[records[i] for i in same], control=control,
        )  # fmt: skip
        for name, values in judgment.scores.items():
            scores[name][same] = values
    return scores


def _ask(
    judge: Judge,
    cache: JudgmentCache | None,
    requests: dict[str, JudgeRequest],
    about: dict[str, About],
    refused: Sequence[str],
) -> dict[str, float]:
    """The judge's finite answers by key, stored; `refused` says why others were not asked."""
    keys, answers, known = list(requests), _Answers(judge, cache, about), {}
    try:
        if (ask_each := getattr(judge, "ask_each", None)) is not None:
            ask_each(list(requests.values()), lambda number, answer: answers.take(keys[number], answer))
        else:
            given = judge.ask(list(requests.values())) if requests else []
            if len(given) != len(requests):
                raise ValueError(f"judge {judge.name} returned {len(given)} answers to {len(requests)} requests")
            for key, answer in zip(keys, given, strict=True):
                answers.take(key, answer)
    finally:
        known = answers.store()
    reasons = [*refused, *answers.reasons]
    if reasons:
        count = len(requests) + len(refused)
        logging.warning("judge %s failed on %d of %d; first: %s", judge.name, len(reasons), count, reasons[0])
    return known


def begun_rubric(cache: JudgmentCache, rubric: Rubric) -> Rubric:
    """The questions that a resumed run goes on with: the package's `rubric`, or version 1 if it began with that."""
    first, entry = load_rubric("1", fps=rubric.fps), next(iter(cache.entries(part=1)), None)
    if entry is None or entry.about.rubric != first.version:
        return rubric
    logging.info("this run goes on with version 1 of the questions (%s), as it began", first.version)
    return first


def note_other_rubrics(cache: JudgmentCache, rubric: Rubric, *, held_out: Rubric | None = None) -> None:
    """Logs that a cache holds answers to other versions of the questions, which are not used for these.

    Those to a held-out judge's own questions are no such answers.
    """
    others = sorted(cache.rubrics() - {rubric.version} - ({held_out.version} if held_out else set()))
    if others:
        logging.warning(
            "%s holds answers to other versions of the questions (%s; these are %s): they stay, and are not used. "
            "--config.judge.rubric=1 asks the questions of releases before this one",
            cache.path, ", ".join(others), rubric.version,
        )  # fmt: skip


class _Answers:
    """Answers as they come; finite ones are stored every second."""

    def __init__(self, judge: Judge, cache: JudgmentCache | None, about: dict[str, About]):
        self.reasons: list[str] = []  # why there is no answer
        self._judge, self._cache, self._about = judge, cache, about
        self._new: dict[str, float] = {}
        self._known: dict[str, float] = {}
        self._stored = time.monotonic()

    def take(self, key: str, answer: JudgeAnswer) -> None:
        if answer.error is None and answer.log_odds is not None and np.isfinite(answer.log_odds):
            self._new[key] = float(answer.log_odds)
        else:
            self.reasons.append(answer.error or f"log-odds {answer.log_odds}")
        if time.monotonic() - self._stored > _STORE_EVERY:
            self.store()

    def store(self) -> dict[str, float]:
        """All that is known so far, by key: another process may have been first to store an answer."""
        if self._new and self._cache is not None:
            self._new = self._cache.put_many(self._new, judge_name=self._judge.name, about=self._about)
        self._known |= self._new
        self._new, self._stored = {}, time.monotonic()
        return self._known
