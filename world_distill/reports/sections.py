"""The figures of a report: rates with intervals, what changed in words, training curves, break-downs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from world_distill.core.measures import ALL, AVERAGE, QUESTIONS, Measures
from world_distill.judges.controls import CONTROLS
from world_distill.reports import charts, page, run_data
from world_distill.reports.charts import Bar, Series, percent
from world_distill.reports.page import Cell, Chart, Key, Table, TableRow, Tile
from world_distill.reports.run_data import ROLES, Change, Contents, Row, changes

NAMES = {
    "base": "Base model", "demonstrator": "Demonstrator", "executor": "Executor",
    # Rows of the paper's table.
    "sft": "SFT", "off_policy": "Off-policy", "on_policy": "On-policy", "wmsd": "WMSD",
}  # fmt: skip
TOLD = {
    "base": "before training, told the task",
    "demonstrator": "before training, told the solution",
    "executor": "after training, told the task",
}
_NAMES = {"task": "Task completed", "agent": "Intended agent", "consistency": "Consistent"}
_NOUNS = {"task": "task completion", "agent": "the intended agent", "average": "the average"}
_MEANING = {
    "task": "what the task asks for is done at the end",
    "agent": "the one whom the task names did it, and nobody else",
    "consistency": "nothing vanishes, jumps or changes its shape",
}
_HEADLINE = "task"  # a benchmark that asks for it has its result told in words of tasks


def measure_name(measures: Measures, measure: str) -> str:
    """What a measure is called on the page."""
    if measure == AVERAGE:
        return f"Average of the {measures.count}"
    if measure == ALL:
        return f"{measures.label(ALL).capitalize()} at once"
    return _NAMES.get(measure) or measure.replace("_", " ").capitalize()


def _noun(measures: Measures, measure: str) -> str:
    if measure == ALL:
        return f"{measures.label(ALL)} at once"
    return _NOUNS.get(measure) or measure.replace("_", " ")


def _meaning(contents: Contents, measure: str) -> str:
    measures = contents.measures
    if measure == AVERAGE:
        return f"mean of the {measures.count} {'scores' if contents.graded else 'rates'}"
    if measure == ALL:
        passes = f"share of clips that pass {measures.label(ALL)}"
        return "mean of each clip's lowest score" if contents.graded else passes
    mean = "mean score" if contents.graded else "share of clips for which the answer is yes"
    return _MEANING.get(measure, mean)


def _panels(measures: Measures) -> list[tuple]:
    """Of a log's figures, those that say most: caption, note, fixed limits, and (legend, key) of each line."""
    # The judge whose answers are the reward has questions of its own, and so has the held-out one.
    questions = list(dict.fromkeys((*measures.questions, *QUESTIONS)))
    rates = [
        (measure_name(measures, q), "", (0.0, 1.0), (
            ("training", f"rate/{q}"), ("validation", f"validation/{q}"), ("held-out judge", f"held_out/{q}"),
        ))
        for q in questions
    ]  # fmt: skip
    over_all = [
        (measure_name(measures, m), "", (0.0, 1.0), (("validation", f"validation/{m}"),))
        for m in (AVERAGE, ALL)
        if m in measures.names
    ]
    gaps = [
        (f"Reward beyond the held-out judge: {_noun(measures, q)}",
         "standard deviations by which the reward has risen more", None, (("gap", f"held_out/{q}/gap"),))
        for q in questions
    ]  # fmt: skip
    return [
        *rates,
        *over_all,
        ("Reward", "what the Executor's clips earn, on average", None, (("reward", "reward/total"),)),
        ("Fine-tuning loss", "squared velocity error on the records' clips", None, (("loss", "train/sft"),)),
        ("Anchor loss", "distance of the Executor's velocities to the Demonstrator's", None,
         (("anchor", "train/anchor"),)),
        ("Gradients", "the anchor's length divided by RL's, as both are weighted", None,
         (("anchor / RL", "train/anchor_to_rl"),)),
        ("Anchor weight", "beta_d", None, (("beta_d", "train/beta_d"),)),
        *gaps,
        ("Seconds a step", "", None, (("seconds", "time/step"),)),
    ]  # fmt: skip


def name_of(role: str) -> str:
    """What a role, or a row of the paper's table, is called on a page."""
    return NAMES.get(role, role)


def named(role: str) -> str:
    """What a role or row is called inside a sentence."""
    return f"the {name_of(role)}" if role in ROLES else name_of(role)


def colour(role: str) -> str:
    """The CSS colour of a role or row, the same all over a page."""
    role = "executor" if role == "wmsd" else role
    return f"var(--{role})" if role in ROLES else "var(--extra)"


