"""Figures of a judgment cache: what each judge said, and how judges and wordings agree about the same clips."""

import array
import itertools
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.console import percent
from world_distill.core.metrics import rank_correlation
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.entries import Entry
from world_distill.storage.metric_log import read_log

UNKNOWN = "(not noted)"  # by a cache of format 1
UNDECIDED = 1.0  # log-odds within +-this
_REPEATED = """clip IS NOT NULL AND (clip, question, task) IN
    (SELECT clip, question, task FROM judgments WHERE clip IS NOT NULL GROUP BY 1, 2, 3 HAVING count(*) > 1)"""


def overview(cache: JudgmentCache) -> dict[str, Any]:
    """Counts and spread by judge and question, and agreement where there are several answers about one clip."""
    values: dict[tuple[str, str], array.array] = defaultdict(lambda: array.array("d"))
    for entry in cache.entries():
        values[entry.judge, entry.about.question or UNKNOWN].append(entry.log_odds)
    about_one: dict[tuple, list[Entry]] = defaultdict(list)
    for entry in cache.entries(where=_REPEATED, part=2**62):  # in one go: finding them takes a while
        about_one[entry.about.clip, entry.about.question, entry.about.task].append(entry)
    pairs: dict[tuple[str, str, str], list[tuple[Entry, Entry]]] = defaultdict(list)
    for (_, question, _), entries in about_one.items():
        for one, other in itertools.combinations(entries, 2):
            pairs[question, _asker(one), _asker(other)].append((one, other))
    return {
        "judgments": sum(map(len, values.values())),
        "by_question": [
            {"judge": judge, "question": question} | spread(values[judge, question])
            for judge, question in sorted(values)
        ],
        "disagreements": [
            {"question": question, "one": one, "other": other} | agreement(found)
            for (question, one, other), found in sorted(pairs.items())
        ],
    }


def _asker(entry: Entry) -> str:
    return f"{entry.judge} (rubric {entry.about.rubric})"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """How log-odds are distributed."""
    x = np.asarray(values, np.float64)
    low, lower, middle, upper, high = (float(v) for v in np.quantile(x, [0, 0.25, 0.5, 0.75, 1]))
    return {
        "count": len(x), "yes": float((x > 0).mean()), "undecided": float((np.abs(x) < UNDECIDED).mean()),
        "mean": float(x.mean()), "std": float(x.std()), "min": low, "quartiles": [lower, middle, upper], "max": high,
    }  # fmt: skip


def agreement(pairs: Iterable[tuple[Entry, Entry]]) -> dict[str, Any]:
    """How two answers about the same clips agree, and where they do not: flips of sign, the widest apart first."""
    pairs = list(pairs)
    one, other = (np.array([pair[i].log_odds for pair in pairs], np.float64) for i in (0, 1))
    flips = sorted(
        (pair for pair in pairs if (pair[0].log_odds > 0) != (pair[1].log_odds > 0)),
        key=lambda pair: -abs(pair[0].log_odds - pair[1].log_odds),
    )
    return {
        "count": len(pairs),
        "same_sign": 1 - len(flips) / len(pairs) if pairs else None,
        "correlation": rank_correlation(one, other),
        "yes": [float((x > 0).mean()) if pairs else None for x in (one, other)],
        "mean_difference": float((other - one).mean()) if pairs else None,
        "flips": [
            {
                "record": a.about.record, "task": a.about.task, "clip": a.about.clip, "one": a.log_odds,
                "other": b.log_odds, "created": a.created,
            }
            for a, b in flips
        ],
    }  # fmt: skip


def hit_rate(path: pathlib.Path) -> dict[str, float] | None:
    """How many of a run's questions the cache had an answer to; None where no log says so."""
    folder = path if path.is_dir() else path.parent
    lines = [line for line in read_log(folder / "metrics.jsonl") if "judge/hits" in line]
    hits, misses = (int(sum(line.get(f"judge/{name}") or 0 for line in lines)) for name in ("hits", "misses"))
    return {"hits": hits, "misses": misses, "rate": hits / (hits + misses)} if hits + misses else None


def text(result: Mapping[str, Any], *, limit: int) -> str:
    """The figures of `overview` and `hit_rate` as tables."""
    rows = [["judge", "question", "n", "yes", "undecided", "mean", "std", "quartiles"]]
    for row in result["by_question"]:
        quartiles = " ".join(f"{v:+.2f}" for v in row["quartiles"])
        rows.append(
            [row["judge"], row["question"], str(row["count"]), percent(row["yes"]), percent(row["undecided"]),
             f"{row['mean']:+.2f}", f"{row['std']:.2f}", quartiles]
        )  # fmt: skip
    lines = [f"{result['judgments']} judgments", "", table(rows)]
    if hits := result.get("hit_rate"):
        lines += ["", f"The cache answered {hits['hits']} of the run's {hits['hits'] + hits['misses']} questions."]
    for row in result["disagreements"]:
        lines += ["", f"{row['question']}: {row['one']}", f"{' ' * len(row['question'])}  {row['other']}"]
        lines.append(agreement_text(row, limit=limit))
    return "\n".join(lines)


def agreement_text(row: Mapping[str, Any], *, limit: int) -> str:
    """One line of figures of `agreement`, and the widest flips."""
    if not row["count"]:
        return "  no clip has both answers"
    before, after = row["yes"]
    correlation = "–" if not np.isfinite(row["correlation"]) else f"{row['correlation']:.3f}"
    lines = [
        f"  {row['count']} clips, same sign {percent(row['same_sign'])}, rank correlation {correlation}, "
        f"yes {percent(before)} and {percent(after)}, {len(row['flips'])} flips"
    ]
    for flip in row["flips"][:limit]:
        lines.append(f"    {flip['one']:+7.2f} {flip['other']:+7.2f}  {flip['clip'][:12]}  {flip['task']}")
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other, the first row as heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
