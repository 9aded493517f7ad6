"""The page of `reproduce`: the paper's rows with intervals, their differences, clips side by side, and commands.

It is made from reproduce.json and from what `evaluate` has left in the folders of the runs, WORKDIR/runs/ROW/SEED.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from world_distill.core.measures import Measures
from world_distill.errors import UserError
from world_distill.reports import clip_cards, page, run_data, sections
from world_distill.reports.page import Cell, Section, Table, TableRow
from world_distill.reports.run_data import Clip, Contents
from world_distill.reports.sections import measure_name, name_of, rate, signed
from world_distill.storage import atomic

RESULTS, PAGE = "reproduce.json", "reproduce.html"
CLIPS = 600  # of all rows in the page: more of them would be too small to be judged by eye
_TOLD = {
    "demonstrator": "told the solution",
    "sft": "fine-tuned on the Demonstrator's clips, told the task",
    "off_policy": "distilled on the Demonstrator's rollouts, told the task",
    "on_policy": "distilled on its own rollouts, told the task",
    "wmsd": "distilled with a judge's reward, told the task",
}
_SIGNS = {"up": "▲", "down": "▼", "overlap": "≈"}


@dataclasses.dataclass(frozen=True)
class Commands:
    """What makes one row alone, with each seed."""

    row: str
    text: str


def build(workdir: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the page of a table that `reproduce` has made, by default WORKDIR/reproduce.html, and returns its path.

    Raises:
      UserError: the folder holds no table, or a damaged one.
      OSError: the page cannot be written.
    """
    path = pathlib.Path(workdir) / RESULTS
    result = run_data.read_json(path)
    if result is None:
        raise UserError(f"{workdir} holds no {RESULTS}; `world-distill reproduce` with this --workdir writes it")
    try:
        text = html(path, result)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no table of `reproduce` ({type(error).__name__}: {error})") from error
    out = pathlib.Path(out) if out is not None else path.with_name(PAGE)
    atomic.write_text(out, text)
    return out


def html(path: pathlib.Path, result: Mapping[str, Any]) -> str:
    """The whole page, from what `reproduce` returns and has written to `path`."""
    measures = Measures.of(result)
    about = result.get("benchmark") or {}
    contents = Contents(path.parent, measures=measures)
    contents.rows = [run_data.row_of(path, row, measures) for row in result["rows"]]
    contents.paper = [run_data.row_of(path, row, measures) for row in about.get("paper") or []]
    contents.by_kind = [run_data.row_of(path, row, measures, "kind") for row in result["by_kind"]]
    kept = _read_clips(contents, result)
    failed = [f"{name_of(f['row'])} with seed {f['seed']} failed: {f['why']}" for f in result["failed"]]
    parts = [Section("rows", "Rows", _rows(contents, result, about))]
    if result["paired"]:
        parts.append(Section("differences", "Differences", _differences(result, measures)))
    if contents.clips:
        rows = [row["name"] for row in result["rows"]]
        models = [(row, _TOLD.get(row, "told the task")) for row in rows]
        cards = clip_cards.clips(contents, models, leads=rows[::-1])
        share = f"{len(contents.clips)} of the {kept} tasks whose clips were kept, evenly over all of them. "
        text = (share if len(contents.clips) < kept else "") + "The clips of a task are all of one seed."
        parts.append(Section("clips", "Clips", page.render("paper_clips.html", text=text, cards=cards)))
    if contents.by_kind or about.get("paper_groups"):
        parts.append(Section("kinds", "By kind of task", _kinds(contents, about)))
    parts.append(Section("commands", "Commands", page.render("paper_commands.html", rows=_commands(result))))
    clips = [] if contents.clips else ["No clips were kept; reproduce keeps those of the rows that it makes anew."]
    return str(
        page.render(
            "paper_table.html", kicker=_kicker(result, about), lede=_lede(contents), sections=parts,
            missing=[*failed, *clips, *contents.notes],
        )
    )  # fmt: skip


