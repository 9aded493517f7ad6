"""Whether a judge says no to negative controls (`judges.controls`), beside its answers about the plain clips.

A control *passes* for a question where the judge says yes to some of its clips, and its rate is not clearly below that
of the plain clips: the 95 % interval of the paired difference, control less plain, reaches 0 or more. A judge without
a yes (a learned reward without a threshold) is compared by its mean scores in the same way. A control that passes is a
way to a reward without the deed.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from world_distill.console import percent, points
from world_distill.core.metrics import paired_rate_interval, student_interval
from world_distill.errors import UserError
from world_distill.evaluation.agreement import table
from world_distill.interfaces import Judge
from world_distill.judges.ask import has_rate, judge_mixed
from world_distill.judges.controls import CONTROLS, Shown, make_controls
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import Rubric
from world_distill.storage import atomic

FILE = "controls.json"  # of a run's folder


def ask_controls(
    judge: Judge,
    cache: JudgmentCache | None,
    shown: Sequence[Shown],
    rubric: Rubric,
    questions: Sequence[str],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Has a judge answer questions about clips and about every control of them.

    Args:
      judge: its answers about the clips as they are come from the cache, where it has them.
      cache: stores the answers about controls under their own digests.
      shown: the clips, of several tasks.
      rubric: has the questions.
      questions: names in `rubric`.
      progress: called with how many of `CONTROLS` are asked.

    Returns:
      `judge`, `rubric`, `clips` (how many), and `rows`: for each control and question what `compare` says, and
      `no_answer`, the clips without an answer to one of the two. A control that cannot be made of any clip has no row.
      `failed` says why a control was not asked: a server's filter may refuse all instructions to a judge.

    Raises:
      UserError: the judge cannot be asked about the plain clips, or about any control.
    """
    plain = _scores(judge, cache, shown, rubric, questions)
    rows, failed, last = [], {}, None
    for number, (name, control) in enumerate(CONTROLS.items(), 1):
        made = make_controls(name, shown)
        at = [i for i, one in enumerate(made) if one is not None]
        scores: dict[str, np.ndarray] = {}
        try:
            if at:
                scores = _scores(judge, cache, [one for one in made if one is not None], rubric, questions, name)
        except UserError as error:
            failed[name], last = str(error), error
        for question, values in scores.items():
            fails, rated = question in control.fails, has_rate(judge, question)
            row = compare(values, plain[question][at], rated=rated)
            row["passes"] = _passes(row) if fails and row["n"] else None
            rows.append({"control": name, "question": question, "no_answer": len(at) - row["n"]} | row)
        if progress is not None:
            progress(number)
    if last is not None and not rows:
        raise last
    return {"judge": judge.name, "rubric": rubric.version, "clips": len(shown), "rows": rows, "failed": failed}


def compare(control: np.ndarray, plain: np.ndarray, *, rated: bool) -> dict[str, Any]:
    """Answers [n] about controls beside those [n] about the same clips as they are; NaN where there is none.

    Returns:
      `n` (pairs with both answers), mean `score` and `plain_score`, `rate` and `plain_rate` (None unless `rated`), and
      `difference` with its 95 % interval `low`, `high`: of the rates, or of the scores where there are none. Figures
      that cannot be had are None.
    """
    both = np.isfinite(control) & np.isfinite(plain)
    control, plain = control[both], plain[both]
    names = ("score", "plain_score", "rate", "plain_rate", "difference", "low", "high")
    found: dict[str, Any] = {"n": len(control)} | dict.fromkeys(names)
    if not len(control):
        return found
    found |= {"score": float(control.mean()), "plain_score": float(plain.mean())}
    if rated:
        found |= {"rate": float((control > 0).mean()), "plain_rate": float((plain > 0).mean())}
        interval = paired_rate_interval(control > 0, plain > 0)
    else:
        interval = student_interval(control - plain)
    return found | {
        name: value if math.isfinite(value) else None
        for name, value in zip(("difference", "low", "high"), interval, strict=True)
    }


