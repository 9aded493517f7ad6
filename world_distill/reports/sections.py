"""The figures of a report: rates with intervals, what changed in words, training curves, break-downs."""

from collections.abc import Sequence

from world_distill.reports import charts, page, run_data
from world_distill.reports.charts import Bar, Series, escape, percent
from world_distill.reports.run_data import MEASURES, QUESTIONS, ROLES, Change, Contents, Row, changes

NAMES = {"base": "Base model", "demonstrator": "Demonstrator", "executor": "Executor"}
TOLD = {
    "base": "before training, told the task",
    "demonstrator": "before training, told the solution",
    "executor": "after training, told the task",
}
MEASURE_NAMES = {
    "task": "Task completed",
    "agent": "Intended agent",
    "consistency": "Consistent",
    "average": "Average of the three",
    "all": "All three at once",
}
_NOUNS = {
    "task": "task completion",
    "agent": "the intended agent",
    "consistency": "consistency",
    "average": "the average",
    "all": "all three at once",
}
_MEANING = {
    "task": "what the task asks for is done at the end",
    "agent": "the one whom the task names did it, and nobody else",
    "consistency": "nothing vanishes, jumps or changes its shape",
    "average": "mean of the three rates",
    "all": "share of clips that pass all three",
}
_HOW_TO_READ = (
    "A bar is the share of clips for which the answer is yes. Its whisker is the 95\u00a0% interval: where that share "
    "may lie over all possible tasks. Where the whiskers of two models do not meet, their difference is hardly chance."
)
# Of a log's figures, those that say most: caption, note, fixed limits, and (legend, key) of each line.
_RATES = tuple(
    (MEASURE_NAMES[q], "", (0.0, 1.0), (
        ("training", f"rate/{q}"), ("validation", f"validation/{q}"), ("held-out judge", f"held_out/{q}"),
    ))
    for q in QUESTIONS
)  # fmt: skip
_GAPS = tuple(
    (f"Reward beyond the held-out judge: {_NOUNS[q]}", "standard deviations by which the reward has risen more", None,
     (("gap", f"held_out/{q}/gap"),))
    for q in QUESTIONS
)  # fmt: skip
_PANELS = (
    *_RATES,
    ("Average of the three", "", (0.0, 1.0), (("validation", "validation/average"),)),
    ("All three at once", "", (0.0, 1.0), (("validation", "validation/all"),)),
    ("Reward", "what the Executor's clips earn, on average", None, (("reward", "reward/total"),)),
    ("Anchor loss", "distance of the Executor's velocities to the Demonstrator's", None, (("anchor", "train/anchor"),)),
    ("Gradients", "the anchor's length divided by RL's, as both are weighted", None,
     (("anchor / RL", "train/anchor_to_rl"),)),
    ("Anchor weight", "beta_d", None, (("beta_d", "train/beta_d"),)),
    *_GAPS,
    ("Seconds a step", "", None, (("seconds", "time/step"),)),
)  # fmt: skip


def name_of(role: str) -> str:
    """What a role is called on the page."""
    return NAMES.get(role, role)


def colour(role: str) -> str:
    """The CSS colour of a role, the same all over the page."""
    return f"var(--{role})" if role in ROLES else "var(--extra)"


def rate(value: float | None) -> str:
    """A rate in per cent, a dash if there is none."""
    return "–" if value is None else percent(value)


# Results ------------------------------------------------------------------------------------------------------------


def results(contents: Contents) -> str:
    """Tiles, bars with whiskers, the table, and what changed in words."""
    parts = [page.paragraph(headline(contents), "lede"), _tiles(contents.rows)]
    parts.append('<h3>Every question</h3><div class="grid">')
    for measure in MEASURES:
        svg = charts.bars([_bar(row, measure) for row in contents.rows], title=f"{MEASURE_NAMES[measure]}, by model")
        parts.append(page.chart(MEASURE_NAMES[measure], svg, note=_MEANING[measure]))
    parts.append(f'<div class="card quiet">{page.paragraph(_HOW_TO_READ)}</div></div>')
    parts.append(page.table(["", *MEASURE_NAMES.values(), "Clips"], [("", map(_cells, contents.rows))]))
    if invalid := sum(row.invalid for row in contents.rows):
        parts.append(page.paragraph(f"{invalid} clips could not be judged and are left out.", "soft"))
    for before, after in (("demonstrator", "executor"), ("base", "executor")):
        if found := changes(contents, before, after):
            told = page.paragraph(summary(before, after, found)) + _change_list(found)
            heading = f"From {name_of(before)} to {name_of(after)}"
            main = before == "demonstrator" or not contents.row("demonstrator")
            parts.append(f"<h3>{heading}</h3>{told}" if main else page.details(heading, told))
    return "\n".join(parts)