def _kicker(result: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    facts = [f"config {result['config']}", f"seeds {', '.join(map(str, result['seeds']))}", f"{result['split']} tasks"]
    if result.get("noises", 1) > 1:
        facts.append(f"{result['noises']} clips a task and seed")
    return " · ".join([*facts, *([about["name"]] if "name" in about else [])])


def _lede(contents: Contents) -> str:
    measure = contents.measures.headline
    rates = [f"{name_of(row.name)} {rate(row.rates[measure])}" for row in contents.rows]
    return f"{measure_name(contents.measures, measure)}: {', '.join(rates)}."


# Rows ---------------------------------------------------------------------------------------------------------------


def _rows(contents: Contents, result: Mapping[str, Any], about: Mapping[str, Any]) -> Markup:
    measures = contents.measures
    paper = [dataclasses.replace(row, name=f"{row.name} (paper)") for row in contents.paper]
    groups = [("Measured here" if paper else "", contents.rows), ("The paper's figures", paper)]
    table = sections.rates_table("Rows", measures, "", [group for group in groups if group[1]])
    facts = [[Cell(row["steps"] or "–"), Cell(", ".join(map(str, row["seeds"])))] for row in result["rows"]]
    facts += [[Cell("–"), Cell("–")] for _ in paper]
    by_seed = [run_data.row_of(contents.folder / RESULTS, row, measures) for row in result["by_seed"]]
    seeds = [[Cell(row["seed"])] for row in result["by_seed"]]
    return page.render(
        "paper_rows.html",
        charts=sections.rate_charts(contents),
        table=_with_columns(table, ["Steps", "Seeds"], facts),
        paper=bool(paper),
        invalid=sum(row.invalid for row in contents.rows),
        by_seed=_with_columns(sections.rates_table("Each seed", measures, "", [("", by_seed)]), ["Seed"], seeds),
    )


def _with_columns(table: Table, head: Sequence[str], cells: Sequence[Sequence[Cell]]) -> Table:
    """A table of rates with more columns behind the first, whose cells are given row by row; the last counts cases."""
    added = iter(cells)
    groups = [
        (name, [dataclasses.replace(row, cells=[*next(added), *row.cells]) for row in rows])
        for name, rows in table.groups
    ]
    return dataclasses.replace(table, head=[table.head[0], *head, *table.head[1:-1], "Cases"], groups=groups)


def _differences(result: Mapping[str, Any], measures: Measures) -> Markup:
    cases = _difference_table("Over cases", result["paired"], measures, "difference", "ci95", "n")
    entries = [entry for entry in result["paired"] if "ci95_seeds" in entry]
    seeds = _difference_table("Over seeds", entries, measures, "mean_of_seeds", "ci95_seeds", "seeds")
    return page.render("paper_differences.html", cases=cases, seeds=seeds if entries else None)


def _difference_table(
    label: str, entries: Sequence[Mapping[str, Any]], measures: Measures, mean: str, bounds: str, count: str
) -> Table:
    """Differences in points with their intervals, grouped by the row that they are against."""
    groups = []
    for before, of_before in itertools.groupby(entries, lambda entry: entry["before"]):
        lines = []
        for after, of_pair in itertools.groupby(of_before, lambda entry: entry["after"]):
            found = {entry["measure"]: entry for entry in of_pair}
            cells = [_difference(found.get(measure), mean, bounds) for measure in measures.names]
            number = max(entry[count] for entry in found.values())
            lines.append(TableRow(name_of(after), [*cells, Cell(number)], sections.colour(after)))
        groups.append((f"against {name_of(before)}", lines))
    last = "Cases" if count == "n" else "Seeds"
    return Table(label, ["Row", *(measure_name(measures, measure) for measure in measures.names), last], groups)


def _difference(entry: Mapping[str, Any] | None, mean: str, bounds: str) -> Cell:
    if entry is None or entry[mean] is None or None in entry[bounds]:
        return Cell("–")
    low, high = (min(max(bound, -1.0), 1.0) for bound in entry[bounds])  # Student's interval may reach further
    if low == high:  # seeds that agree to the last clip: their spread says nothing
        return Cell(signed(100 * entry[mean]), "alike in all seeds")
    sign = _SIGNS["up" if low > 0 else "down" if high < 0 else "overlap"]
    return Cell(f"{sign} {signed(100 * entry[mean])}", f"{signed(100 * low)} to {signed(100 * high)}")


def _kinds(contents: Contents, about: Mapping[str, Any]) -> Markup:
    measures, kinds = contents.measures, sections.grouped(contents.by_kind)
    table = sections.rates_table("By kind of task", measures, "Kind", kinds) if kinds else None
    groups = [
        (f"by {by}", [TableRow(name, [Cell(rate(one)), Cell(rate(other))]) for name, (one, other) in rates.items()])
        for by, rates in (about.get("paper_groups") or {}).items()
    ]
    head = ["", "before", "after WMSD"]
    paper = Table("The paper's figures by kind and agent", head, groups) if groups else None
    headline = measure_name(measures, measures.headline)
    return page.render("paper_kinds.html", kinds=table, paper=paper, headline=headline)


def _commands(result: Mapping[str, Any]) -> list[Commands]:
    return [
        Commands(name_of(row), "\n".join(f"# seed {line['seed']}\n" + "\n".join(line["calls"]) for line in lines))
        for row in dict.fromkeys(line["row"] for line in result["commands"])
        if (lines := [line for line in result["commands"] if line["row"] == row])
    ]


# Clips --------------------------------------------------------------------------------------------------------------


def _read_clips(contents: Contents, result: Mapping[str, Any]) -> int:
    """Puts the clips of all rows and what was said of them into `contents`; returns the tasks that have some.

    A task's clips are of the seed with which the most rows have it, the first of those. Of many tasks, so many are
    taken, evenly, that there are `CLIPS` clips.
    """
    found: dict[str, dict[int, dict[str, Clip]]] = {}  # by id, seed and row
    said: dict[tuple[str, int], dict[str, dict[str, float]]] = {}  # scores by row and seed, id and question
    roles = {row["name"]: row["role"] for row in result["rows"]}
    made = [(about["name"], seed) for about in result["rows"] for seed in about["seeds"]]
    for row, seed in made:
        try:
            run = run_data.read(contents.folder / "runs" / row / str(seed), "evaluation.json")
        except UserError as error:
            contents.notes.append(f"Clips of {name_of(row)} with seed {seed} are left out: {error}")
            continue
        contents.notes += [f"{name_of(row)}, seed {seed}: {note}" for note in run.notes]
        said[row, seed] = run.verdicts.get(roles[row], {})
        for clip in run.clips:
            if roles[row] in clip.films:
                found.setdefault(clip.id, {}).setdefault(seed, {})[row] = clip
    most = max(1, CLIPS // max(1, len(roles)))
    chosen = list(found)
    if len(chosen) > most:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, most).round().astype(int)]
    for record in chosen:
        seed = max(found[record], key=lambda seed: len(found[record][seed]))  # the first of the largest
        clips = found[record][seed]
        films = {row: clip.films[roles[row]] for row, clip in clips.items()}
        contents.clips.append(dataclasses.replace(next(iter(clips.values())), films=films))
        for row in clips:
            if record in said[row, seed]:
                contents.verdicts.setdefault(row, {})[record] = said[row, seed][record]
    return len(found)