def rate(value: float | None) -> str:
    """A rate in per cent, a dash if there is none."""
    return "–" if value is None else percent(value)


# Results ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChangeLine:
    """One measure's change in words; `kind` is its verdict."""

    kind: str
    sign: str
    measure: str
    text: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What changed from one role to another; all but the main one open on request."""

    heading: str
    main: bool
    summary: str
    lines: Sequence[ChangeLine]


def results(contents: Contents) -> Markup:
    """Tiles, bars with whiskers, the table, and what changed in words."""
    measures = contents.measures
    return page.render(
        "results.html",
        headline=headline(contents),
        graded=contents.graded,
        tiles=[_tile(contents, row) for row in contents.rows],
        charts=rate_charts(contents),
        table=rates_table("Every question", measures, "", [("", contents.rows)]),
        paper=rates_table("The paper's figures", measures, "", [("", contents.paper)]) if contents.paper else None,
        invalid=sum(row.invalid for row in contents.rows),
        changes=_comparisons(contents),
    )


def rate_charts(contents: Contents) -> list[Chart]:
    """One chart a measure: a bar with its whisker for each row."""
    panels, measures = [], contents.measures
    for measure in measures.names:
        name = measure_name(measures, measure)
        svg = charts.bars([_bar(row, measure) for row in contents.rows], title=f"{name}, by model")
        panels.append(Chart(name, svg, _meaning(contents, measure)))
    return panels


def headline(contents: Contents) -> str:
    """The result in a sentence or two."""
    measures = contents.measures
    of_tasks = measures.headline == _HEADLINE
    verb = "completes" if of_tasks else "reaches"
    trained = contents.row("executor") is not None
    said = {
        "executor": f"the trained Executor, told only the task, {verb}",
        "base": f"before training the same model, told the same, {verb}"
        if trained
        else f"the untrained model, told only the task, {verb}",
        "demonstrator": f"told the full solution (the Demonstrator) it {verb}",
    }
    known = [
        (said[role], value)
        for role in said
        if (row := contents.row(role)) and (value := row.rates[measures.headline]) is not None
    ]
    if not known:
        return "How often each model does what is asked."
    count = next((row.count for row in contents.rows if row.count), None)
    where = "training" if contents.about.get("split") == "train" else "held-out"
    clauses = "; ".join(f"{text} {percent(value)}" for text, value in known)
    tasks = f"{count if count else 'the'} {where} tasks"
    return (
        f"Of {tasks}, {clauses}."
        if of_tasks
        else f"{measure_name(measures, measures.headline)}: on {tasks}, {clauses}."
    )


def _tile(contents: Contents, row: Row) -> Tile:
    measures = contents.measures
    headline = measures.headline
    what = "tasks completed" if headline == _HEADLINE else measure_name(measures, headline).lower()
    told = f"on {measures.label(ALL)} at once" if contents.graded else f"pass {measures.label(ALL)}"
    more = f"{rate(row.rates[ALL])} {told}" if ALL in measures.names else ""
    return Tile(name_of(row.name), TOLD.get(row.name, ""), rate(row.rates[headline]), what, more, colour(row.name))


def _bar(row: Row, measure: str, label: str = "") -> Bar:
    low, high = row.intervals.get(measure, (None, None))
    return Bar(label or name_of(row.name), row.rates[measure], low, high, colour(row.name))


def rates_table(label: str, measures: Measures, heading: str, groups: Sequence[tuple[str, Sequence[Row]]]) -> Table:
    """Rates with their intervals, a line a row, in named groups; `heading` stands above their names."""
    lines = [(name, [_table_row(row, measures) for row in rows]) for name, rows in groups]
    return Table(label, [heading, *(measure_name(measures, m) for m in measures.names), "Clips"], lines)


def _table_row(row: Row, measures: Measures) -> TableRow:
    cells = []
    for measure in measures.names:
        bounds = row.intervals.get(measure) if row.rates[measure] is not None else None
        small = f"{percent(bounds[0])[:-2]} to {percent(bounds[1])[:-2]}" if bounds else ""
        cells.append(Cell(rate(row.rates[measure]), small))
    swatch = colour(row.name) if row.name in NAMES else ""
    return TableRow(name_of(row.name), [*cells, Cell("–" if row.count is None else row.count)], swatch)


# What changed, in words ---------------------------------------------------------------------------------------------


def summary(before: str, after: str, found: Sequence[Change], measures: Measures = Measures()) -> str:  # noqa: B008
    """One sentence over all measures: above, below, and where the figures do not tell."""
    parts = []
    for verdict, words in (
        ("up", f"is above the {name_of(before)} on"),
        ("down", "is below it on" if any(c.verdict == "up" for c in found) else f"is below the {name_of(before)} on"),
        ("overlap", "does not differ clearly on"),
        ("unknown", "cannot be compared, for want of intervals, on"),
    ):
        named = [_noun(measures, c.measure) for c in found if c.verdict == verdict]
        if named:
            parts.append(f"{words} {_listed(named)}")
    return f"The {name_of(after)} {_listed(parts, comma=True)}."


def sentence(change: Change) -> str:
    """One measure's change; what the intervals allow to be said, and no more."""
    points = 100 * (change.paired[0] if change.paired else change.after - change.before)
    moved = "the same" if abs(points) < 0.05 else f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
    better, worse = f"better by {points:.1f} points", f"worse by {-points:.1f} points"
    if change.paired:
        _, low, high = (100 * x for x in change.paired)
        bounds = f"paired by task, the difference is {signed(low)} to {signed(high)} points"
        text = {
            "up": f"{better}; {bounds}, above 0.",
            "down": f"{worse}; {bounds}, below 0.",
            "overlap": f"{moved}, no clear difference; {bounds}.",
        }[change.verdict]
    else:
        joined = "and" if moved == "the same" else "but"
        text = {
            "up": f"{better}; the intervals are apart.",
            "down": f"{worse}; the intervals are apart.",
            "overlap": f"{moved}, {joined} the intervals overlap: no clear difference.",
            "unknown": f"{moved}; without intervals, this may be chance.",
        }[change.verdict]
    return f"{percent(change.before)} → {percent(change.after)}, {text}"


