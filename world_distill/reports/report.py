"""`world-distill report`: one self-contained HTML page of a run, for people who have never heard of it.

The page is made from what lies in the run's folder (`run_data` reads it), and says what is missing:

    results.json or evaluation.json   rates with intervals (`evaluate.evaluate_roles`)
    metrics.jsonl                     figures of every training step (`metric_log.MetricLog`)
    clips/clips.json                  [{id, task, solution, agent, kind, fps?}] of the tasks whose clips were kept
    clips/ROLE/ID.png                 those clips (`video_io.save_strip`); ROLE is base, demonstrator or executor
    config.json                       the settings
"""

import dataclasses
import pathlib
from typing import Any

from world_distill.reports import clip_cards, page, run_data, sections
from world_distill.reports.charts import escape
from world_distill.reports.run_data import Contents, read
from world_distill.storage import atomic

_TITLE = "World Model Self-Distillation"
_LEDE = """\
A video model can show almost anything that it is told in detail. Told only what to achieve, it does not know what that
should look like. World Model Self-Distillation lets it find out by itself, without one example video. The model as it
is, told the full solution, is the Demonstrator. A copy in training, the Executor, is told the short task alone and
learns to make the same video. {judge}In the end the Executor needs an image and a task, no more."""
_JUDGE = """\
A judge rewards those of its videos in which the task is done, so that it can pass the Demonstrator. """


def build(workdir: pathlib.Path, out: pathlib.Path | None = None, *, command: str | None = None) -> pathlib.Path:
    """Writes the page of a run and returns its path.

    Args:
      workdir: the run's folder.
      out: the page; by default WORKDIR/report.html.
      command: the command that made the run, to be shown on the page.

    Raises:
      UserError: nothing to report on, or damaged figures.
      OSError: the page cannot be written.
    """
    contents = read(pathlib.Path(workdir))
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
        ("clips", "Clips", contents.clips, clip_cards.clips, "No clips were kept; quickstart keeps some."),
        ("training", "Training", contents.log, sections.training,
         "There is no log of a training (metrics.jsonl), so there are no curves."),
        ("breakdown", "Break-down", contents.by_kind or contents.by_agent, sections.breakdowns,
         "There are no figures by kind of task or by agent."),
        ("settings", "Settings", True, lambda c: _settings(c, name, command), ""),
    )  # fmt: skip
    parts = [_header(contents, name, [(anchor, heading) for anchor, heading, there, *_ in listed if there])]
    parts += [page.section(anchor, heading, make(contents)) for anchor, heading, there, make, _ in listed if there]
    missing = [otherwise for *_, there, _, otherwise in listed if not there] + contents.notes
    if missing:
        notes = "".join(page.paragraph(text, "soft") for text in missing)
        parts.append(page.section("missing", "Not on this page", notes))
    footer = "Made by world-distill report. Method: World Model Self-Distillation, arXiv 2606.12072."
    return page.document(f"{name}: {_TITLE}", "\n".join(parts), footer=footer)


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


def _header(contents: Contents, name: str, links: list[tuple[str, str]]) -> str:
    about = contents.about
    facts = [f"run {name}", *(f"{what} {about[what]}" for what in ("seed", "step") if what in about)]
    facts += [f"{about['split']} tasks"] if "split" in about else []
    objective = (contents.config or {}).get("objective")
    judged = not isinstance(objective, dict) or objective.get("rl") != "none"
    lede = _LEDE.format(judge=_JUDGE if judged else "")
    nav = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading in links)
    return (
        f'<header><p class="kicker">{escape(" · ".join(facts))}</p><div class="top"><div><h1>{_TITLE}</h1>'
        f'{page.paragraph(lede, "lede")}<nav aria-label="Parts of this page">{nav}</nav></div>'
        f"{clip_cards.example(contents)}</div></header>"
    )


def _settings(contents: Contents, name: str, command: str | None) -> str:
    command = command or contents.about.get("command")
    lines = [str(command)] if command else []
    lines.append(f"world-distill report --workdir {name}")
    parts = [page.details("Commands", page.code("\n".join(lines)))]
    if contents.config is None:
        parts.append(page.paragraph("The folder has no config.json."))
    else:
        leaves = run_data.flat(contents.config)
        text = "# Each is also a flag: --config.NAME=VALUE\n"
        text += "\n".join(f"{key} = {value!r}" for key, value in leaves)
        parts.append(page.details(f"All {len(leaves)} settings", page.code(text)))
    if contents.source:
        parts.append(page.paragraph(f"Figures from {contents.source} of the run's folder.", "soft"))
    return "\n".join(parts)
