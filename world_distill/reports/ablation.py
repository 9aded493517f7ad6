"""The page of an ablation: which claims hold, the anchor's weight, every variant's rates, the course of training."""

from collections.abc import Mapping, Sequence
from typing import Any

from world_distill.reports import charts, page
from world_distill.reports.charts import Bar, Series, escape
from world_distill.reports.sections import MEASURE_NAMES, rate

_COLOURS = {"base": "var(--base)", "demonstrator": "var(--demonstrator)"}
_LINES = ("var(--executor)", "var(--extra)", "var(--base)", "var(--yes)", "var(--no)")
_OUTCOMES = {"holds": ("up", "\u2713"), "reversed": ("down", "\u2717"), "not resolved": ("", "\u2013")}
_COURSES = 5  # lines in one chart at most


def document(result: Mapping[str, Any]) -> str:
    """The whole page, from what `ablate` returns."""
    rows = {row["name"]: row for row in result["rows"]}
    seeds = ", ".join(map(str, result["seeds"]))
    clips = next(iter(rows.values()))["n"]
    lede = (
        f"{_summary(result['orderings'])} Seeds {seeds}; every variant with the compute of {result['reference']}; "
        f"rates over {clips} held-out tasks."
    )
    parts = [f"<header><h1>Ablation</h1>{page.paragraph(lede, 'lede')}</header>"]
    parts.append(page.section("orderings", "Claims", _orderings(result["orderings"])))
    if len(result["sweep"]) > 1:
        parts.append(page.section("sweep", "How strong an anchor", _sweep(result["sweep"], rows)))
    parts.append(page.section("rates", "Every variant", _rates(rows, result["reference"])))
    if any(result["curves"].values()):
        parts.append(page.section("course", "Course of the training", _courses(result["curves"], rows)))
    parts.append(page.section("table", "In figures", _table(result["rows"], result["steps"])))
    return page.document("Ablation", "\n".join(parts))


def _summary(lines: Sequence[Mapping[str, Any]]) -> str:
    counts = {outcome: sum(line["outcome"] == outcome for line in lines) for outcome in _OUTCOMES}
    return (
        f"Of {len(lines)} claims {counts['holds']} hold here, {counts['not resolved']} are not "
        f"resolved and {counts['reversed']} are reversed."
    )


def _orderings(lines: Sequence[Mapping[str, Any]]) -> str:
    items = []
    for line in lines:
        kind, sign = _OUTCOMES[line["outcome"]]
        low, high = line["ci95"]
        by_seed = ", ".join("–" if d is None else f"{d:+.3f}" for d in line["by_seed"])
        claim = line["claim"][:1].upper() + line["claim"][1:]
        items.append(
            f'<li class="{kind}"><i>{sign}</i><b>{escape(claim)}</b>: {escape(line["outcome"])}'
            f'<br><span class="soft">{escape(line["better"])} \u2212 {escape(line["worse"])}, '
            f"{escape(line['metric'])}: {line['difference']:+.3f} [{low:+.3f}, {high:+.3f}]; "
            f"by seed {by_seed}</span></li>"
        )
    note = (
        "Differences are paired, clip by clip, with bootstrap 95 % intervals over clips; a claim holds if its interval "
        "is above 0. How much another training run would change shows in the differences of the seeds."
    )
    return page.paragraph(note, "soft") + f'<ul class="changes">{"".join(items)}</ul>'


def _sweep(sweep: Sequence[tuple[float, str]], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One chart a measure over the weights, evenly spaced: they lie orders of magnitude apart, and one is 0."""
    labels = [(float(i), charts.number(weight)) for i, (weight, _) in enumerate(sweep)]
    cards = []
    for metric, caption in MEASURE_NAMES.items():
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
            legend = [("Demonstrator", "var(--demonstrator)", "dashed")]
        svg = charts.lines(
            series, title=f"{caption}, by the anchor's weight", limits=(0.0, 1.0), x_label="weight of the anchor in RL",
            x_ticks=labels, show=charts.percent,
        )  # fmt: skip
        cards.append(page.chart(caption, svg, legend=legend))
    return f'<div class="grid">{"".join(cards)}</div>'


def _rates(rows: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    colours = _COLOURS | {reference: "var(--executor)"}
    cards = []
    for metric, caption in MEASURE_NAMES.items():
        bars = [
            Bar(name, row[metric], *row["ci95"][metric], colour=colours.get(name.partition(":")[0], "var(--extra)"))
            for name, row in rows.items()
            if row[metric] is not None
        ]
        cards.append(page.chart(caption, charts.bars(bars, title=f"{caption}, by variant")))
    return f'<div class="grid">{"".join(cards)}</div>'


def _courses(curves: Mapping[str, Sequence[tuple[float, float]]], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The average on validation tasks over the steps, a few variants a chart."""
    names = [name for name, points in curves.items() if points]
    last = max(x for name in names for x, _ in curves[name])
    cards = []
    for start in range(0, len(names), _COURSES):
        group = names[start : start + _COURSES]
        series = [Series(n, curves[n], colour=c, dots=True) for n, c in zip(group, _LINES, strict=False)]
        legend = [(n, c, "") for n, c in zip(group, _LINES, strict=False)]
        if "demonstrator" in rows:
            level = rows["demonstrator"]["average"]
            series.append(Series("Demonstrator", [(0, level), (last, level)], "var(--demonstrator)", dashed=True))
            legend.append(("Demonstrator", "var(--demonstrator)", "dashed"))
        svg = charts.lines(
            series, title=f"Average on validation tasks: {', '.join(group)}", limits=(0.0, 1.0), across=(0, last),
            show=charts.percent,
        )  # fmt: skip
        cards.append(page.chart("Average on validation tasks", svg, legend=legend))
    return f'<div class="grid">{"".join(cards)}</div>'


def _table(rows: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> str:
    lines = []
    for row in rows:
        cells = "".join(
            f"<td>{rate(row[m])}<small>{rate(row['ci95'][m][0])} to {rate(row['ci95'][m][1])}</small></td>"
            if row[m] is not None
            else "<td>–</td>"
            for m in MEASURE_NAMES
        )
        lines.append(
            f'<tr><th scope="row">{escape(row["name"])}</th><td>{steps.get(row["name"], "–")}</td>{cells}'
            f"<td>{row['n']}</td></tr>"
        )
    return page.table(["", "Steps", *MEASURE_NAMES.values(), "Clips"], [("", lines)])