def _comparisons(contents: Contents) -> list[Comparison]:
    signs = {"up": "▲", "down": "▼", "overlap": "≈", "unknown": "?"}
    told = []
    for before, after in (("demonstrator", "executor"), ("base", "executor")):
        if found := changes(contents, before, after):
            heading = f"From {name_of(before)} to {name_of(after)}"
            main = before == "demonstrator" or not contents.row("demonstrator")
            lines = [
                ChangeLine(c.verdict, signs[c.verdict], measure_name(contents.measures, c.measure), sentence(c))
                for c in found
            ]
            told.append(Comparison(heading, main, summary(before, after, found, contents.measures), lines))
    return told


def signed(points: float) -> str:
    """Percentage points with their sign, to a tenth."""
    text = f"{abs(points):.1f}"
    return text if text == "0.0" else ("+" if points > 0 else "\u2212") + text


def _listed(words: Sequence[str], comma: bool = False) -> str:
    *most, last = words
    return f"{', '.join(most)}{', and ' if comma else ' and '}{last}" if most else last


# Training -----------------------------------------------------------------------------------------------------------


def training(contents: Contents) -> Markup:
    """Small multiples of the log: the figures that say most, and all others on request."""
    log = contents.log
    steps = [step for points in log.values() for step, _ in points]
    across = (min(steps), max(steps))
    text = f"{charts.number(across[1])} steps."
    if any(len(points) > 24 for points in log.values()):
        text += " Where a line is noisy, the faint one is every step and the strong one the trend of its neighbours."
    begins, marks = run_data.rl_start(contents), []
    if begins is not None and begins > across[0]:
        marks.append((begins, "RL", f"RL begins at step {charts.number(begins)}"))
        text += f" RL begins at step {charts.number(begins)}, at the dotted line."
    elif begins is not None:
        text += " RL has a weight from the first step on."
    demonstrator = contents.row("demonstrator")
    panels, used = [], set()
    for caption, note, limits, lines in _panels(contents.measures):
        series = []
        for label, key in lines:
            if key not in log:
                continue
            validation, held_out = key.startswith("validation/"), key.startswith("held_out/")
            used.add(key)
            tint = "var(--ink)" if validation else "var(--extra)" if held_out else colour("executor")
            series.append(Series(label, log[key], tint, dots=validation or held_out))
            level = demonstrator.rates.get(key.removeprefix("validation/")) if validation and demonstrator else None
            if level is not None:
                name = f"Demonstrator on {contents.about.get('split', 'test')}"
                series.append(Series(name, [(x, level) for x in across], colour("demonstrator"), dashed=True))
        if series:
            panels.append(_panel(caption, series, across, note, limits, marks))
    if any(key.startswith("validation/") for key in log):
        text += " Training clips are seen by the judge whose answers are the reward, all others by the benchmark."
    if any(key.startswith("held_out/") for key in log):
        text += " The held-out judge sees the validation clips, too; its answers are never part of the reward."
    invalid = [y for _, y in log.get("judge/invalid", ()) if y is not None]
    if any(invalid):
        text += f" The judge had no answer for {percent(sum(invalid) / len(invalid))} of the clips."
    used |= {key for key in log if key.startswith(run_data.WITHIN_GROUP)}
    others = [
        _panel(key, [Series(key, log[key], colour("executor"))], across, marks=marks) for key in sorted(set(log) - used)
    ]
    return page.render("training.html", text=text, panels=panels, correlations=_correlations(contents), others=others)


