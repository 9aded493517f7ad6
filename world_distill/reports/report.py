"""`world-distill report`: one self-contained HTML page of a run, for people who have never heard of it.

The page is made from what lies in the run's folder (`run_data` reads it), and says what is missing:

    results.json or evaluation.json   rates with intervals (`evaluate.evaluate_roles`)
    metrics.jsonl                     figures of every training step (`metric_log.MetricLog`)
    clips/, evaluation_clips/         clips that quickstart and evaluate have kept (`kept_clips`)
    controls.json                     negative controls of the reward's judge (`evaluation.controls`)
    config.json                       the settings
"""

import dataclasses
import pathlib
from typing import Any

from markupsafe import Markup

from world_distill.reports import clip_cards, page, run_data, sections
from world_distill.reports.run_data import Contents, read
from world_distill.storage import atomic


def build(
    workdir: pathlib.Path, out: pathlib.Path | None = None, *, command: str | None = None, source: str = ""
) -> pathlib.Path:
    """Writes the page of a run and returns its path.

    Args:
      workdir: the run's folder.
      out: the page; by default WORKDIR/report.html.
      command: the command that made the run, to be shown on the page.
      source: which of `run_data.RESULTS` the page is about. Empty: the newer ones.

    Raises:
      UserError: nothing to report on, or damaged figures.
      OSError: the page cannot be written.
    """
    contents = read(pathlib.Path(workdir), source)
    path = pathlib.Path(out) if out is not None else contents.folder / "report.html"
    atomic.write_text(path, html(contents, command))
    return path


def html(contents: Contents, command: str | None = None) -> str:
    """The whole page."""
    contents = dataclasses.replace(contents, notes=list(contents.notes))  # clips that cannot be read are added
    name = contents.folder.resolve().name
    listed = (
        ("result", "Result", contents.rows, sections.results,
         f"There are no results yet; world-distill evaluate --workdir {name} scores the models on held-out tasks."),
        ("clips", "Clips", contents.clips, clip_cards.clips, "No clips were kept; world-distill evaluate keeps them."),
        ("controls", "Controls of the judge", contents.controls, sections.controls, ""),
        ("training", "Training", contents.log, sections.training,
         "There is no log of a training (metrics.jsonl), so there are no curves."),
        ("breakdown", "Break-down", contents.by_kind or contents.by_agent, sections.breakdowns,
         "There are no figures by kind of task or by agent."),
        ("settings", "Settings", True, lambda c: _settings(c, name, command), ""),
    )  # fmt: skip
    parts = [page.Section(anchor, heading, make(contents)) for anchor, heading, there, make, _ in listed if there]
    missing = [otherwise for *_, there, _, otherwise in listed if otherwise and not there] + contents.notes
    objective = (contents.config or {}).get("objective")
    return str(
        page.render(
            "report.html",
            name=name,
            kicker=_kicker(contents, name),
            judged=not isinstance(objective, dict) or objective.get("rl") != "none",
            example=clip_cards.example(contents),
            sections=parts,
            missing=missing,
        )
    )


def figures(contents: Contents) -> dict[str, Any]:
    """The page's figures for `--json`: rows, changes with what they allow to say, and the log's ends."""
    return {
        "source": contents.source,
        **contents.about,
        "rows": contents.rows,
        "by_kind": contents.by_kind,
        "by_agent": contents.by_agent,
        "changes": {
            f"{before} to {after}": run_data.changes(contents, before, after)
            for before, after in (("demonstrator", "executor"), ("base", "executor"))
        },
        "log": {
            name: {"points": len(points), "first": points[0], "last": points[-1]}
            for name, points in contents.log.items()
        },
        "clips": len(contents.clips),
    }


def _kicker(contents: Contents, name: str) -> str:
    """The facts above the title."""
    about = contents.about
    facts = [f"run {name}", *(f"{what} {about[what]}" for what in ("seed", "step") if what in about)]
    facts += [f"{about['split']} tasks"] if "split" in about else []
    return " · ".join(facts)


def _settings(contents: Contents, name: str, command: str | None) -> Markup:
    command = command or contents.about.get("command")
    commands = [str(command)] if command else []
    commands.append(f"world-distill report --workdir {name}")
    leaves = run_data.flat(contents.config or {})
    listing = ["# Each is also a flag: --config.NAME=VALUE", *(f"{key} = {value!r}" for key, value in leaves)]
    return page.render(
        "settings.html",
        commands="\n".join(commands),
        count=None if contents.config is None else len(leaves),
        listing="\n".join(listing),
        source=contents.source,
    )