def headline(contents: Contents) -> str:
    """The result in a sentence or two."""
    said = {
        "executor": "the trained Executor, told only the task, completes {}",
        "base": "before training the same model, told the same, completes {}",
        "demonstrator": "told the full solution (the Demonstrator) it completes {}",
    }
    known = [
        (said[role], row.rates["task"])
        for role in said
        if (row := contents.row(role)) and row.rates["task"] is not None
    ]
    if not known:
        return "How often each model does what is asked."
    count = next((row.count for row in contents.rows if row.count), None)
    where = "training" if contents.about.get("split") == "train" else "held-out"
    clauses = [text.format(percent(value)) for text, value in known]
    return f"Of {count if count else 'the'} {where} tasks, " + "; ".join(clauses) + "."


def _tiles(rows: Sequence[Row]) -> str:
    tiles = [
        page.tile(
            name_of(row.name), TOLD.get(row.name, ""), rate(row.rates["task"]), "tasks completed",
            f"{rate(row.rates['all'])} pass all three", colour(row.name),
        )
        for row in rows
    ]  # fmt: skip
    return f'<div class="grid">{"".join(tiles)}</div>'


def _bar(row: Row, measure: str, label: str = "") -> Bar:
    low, high = row.intervals.get(measure, (None, None))
    return Bar(label or name_of(row.name), row.rates[measure], low, high, colour(row.name))


def _cells(row: Row) -> str:
    """A table row."""
    cells = []
    for measure in MEASURES:
        bounds = row.intervals.get(measure) if row.rates[measure] is not None else None
        small = f"<small>{percent(bounds[0])[:-2]} to {percent(bounds[1])[:-2]}</small>" if bounds else ""
        cells.append(f"<td>{rate(row.rates[measure])}{small}</td>")
    name = f'<th scope="row">{page.key(colour(row.name), "dot")}{escape(name_of(row.name))}</th>'
    return f"<tr>{name}{''.join(cells)}<td>{'–' if row.count is None else row.count}</td></tr>"


# What changed, in words ---------------------------------------------------------------------------------------------


def summary(before: str, after: str, found: Sequence[Change]) -> str:
    """One sentence over all measures: above, below, and where the figures do not tell."""
    parts = []
    for verdict, words in (
        ("up", f"is above the {name_of(before)} on"),
        ("down", "is below it on" if any(c.verdict == "up" for c in found) else f"is below the {name_of(before)} on"),
        ("overlap", "does not differ clearly on"),
        ("unknown", "cannot be compared, for want of intervals, on"),
    ):
        measures = [_NOUNS[c.measure] for c in found if c.verdict == verdict]
        if measures:
            parts.append(f"{words} {_listed(measures)}")
    return f"The {name_of(after)} {_listed(parts, comma=True)}."


def sentence(change: Change) -> str:
    """One measure's change; what the intervals allow to be said, and no more."""
    points = 100 * (change.after - change.before)
    moved = "the same" if abs(points) < 0.05 else f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}"
    text = {
        "up": f"better by {points:.1f} points; the intervals are apart.",
        "down": f"worse by {-points:.1f} points; the intervals are apart.",
        "overlap": f"{moved}, but the intervals overlap: no clear difference.",
        "unknown": f"{moved}; without intervals, this may be chance.",
    }[change.verdict]
    text = f"{percent(change.before)} → {percent(change.after)}, {text}".replace("the same, but", "the same, and")
    if change.paired:
        _, low, high = (100 * x for x in change.paired)
        text += f" Paired by task, the difference is {_signed(low)} to {_signed(high)} points"
        if change.verdict == "overlap" and (low > 0 or high < 0):
            text += ", so a small one is likely"
        text += "."
    return text


def _change_list(found: Sequence[Change]) -> str:
    marks = {"up": "▲", "down": "▼", "overlap": "≈", "unknown": "?"}
    items = "".join(
        f'<li class="{c.verdict}"><i aria-hidden="true">{marks[c.verdict]}</i>'
        f"<b>{escape(MEASURE_NAMES[c.measure])}</b>: {escape(sentence(c))}</li>"
        for c in found
    )
    return f'<ul class="changes">{items}</ul>'


def _signed(points: float) -> str:
    text = f"{abs(points):.1f}"
    return text if text == "0.0" else ("+" if points > 0 else "\u2212") + text


def _listed(words: Sequence[str], comma: bool = False) -> str:
    *most, last = words
    return f"{', '.join(most)}{', and ' if comma else ' and '}{last}" if most else last


# Training -----------------------------------------------------------------------------------------------------------