def _correlations(contents: Contents) -> Table | None:
    """How far each reward ranks the rollouts of a task as the others do, and as their motion does."""
    found = run_data.within_group(contents)
    names = list(dict.fromkeys(name for pair in found for name in pair))
    rows = []
    for a in names:
        values = [found.get((a, b), found.get((b, a))) for b in names]
        rows.append(TableRow(a, [Cell("" if value is None else f"{value:+.2f}") for value in values]))
    return Table("What the rewards agree on", ["", *names], [("", rows)]) if found else None


def _panel(
    caption: str,
    series: Sequence[Series],
    across: tuple[float, float],
    note: str = "",
    limits: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str, str]] = (),
) -> Chart:
    show = percent if limits == (0.0, 1.0) else charts.number
    title = f"{caption} over training steps"
    svg = charts.lines(series, title=title, limits=limits, across=across, marks=marks, show=show)
    legend = [Key(s.label, s.colour, "dashed" if s.dashed else "dot" if s.dots else "") for s in series]
    return Chart(caption, svg, note, legend if len(legend) > 1 or series[0].dots else ())


# Negative controls ----------------------------------------------------------------------------------------------------


def controls(contents: Contents) -> Markup:
    """What the judge says of clips that do not show their task: a table by control and question."""
    found = contents.controls or {}
    groups: dict[str, list[TableRow]] = {}
    for row in found["rows"]:
        control = CONTROLS.get(row["control"])
        name = f"{row['control']}: {control.about}" if control else row["control"]
        groups.setdefault(name, []).append(_control_row(row))
    head = ["Question", "Plain clips", "Control", "Difference", "Verdict", "Clips"]
    failed = [f"Control {name} was not asked: {why}" for name, why in found["failed"].items()]
    passing = sum(row["passes"] is True for row in found["rows"])
    return page.render(
        "controls.html",
        judge=found["judge"],
        failed=failed,
        passing=passing,
        table=Table("Controls of the judge", head, list(groups.items())),
    )


def _control_row(row: Mapping[str, Any]) -> TableRow:
    rated = row["rate"] is not None and row["plain_rate"] is not None
    show = percent if rated else charts.number
    values = [row["plain_rate"], row["rate"]] if rated else [row["plain_score"], row["score"]]
    cells = [Cell("–" if value is None else show(value)) for value in values]

    def moved(value: float) -> str:
        return signed(100 * value) if rated else charts.number(value)

    bounds = (row["low"], row["high"])
    small = f"{moved(bounds[0])} to {moved(bounds[1])}" if None not in bounds else ""
    cells.append(Cell("–" if row["difference"] is None else moved(row["difference"]), small))
    word = {True: "passes", False: "held", None: "–" if row["n"] else "no answers"}[row["passes"]]
    return TableRow(row["question"].replace("_", " "), [*cells, Cell(word), Cell(row["n"])])


# Break-downs ----------------------------------------------------------------------------------------------------------


def breakdowns(contents: Contents) -> Markup:
    """Bars and a table by kind of task, a table by agent."""
    kinds, agents = grouped(contents.by_kind), grouped(contents.by_agent)
    return page.render(
        "breakdowns.html",
        kind_charts=[_kind_chart(kind, rows, contents.measures) for kind, rows in kinds],
        kinds=rates_table("By kind of task", contents.measures, "Kind", kinds) if kinds else None,
        agents=rates_table("By agent", contents.measures, "Agent", agents) if agents else None,
    )


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each kind or agent, in alphabetical order."""
    values = sorted({row.group for row in rows})
    return [(value, [row for row in rows if row.group == value]) for value in values]


def _kind_chart(kind: str, rows: Sequence[Row], measures: Measures) -> Chart:
    name = measure_name(measures, measures.headline)
    svg = charts.bars([_bar(row, measures.headline) for row in rows], title=f"{name}, kind {kind}")
    return Chart(kind, svg, f"{name.lower()}, {max(row.count or 0 for row in rows)} tasks")
