"""A judge that is held out: scored at evaluation, never part of the reward.

What is trained on a judge's answers may learn to please that judge. Another model, or another wording, does not share
all of its blind spots: as long as the videos get better both see it, and where the reward alone goes on rising it is
being gamed. For each question, over the same clips,

    rate          share of clips to which the held-out judge says yes; NaN for a measure without a threshold
    log_odds      mean of its answers
    correlation   Spearman's, between its answers and the reward judge's
    gap           z(reward) - z(held out), where z(x) = (mean x - mean x_0) / std x_0 and x_0 are the answers of the
                  first evaluation: by how many standard deviations the reward has risen more
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill import build, console
from world_distill.core.metrics import rank_correlation
from world_distill.devices import hosts
from world_distill.errors import UserError
from world_distill.interfaces import Judge
from world_distill.judges.ask import has_rate, judge_clips
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import Rubric
from world_distill.storage.metric_log import read_log


class HeldOut:
    """Two judges' answers about the clips of an evaluation."""

    def __init__(
        self,
        judge: Judge,
        rubric: Rubric,
        reward: Judge | None,
        reward_rubric: Rubric,
        questions: Sequence[str],
        cache: JudgmentCache | None,
    ):
        """`questions` are those that the reward judge is asked; without one (None), the held-out judge is alone."""
        self.judge, self.rubric = judge, rubric
        self._held, self._reward = (judge, rubric), (reward, reward_rubric)
        self._compared = [q for q in questions if q in rubric.names] if reward is not None else []
        self._cache = cache
        self._scores: list[dict[str, np.ndarray]] = []

    def watch(self, clips: np.ndarray, own: np.ndarray, records: Mapping[str, Sequence[str]]) -> None:
        """Has clips [n F H W 3] uint8 judged, for `take`: each clip by the process that looks after it.

        Args:
          clips: those of this process.
          own: their numbers among all.
          records: `ids`, `task` and `agent` of all clips.
        """
        ids, tasks, agents = ([records[name][int(i)] for i in own] for name in ("ids", "task", "agent"))
        parts = []
        for (judge, rubric), questions in ((self._held, self._held[1].names), (self._reward, self._compared)):
            found = np.zeros((len(own), len(questions)))
            if judge is not None and questions and len(own):
                judgment = judge_clips(judge, self._cache, clips, tasks, agents, rubric, questions, records=ids)
                found = np.stack([judgment.scores[question] for question in questions], axis=1)
            parts.append(found)
        names = [f"held/{q}" for q in self._held[1].names] + [f"reward/{q}" for q in self._compared]
        joined = hosts.join_rows(own, np.concatenate(parts, axis=1), len(records["ids"]))
        self._scores.append(dict(zip(names, joined.T, strict=True)))

    def take(self, reference: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Figures of what was watched since the last call, by `QUESTION/FIGURE`; `QUESTION` alone is the rate.

        `reference` has those of the first evaluation; None if this is it. Figures that cannot be had are NaN.
        """
        scores, self._scores = self._scores, []
        joined = {name: np.concatenate([part[name] for part in scores]) for name in (scores[0] if scores else ())}
        found: dict[str, float] = {}
        for question in self._held[1].names:
            held = joined.get(f"held/{question}", np.zeros(0))
            found |= figures(question, held, joined.get(f"reward/{question}"), reference)
            if not has_rate(self.judge, question):
                found[question] = np.nan
        held = [values for name, values in joined.items() if name.startswith("held/")]
        found["invalid"] = float((~np.isfinite(held).all(axis=0)).mean()) if held else float("nan")
        return found


def figures(
    question: str, held: np.ndarray, reward: np.ndarray | None, reference: Mapping[str, Any] | None
) -> dict[str, float]:
    """Figures of one question from log-odds [n], NaN where there is no answer; see `HeldOut.take`."""
    if reward is not None:
        both = np.isfinite(held) & np.isfinite(reward)
        held, reward = held[both], reward[both]
    else:
        held = held[np.isfinite(held)]
    some = len(held) > 0
    found = {
        question: float((held > 0).mean()) if some else np.nan,
        f"{question}/log_odds": float(held.mean()) if some else np.nan,
        f"{question}/std": float(held.std()) if some else np.nan,
    }
    if reward is None:
        return found
    found[f"{question}/reward"] = float(reward.mean()) if some else np.nan
    found[f"{question}/reward_std"] = float(reward.std()) if some else np.nan
    found[f"{question}/correlation"] = rank_correlation(held, reward)
    found[f"{question}/gap"] = _gap(question, found, found if reference is None else reference)
    return found


def _gap(question: str, now: Mapping[str, float], first: Mapping[str, Any]) -> float:
    rises = []
    for mean, std in ((f"{question}/reward", f"{question}/reward_std"), (f"{question}/log_odds", f"{question}/std")):
        if not first.get(std):  # never logged, null, or 0: nothing to measure by
            return float("nan")
        rises.append((now[mean] - first[mean]) / first[std])
    return rises[0] - rises[1]


def audit(held_out: HeldOut | None, workdir: pathlib.Path) -> dict[str, float]:
    """What an evaluation of a run logs, as `held_out/QUESTION…`; {} without a held-out judge."""
    if held_out is None:
        return {}
    # The log is cut to the checkpoint when a run continues, so its first evaluation is that of an unbroken run.
    lines = (line for line in read_log(workdir / "metrics.jsonl") if "held_out/invalid" in line)
    first = next(lines, None)
    reference = None if first is None else {n.removeprefix("held_out/"): value for n, value in first.items()}
    return {f"held_out/{name}": value for name, value in held_out.take(reference).items()}


def markdown(roles: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of figures by role."""
    columns = ("rate", "log-odds", "reward", "correlation", "gap")
    lines = ["| held-out judge | question | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for role, found in roles.items():
        for question in [name for name in found if "/" not in name and name != "invalid"]:
            names = (question, *(f"{question}/{name}" for name in ("log_odds", "reward", "correlation", "gap")))
            forms = (console.percent, *4 * ("{:.3f}".format,))
            pairs = zip(forms, (found.get(name, np.nan) for name in names), strict=True)
            cells = [form(value) if np.isfinite(value) else "–" for form, value in pairs]
            lines.append(f"| {role} | {question} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_held_out(
    config, questions: Sequence[str], reward: Judge | None, cache: JudgmentCache | None
) -> HeldOut | None:
    """The config's held-out judge; None if it names none.

    Raises:
      UserError: it is the reward's own judge with the same questions, or its factory or rubric cannot be used.
    """
    if not config.held_out.factory:
        return None
    judge = build.make(config, "held_out")
    rubric, reward_rubric = build.make_rubric(config, "held_out", judge=judge), build.make_rubric(config, judge=reward)
    if reward is not None and judge.name == reward.name and rubric.version == reward_rubric.version:
        raise UserError(
            "config.held_out is the reward's own judge with the same questions, which would only confirm itself: "
            "give it another model or thresholds (held_out.options), or other wordings (held_out.rubric)"
        )
    return HeldOut(judge, rubric, reward, reward_rubric, questions, cache)