def _passes(row: Mapping[str, Any]) -> bool:
    """See the module's text; a single pair of scores has no interval, and is clearly below nothing."""
    return row["rate"] != 0 and (row["high"] is None or row["high"] >= 0)


def warnings(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each control that passes, or that was not asked."""
    lines = [f"control {name} was not asked: {why}" for name, why in result["failed"].items()]
    for row in result["rows"]:
        if not row["passes"]:
            continue
        if row["rate"] is None:
            said = f"the mean score is {row['score']:.3g}, and {row['plain_score']:.3g} for the plain clips"
        else:
            said = f"the rate is {percent(row['rate'])}, and {percent(row['plain_rate'])} for the plain clips"
        about = CONTROLS[row["control"]].about
        lines.append(f"control {row['control']} ({about}) passes for {row['question']}: {said} (n = {row['n']})")
    return lines


def text(result: Mapping[str, Any]) -> str:
    """The figures as a table, and what passes."""
    rows = [["control", "question", "n", "plain yes", "control yes", "difference", "plain", "control", ""]]
    for row in result["rows"]:
        rows.append([row["control"], row["question"], str(row["n"]), *_figures(row)])
    lines = [f"{result['judge']} (rubric {result['rubric']}) on {result['clips']} clips and their controls", ""]
    lines.append(table(rows))
    if missing := sum(row["no_answer"] for row in result["rows"]):
        lines.append(f"{missing} pairs lack an answer")
    lines.append("held: the judge says no, or clearly less often yes than to the plain clips; passes: it does not.")
    lines.append("Where a sound judge may say yes, there is no verdict.")
    found = warnings(result)
    if not any(row["passes"] is not None for row in result["rows"]):
        found.append("none of these questions and controls can be compared: nothing is known about this judge")
    return "\n".join([*lines, *(f"warning: {line}" for line in found)])


def _figures(row: Mapping[str, Any]) -> list[str]:
    if not row["n"]:
        return ["–"] * 5 + ["no answers"]
    rated, bounded = row["rate"] is not None, row["low"] is not None
    form = points if rated else "{:+.3g}".format
    cells = [percent(row["plain_rate"]), percent(row["rate"])] if rated else ["–", "–"]
    cells.append(form(row["difference"]) + (f" [{form(row['low'])}, {form(row['high'])}]" if bounded else ""))
    cells += [f"{row['plain_score']:+.2f}", f"{row['score']:+.2f}"]
    return [*cells, {True: "passes", False: "held", None: ""}[row["passes"]]]


def at_start(
    judge: Judge, cache: JudgmentCache | None, rubric: Rubric, questions: Sequence[str], workdir: pathlib.Path
) -> Callable[[Sequence[Shown]], dict[str, float]]:
    """A function of a training step's clips that asks about their controls, and writes `FILE`.

    It returns figures for the log, `controls/CONTROL/QUESTION`: the rate, or the score where there is none. It warns of
    what passes. A judge that fails on them does not stop the run.
    """

    def ask(shown: Sequence[Shown]) -> dict[str, float]:
        try:
            result = ask_controls(judge, cache, shown, rubric, questions)
        except UserError as error:
            logging.warning("negative controls of the judge were not asked: %s", error)
            return {}
        atomic.write_json(workdir / FILE, result)
        for line in warnings(result):
            logging.warning("judge: %s; see %s", line, workdir / FILE)
        figures = {f"controls/{row['control']}/{row['question']}": row for row in result["rows"] if row["n"]}
        return {name: row["score"] if row["rate"] is None else row["rate"] for name, row in figures.items()}

    return ask


def _scores(
    judge: Judge,
    cache: JudgmentCache | None,
    shown: Sequence[Shown],
    rubric: Rubric,
    questions: Sequence[str],
    control: str = "",
) -> dict[str, np.ndarray]:
    return judge_mixed(
        judge, cache, [one.clip for one in shown], [one.task for one in shown], [one.agent for one in shown], rubric,
        questions, records=[one.record for one in shown], control=control,
    )  # fmt: skip
