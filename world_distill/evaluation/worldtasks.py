"""WorldTasks-Bench: 200 pictures with a task each, and a VLM that says whether it was done, by whom, and how soundly.

The paper (arXiv 2606.12072) names the three questions and not their wording, its judge, or how many noises a case has.
So its figures are a mark to look at, and no measurement of ours: tables name them as the paper's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from world_distill.core.measures import AVERAGE, Measures
from world_distill.evaluation.comparison import markdown_table
from world_distill.evaluation.scoring import NAMES
from world_distill.evaluation.vlm_benchmark import VlmBenchmark

CASES = 200
_COLUMNS = ("task", "agent", "consistency", "average")
_ROWS = {
    "LTX-2": (0.315, 0.395, 0.690, 0.467),
    "LTX-2 + SFT": (0.292, 0.389, 0.682, 0.454),
    "LTX-2 8-step": (0.285, 0.391, 0.694, 0.455),
    "LTX-2 8-step, told a VLM's caption": (0.495, 0.572, 0.732, 0.598),
    "LTX-2 8-step + WMSD": (0.605, 0.691, 0.882, 0.726),
    "HunyuanVideo-1.5": (0.463, 0.540, 0.780, 0.597),
    "HunyuanVideo-1.5 + WMSD": (0.574, 0.630, 0.828, 0.673),
}
PAPER = tuple({"name": name, "n": CASES} | dict(zip(_COLUMNS, rates, strict=True)) for name, rates in _ROWS.items())
# Share of tasks completed, of the base model and after WMSD.
BY_KIND = {
    "navigation": (0.31, 0.76), "object interaction": (0.18, 0.56), "perception": (0.41, 0.69),
    "positioning": (0.27, 0.50), "combat": (0.27, 0.36),
}  # fmt: skip
BY_AGENT = {"first-person": (0.42, 0.86), "human characters": (0.36, 0.76)}


class WorldTasksBench(VlmBenchmark):
    """`VlmBenchmark` with the questions of WorldTasks-Bench, beside the paper's figures. It has the same options."""

    def describe(self) -> dict[str, Any]:
        """As `VlmBenchmark.describe`, with the paper's rows, and its rates by kind and agent."""
        return super().describe() | {
            "paper": list(PAPER), "paper_groups": {"kind": dict(BY_KIND), "agent": dict(BY_AGENT)},
        }  # fmt: skip


def paper_table(rows: Sequence[Mapping[str, Any]], paper: Sequence[Mapping[str, Any]], measures: Measures) -> str:
    """The table in the paper's form, as Markdown: rates as parts of 1, `n`, and the paper's own rows below ours."""
    columns = [*measures.questions, *([AVERAGE] if AVERAGE in measures.names else [])]
    names = {AVERAGE: "Avg"} | {question: question.replace("_", " ").capitalize() for question in measures.questions}
    lines = [["model", *(names[column] for column in columns), "n"]]
    for row in rows:
        cells = [_with_interval(row[column], row["ci95"].get(column)) for column in columns]
        lines.append([f"{NAMES.get(row['name'], row['name'])}, here", *cells, str(row["n"])])
    for row in paper:
        cells = [_rate(row.get(column)) for column in columns]
        lines.append([f"*{row['name']}, the paper's figure*", *cells, str(row["n"])])
    return markdown_table(lines)


def paper_groups(groups: Mapping[str, Mapping[str, Sequence[float]]], measure: str) -> str:
    """The paper's rates by kind and by agent, as Markdown."""
    lines = [[f"the paper's figures, {measure}", "before", "after WMSD"]]
    for by, rates in groups.items():
        lines += [[f"*{by}: {name}*", _rate(before), _rate(after)] for name, (before, after) in rates.items()]
    return markdown_table(lines)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    return _rate(value) if bounds is None else f"{_rate(value)} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
