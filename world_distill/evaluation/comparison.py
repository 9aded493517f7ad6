"""What an evaluation says beyond rates: differences between models on the same cases, and agreement between judges."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill import console
from world_distill.core.measures import Measures
from world_distill.core.metrics import rank_correlation, score_difference, score_interval
from world_distill.evaluation.scoring import NAMES, Verdict, scores_of

PAIRS = (("base", "executor"), ("demonstrator", "executor"), ("base", "demonstrator"))


def paired(before: Sequence[Verdict], after: Sequence[Verdict], measures: Measures) -> list[dict[str, Any]]:
    """How much higher each measure is after than before, on the clips of the same case and noise that both have.

    One entry a measure: `difference`, its `ci95` over cases, and `n`, the number of cases; [] where there are none.
    """
    sides = [{(v.id, v.noise): v for v in verdicts} for verdicts in (before, after)]
    scores = {key: scores_of([side[key] for side in sides], measures) for key in sides[0] if key in sides[1]}
    valid = {key: values for key, values in scores.items() if np.isfinite(values).all()}
    cases: dict[str, list[np.ndarray]] = collections.defaultdict(list)  # [2, questions] of each clip
    for (record, _), values in valid.items():
        cases[record].append(values)
    found = []
    for measure in measures.names if cases else ():
        # The mean over a case's noises first: they are no cases of their own.
        one, two = np.array(
            [np.mean([measures.values(v, measure) for v in clips], axis=0) for clips in cases.values()]
        ).T
        difference, low, high = score_difference(two, one)
        found.append({"measure": measure, "difference": difference, "ci95": [low, high], "n": len(cases)})
    return found


def paired_roles(verdicts: Mapping[str, Sequence[Verdict]], measures: Measures) -> list[dict[str, Any]]:
    """`paired` for the pairs of roles that were scored, each entry with `before` and `after`."""
    return [
        {"before": before, "after": after} | entry
        for before, after in PAIRS
        if before in verdicts and after in verdicts
        for entry in paired(verdicts[before], verdicts[after], measures)
    ]


def paired_table(entries: Sequence[Mapping[str, Any]], measures: Measures) -> str:
    """Differences in percentage points as Markdown, one row a pair of models."""
    rows: dict[tuple[str, str, int], dict[str, str]] = collections.defaultdict(dict)
    for entry in entries:
        low, high = entry["ci95"]
        text = f"{console.points(entry['difference'])} [{console.points(low)}, {console.points(high)}]"
        rows[entry["before"], entry["after"], entry["n"]][entry["measure"]] = text
    lines = [["points, paired by case and noise", *map(measures.label, measures.names), "n"]]
    for (before, after, count), cells in rows.items():
        name = f"{NAMES.get(after, after)} − {NAMES.get(before, before)}"
        lines.append([name, *(cells.get(measure, "–") for measure in measures.names), str(count)])
    return markdown_table(lines)


def judges(
    verdicts: Mapping[str, Sequence[Verdict]], labels: Sequence[str], measures: Measures
) -> list[dict[str, Any]]:
    """What each judge says of each role: `yes` and `probability` by question, over the clips that it answered about.

    `yes` is the rate of hard verdicts with its `ci95`; `probability` is the mean of sigmoid(log-odds), the soft one.
    """
    rows = []
    for label in labels:
        for role, clips in verdicts.items():
            row: dict[str, Any] = {"judge": label, "name": role, "yes": {}, "ci95": {}, "probability": {}, "n": {}}
            for question in measures.questions:
                log_odds = _log_odds(clips, label, question)
                log_odds = log_odds[np.isfinite(log_odds)]
                row["n"][question] = len(log_odds)
                if len(log_odds):
                    row["yes"][question], *bounds = score_interval((log_odds > 0).astype(float))
                    row["ci95"][question] = bounds
                    row["probability"][question] = float(np.mean(0.5 * (1 + np.tanh(log_odds / 2))))
            rows.append(row)
    return rows


def agreement(verdicts: Mapping[str, Sequence[Verdict]], labels: Sequence[str], measures: Measures) -> list[dict]:
    """How the first judge and each other one agree, question by question, over the clips of all roles.

    `same` is the share of equal verdicts, `kappa` Cohen's (what of it is beyond chance; NaN where one judge has but one
    answer), `correlation` Spearman's of the log-odds, `yes` both rates, and `n` the clips that both answered about.
    """
    clips = [verdict for role in verdicts.values() for verdict in role]
    found = []
    for label in labels[1:]:
        for question in measures.questions:
            one, two = (_log_odds(clips, judge, question) for judge in (labels[0], label))
            both = np.isfinite(one) & np.isfinite(two)
            one, two = one[both], two[both]
            row = {"question": question, "one": labels[0], "other": label, "n": len(one)}
            found.append(row | (_agreement(one, two) if len(one) else {}))
    return found


def _agreement(one: np.ndarray, two: np.ndarray) -> dict[str, Any]:
    yes = [float((x > 0).mean()) for x in (one, two)]
    same = float(((one > 0) == (two > 0)).mean())
    chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    kappa = (same - chance) / (1 - chance) if chance < 1 else float("nan")
    return {"same": same, "kappa": kappa, "correlation": rank_correlation(one, two), "yes": yes}


def _log_odds(verdicts: Sequence[Verdict], label: str, question: str) -> np.ndarray:
    return np.array([v.details.get(f"{label}/{question}", np.nan) for v in verdicts], np.float64)


def judges_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `judges` found, as Markdown."""
    lines: list[list[str]] = [["judge", "role", "question", "yes", "mean P(yes)", "clips"]]
    for row in rows:
        for question, count in row["n"].items():
            values = [row[name].get(question) for name in ("yes", "probability")]
            cells = ["–" if value is None else console.percent(value) for value in values]
            lines.append([row["judge"], str(NAMES.get(row["name"], row["name"])), question, *cells, str(count)])
    return markdown_table(lines)


def agreement_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `agreement` found, as Markdown."""
    lines = [["question", "judges", "same verdict", "kappa", "rank correlation", "clips"]]
    for row in rows:
        figures = [row.get(name, np.nan) for name in ("kappa", "correlation")]
        cells = [f"{value:.2f}" if np.isfinite(value) else "–" for value in figures]
        same = console.percent(row["same"]) if "same" in row else "–"
        lines.append([row["question"], f"{row['one']}, {row['other']}", same, *cells, str(row["n"])])
    return markdown_table(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, the first one as its heading."""
    heading, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([heading, "|" + "---|" * len(rows[0]), *others])