def training(contents: Contents) -> str:
    """Small multiples of the log: the figures that say most, and all others on request."""
    log = contents.log
    steps = [step for points in log.values() for step, _ in points]
    across = (min(steps), max(steps))
    text = f"{charts.number(across[1])} steps."
    if any(len(points) > 24 for points in log.values()):
        text += " Where a line is noisy, the faint one is every step and the strong one the trend of its neighbours."
    demonstrator = contents.row("demonstrator")
    panels, used = [], set()
    for caption, note, limits, lines in _PANELS:
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
            panels.append(_panel(caption, series, across, note, limits))
    if any(key.startswith("validation/") for key in log):
        text += " Training clips are seen by the judge whose answers are the reward, all others by the benchmark."
    if any(key.startswith("held_out/") for key in log):
        text += " The held-out judge sees the validation clips, too; its answers are never part of the reward."
    invalid = [y for _, y in log.get("judge/invalid", ()) if y is not None]
    if any(invalid):
        text += f" The judge had no answer for {percent(sum(invalid) / len(invalid))} of the clips."
    parts = [page.paragraph(text)]
    if panels:
        parts.append(f'<div class="grid">{"".join(panels)}</div>')
    used |= {key for key in log if key.startswith(run_data.WITHIN_GROUP)}
    parts += _correlations(contents)
    rest = sorted(set(log) - used)
    if rest:
        others = [_panel(key, [Series(key, log[key], colour("executor"))], across) for key in rest]
        more = f'<div class="grid">{"".join(others)}</div>'
        parts.append(page.details(f"{len(rest)} more figures of the log", more) if panels else more)
    return "\n".join(parts)


def _correlations(contents: Contents) -> list[str]:
    """How far each reward ranks the rollouts of a task as the others do, and as their motion does."""
    found = run_data.within_group(contents)
    if not found:
        return []
    names = list(dict.fromkeys(name for pair in found for name in pair))
    rows = []
    for a in names:
        cells = "".join(
            "<td></td>" if value is None else f"<td>{value:+.2f}</td>"
            for value in (found.get((a, b), found.get((b, a))) for b in names)
        )
        rows.append(f'<tr><th scope="row">{escape(a)}</th>{cells}</tr>')
    note = (
        "Correlations between the rollouts of one task, mean of all steps with RL. RL learns from these differences "
        "alone: a reward whose correlation with the judge's answers is near 0 or negative pays for something else, and "
        "one that falls with motion pays for standing still."
    )
    table = page.table(["", *names], [("", rows)])
    return ["<h3>What the rewards agree on</h3>", page.paragraph(note, "soft"), table]


def _panel(
    caption: str,
    series: Sequence[Series],
    across: tuple[float, float],
    note: str = "",
    limits: tuple[float, float] | None = None,
) -> str:
    show = percent if limits == (0.0, 1.0) else charts.number
    title = f"{caption} over training steps"
    svg = charts.lines(series, title=title, limits=limits, across=across, show=show)
    kinds = [(s.label, s.colour, "dashed" if s.dashed else "dot" if s.dots else "") for s in series]
    return page.chart(caption, svg, note=note, legend=kinds if len(kinds) > 1 or series[0].dots else ())


# Break-downs ----------------------------------------------------------------------------------------------------------


def breakdowns(contents: Contents) -> str:
    """Bars and a table by kind of task, a table by agent."""
    parts = []
    if contents.by_kind:
        parts += ["<h3>By kind of task</h3>", _kind_bars(contents.by_kind), _table(contents.by_kind, "Kind")]
    if contents.by_agent:
        parts += ["<h3>By agent</h3>", _table(contents.by_agent, "Agent")]
    return "\n".join(parts)


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    values = sorted({row.group for row in rows})
    return [(value, [row for row in rows if row.group == value]) for value in values]


def _table(rows: Sequence[Row], heading: str) -> str:
    """A block of rows for each kind or agent; behind a line that opens it if there are many."""
    blocks = [(group, map(_cells, members)) for group, members in _groups(rows)]
    table = page.table([heading, *MEASURE_NAMES.values(), "Clips"], blocks)
    return page.details(f"Show all {len(blocks)}", table) if len(blocks) > 6 else table


def _kind_bars(rows: Sequence[Row]) -> str:
    cards = []
    for kind, members in _groups(rows):
        svg = charts.bars([_bar(row, "task") for row in members], title=f"{MEASURE_NAMES['task']}, kind {kind}")
        count = max(row.count or 0 for row in members)
        cards.append(page.chart(kind, svg, note=f"task completed, {count} tasks"))
    return f'<div class="grid">{"".join(cards)}</div>'
