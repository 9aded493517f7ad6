"""The page of an ablation: which claims hold, the anchor's weight, every variant's rates, the course of training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from world_distill.core.measures import AVERAGE, Measures
from world_distill.reports import charts, page
from world_distill.reports.charts import Bar, Series
from world_distill.reports.page import Cell, Chart, Key, Table, TableRow
from world_distill.reports.sections import measure_name, rate

_COLOURS = {"base": "var(--base)", "demonstrator": "var(--demonstrator)"}
_LINES = ("var(--executor)", "var(--extra)", "var(--base)", "var(--yes)", "var(--no)")
_OUTCOMES = {"holds": ("up", "\u2713"), "reversed": ("down", "\u2717"), "not resolved": ("", "\u2013")}
_COURSES = 5  # lines in one chart at most


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about two variants, and what was found: `kind` is "up", "down" or ""."""

    kind: str
    sign: str
    text: str
    outcome: str
    figures: str


def document(result: Mapping[str, Any]) -> str:
    """The whole page, from what `ablate` returns."""
    rows = {row["name"]: row for row in result["rows"]}
    seeds = ", ".join(map(str, result["seeds"]))
    clips = next(iter(rows.values()))["n"]
    measures = Measures.of(result)
    lede = (
        f"{_summary(result['orderings'])} Seeds {seeds}; every variant with the compute of {result['reference']}; "
        f"rates over {clips} held-out tasks."
    )
    return str(
        page.render(
            "ablation.html",
            lede=lede,
            claims=[_claim(line) for line in result["orderings"]],
            sweep=_sweep(result["sweep"], rows, measures) if len(result["sweep"]) > 1 else [],
            rates=_rates(rows, result["reference"], measures),
            courses=_courses(result["curves"], rows, measures),
            table=_table(result["rows"], result["steps"], measures),
        )
    )


def _summary(lines: Sequence[Mapping[str, Any]]) -> str:
    counts = {outcome: sum(line["outcome"] == outcome for line in lines) for outcome in _OUTCOMES}
    held, open_, reversed_ = counts["holds"], counts["not resolved"], counts["reversed"]
    return f"Claims that hold here: {held} of {len(lines)}; not resolved: {open_}; reversed: {reversed_}."


def _claim(line: Mapping[str, Any]) -> Claim:
    kind, sign = _OUTCOMES[line["outcome"]]
    low, high = line["ci95"]
    by_seed = ", ".join("–" if d is None else f"{d:+.3f}" for d in line["by_seed"])
    figures = (
        f"{line['better']} \u2212 {line['worse']}, {line['metric']}: {line['difference']:+.3f} "
        f"[{low:+.3f}, {high:+.3f}]; by seed {by_seed}"
    )
    return Claim(kind, sign, line["claim"][:1].upper() + line["claim"][1:], line["outcome"], figures)


def _sweep(
    sweep: Sequence[tuple[float, str]], rows: Mapping[str, Mapping[str, Any]], measures: Measures
) -> list[Chart]:
    """One chart a measure over the weights, evenly spaced: they lie orders of magnitude apart, and one is 0."""
    labels = [(float(i), charts.number(weight)) for i, (weight, _) in enumerate(sweep)]
    cards = []
    for metric in measures.names:
        caption = measure_name(measures, metric)
        measured = [(float(i), rows[name]) for i, (_, name) in enumerate(sweep)]
        series = [
            Series(
                "Executor",
                [(x, row[metric]) for x, row in measured],
                colour="var(--executor)",
                dots=True,
                ranges=[(x, *row["ci95"][metric]) for x, row in measured if row[metric] is not None],
            )
        ]
        legend = []
        if "demonstrator" in rows:
            level = rows["demonstrator"][metric]
            ends = [(0.0, level), (len(sweep) - 1.0, level)]
            series.append(Series("Demonstrator", ends, colour="var(--demonstrator)", dashed=True))
            legend = [Key("Demonstrator", "var(--demonstrator)", "dashed")]
        svg = charts.lines(
            series, title=f"{caption}, by the anchor's weight", limits=(0.0, 1.0), x_label="weight of the anchor in RL",
            x_ticks=labels, show=charts.percent,
        )  # fmt: skip
        cards.append(Chart(caption, svg, legend=legend))
    return cards


def _rates(rows: Mapping[str, Mapping[str, Any]], reference: str, measures: Measures) -> list[Chart]:
    colours = _COLOURS | {reference: "var(--executor)"}
    cards = []
    for metric in measures.names:
        caption = measure_name(measures, metric)
        bars = [
            Bar(name, row[metric], *row["ci95"][metric], colour=colours.get(name.partition(":")[0], "var(--extra)"))
            for name, row in rows.items()
            if row[metric] is not None
        ]
        cards.append(Chart(caption, charts.bars(bars, title=f"{caption}, by variant")))
    return cards


def _courses(
    curves: Mapping[str, Sequence[tuple[float, float]]], rows: Mapping[str, Mapping[str, Any]], measures: Measures
) -> list[Chart]:
    """The average on validation tasks over the steps, a few variants a chart; the only measure where there is one."""
    metric = AVERAGE if AVERAGE in measures.names else measures.headline
    caption = f"{'Average' if metric == AVERAGE else measure_name(measures, metric)} on validation tasks"
    names = [name for name, points in curves.items() if points]
    last = max((x for name in names for x, _ in curves[name]), default=0)
    cards = []
    for start in range(0, len(names), _COURSES):
        group = names[start : start + _COURSES]
        series = [Series(n, curves[n], colour=c, dots=True) for n, c in zip(group, _LINES, strict=False)]
        legend = [Key(n, c) for n, c in zip(group, _LINES, strict=False)]
        if "demonstrator" in rows:
            level = rows["demonstrator"][metric]
            series.append(Series("Demonstrator", [(0, level), (last, level)], "var(--demonstrator)", dashed=True))
            legend.append(Key("Demonstrator", "var(--demonstrator)", "dashed"))
        svg = charts.lines(
            series, title=f"{caption}: {', '.join(group)}", limits=(0.0, 1.0), across=(0, last),
            show=charts.percent,
        )  # fmt: skip
        cards.append(Chart(caption, svg, legend=legend))
    return cards


def _table(rows: Sequence[Mapping[str, Any]], steps: Mapping[str, int], measures: Measures) -> Table:
    lines = []
    for row in rows:
        cells = [_cell(row[measure], row["ci95"][measure]) for measure in measures.names]
        lines.append(TableRow(row["name"], [Cell(steps.get(row["name"], "–")), *cells, Cell(row["n"])]))
    return Table(
        "Every variant", ["", "Steps", *(measure_name(measures, m) for m in measures.names), "Clips"], [("", lines)]
    )


def _cell(value: float | None, bounds: Sequence[float]) -> Cell:
    return Cell(rate(value), "" if value is None else f"{rate(bounds[0])} to {rate(bounds[1])}")
