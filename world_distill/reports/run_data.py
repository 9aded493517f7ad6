"""What a run's folder holds for its report: figures, log, clips and settings, checked while they are read.

Figures that cannot be trusted stop the report (a page with half of its numbers would mislead). A damaged clip only
leaves a gap, and a note that says so.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from world_distill.core.measures import Measures
from world_distill.core.metrics import score_difference
from world_distill.errors import UserError
from world_distill.storage.metric_log import read_log
from world_distill.storage.video_files import load_strip

ROLES = ("base", "demonstrator", "executor")
# Figures of a folder, and the folder of their clips, where any were kept.
RESULTS = {"results.json": "clips", "evaluation.json": "evaluation_clips"}
CLIPS = RESULTS["results.json"]
CONTROLS = "controls.json"  # of `judgments --controls` and of the start of training
INDEX = "clips.json"  # of a folder of clips
FPS = 4.0  # of clips whose entry in clips.json names no fps


@dataclasses.dataclass(frozen=True)
class Row:
    """Rates of one role, over all tasks or those of one kind or agent.

    Attributes:
      name: the role.
      rates: measure to a rate in 0..1, or None where nothing was judged.
      intervals: measure to its 95 % interval, where there is one.
      count: clips judged; None if the file does not say.
      invalid: clips that the benchmark could not judge.
      group: the kind or agent, in a break-down.
    """

    name: str
    rates: Mapping[str, float | None]
    intervals: Mapping[str, tuple[float, float]]
    count: int | None
    invalid: int
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A task whose clips were kept; `films` are the strips that exist, by role."""

    id: str
    task: str
    solution: str
    agent: str
    kind: str
    fps: float
    films: Mapping[str, pathlib.Path]

    def load(self, role: str) -> np.ndarray:
        """The role's clip [F H W 3] uint8. Raises ValueError or OSError, see `video_files.load_strip`."""
        return load_strip(self.films[role])


@dataclasses.dataclass
class Contents:
    """All that a report shows. A part that the folder lacks is empty."""

    folder: pathlib.Path
    source: str = ""  # name of the file that the rows come from
    measures: Measures = Measures()  # of the benchmark
    rows: list[Row] = dataclasses.field(default_factory=list)
    by_kind: list[Row] = dataclasses.field(default_factory=list)
    by_agent: list[Row] = dataclasses.field(default_factory=list)
    paper: list[Row] = dataclasses.field(default_factory=list)  # figures of a paper, to stand beside the rows
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # split, seed, step, command of the rows
    verdicts: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)  # role, id, question
    log: dict[str, list[tuple[float, float | None]]] = dataclasses.field(default_factory=dict)
    clips: list[Clip] = dataclasses.field(default_factory=list)
    clips_folder: str = CLIPS  # that of the rows' clips
    config: dict[str, Any] | None = None
    controls: dict[str, Any] | None = None  # what a judge says of negative controls (`evaluation.controls`)
    # Differences that the results hold: mean and 95 % interval by (before, after, measure)
    paired: dict[tuple[str, str, str], tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)  # what could not be used, one sentence each

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def graded(self) -> bool:
        """Whether there are scores between yes and no."""
        scores = (scores for of_role in self.verdicts.values() for scores in of_role.values())
        return any(0 < score < 1 for of_clip in scores for score in of_clip.values())


def clip_path(folder: pathlib.Path, role: str, record: str, suffix: str = ".png") -> pathlib.Path:
    """Where the clip of a role for a record lies in a folder of clips: `.png` is exact, `.webp` small.

    Raises:
      ValueError: the record's id is no plain file name.
    """
    if not record or record.startswith(".") or set(record) & set("/\\:\0"):
        raise ValueError(f"record id {record!r} is no file name")
    return folder / role / f"{record}{suffix}"


def read(workdir: pathlib.Path, source: str = "") -> Contents:
    """Reads a run's folder.

    Args:
      workdir: the folder.
      source: which of `RESULTS` the page is about. Empty: the newer ones.

    Raises:
      UserError: there is no such folder, nothing in it to report on, or figures in it are damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; --workdir names that of a run")
    contents = Contents(workdir)
    names = (source,) if source else RESULTS
    found = [(name, value) for name in names if (value := read_json(workdir / name)) is not None]
    if found:
        # The newer figures: those of more training steps, and quickstart's own where both have as many.
        found.sort(key=lambda item: -_step(item[1]))
        _read_results(contents, *found[0])
    _read_log(contents)
    contents.clips, notes = _read_clips(workdir / contents.clips_folder)
    contents.notes += notes
    _read_controls(contents)
    config = read_json(workdir / "config.json")
    contents.config = config if isinstance(config, dict) else None
    if not (contents.rows or contents.log or contents.clips):
        figures = f"no rows in {contents.source}" if contents.source else f"no {' or '.join(RESULTS)}"
        raise UserError(
            f"{workdir} holds nothing to report on: {figures}, no metrics.jsonl and no clips. "
            "Run `world-distill quickstart`, or `world-distill train` and `world-distill evaluate` with this --workdir"
        )
    return contents


def read_json(path: pathlib.Path) -> Any:
    """The file's contents; None if it does not exist. Raises UserError for what is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


def _step(value: Any) -> float:
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, (int, float)) else -1


def _read_results(contents: Contents, name: str, value: Any) -> None:
    path = contents.folder / name
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        raise UserError(f"{path}: has no list `rows`; quickstart and evaluate write such a file")
    contents.source = name
    contents.clips_folder = RESULTS[name] if value.get("clips") else CLIPS
    try:
        measures = contents.measures = Measures.of(value)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its `benchmark` is damaged ({type(error).__name__}: {error})") from error
    contents.rows = [row_of(path, row, measures) for row in value["rows"]]
    contents.paper = [row_of(path, row, measures) for row in (value.get("benchmark") or {}).get("paper") or []]
    contents.by_kind = [row_of(path, row, measures, "kind") for row in value.get("by_kind") or []]
    contents.by_agent = [row_of(path, row, measures, "agent") for row in value.get("by_agent") or []]
    contents.about = {k: value[k] for k in ("split", "seed", "step", "command") if value.get(k) is not None}
    try:
        for role, verdicts in (value.get("verdicts") or {}).items():
            contents.verdicts[role] = {
                v["id"]: {q: float(s) for q, s in v["scores"].items() if s is not None and math.isfinite(s)}
                for v in verdicts
                if not v.get("noise")  # the clips that are kept are those of the first noise
            }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its `verdicts` are damaged ({type(error).__name__}: {error})") from error
    try:
        for entry in value.get("paired") or []:
            low, high = entry["ci95"]
            if entry["n"] > 1:
                key = entry["before"], entry["after"], entry["measure"]
                contents.paired[key] = float(entry["difference"]), float(low), float(high)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its `paired` is damaged ({type(error).__name__}: {error})") from error


def row_of(path: pathlib.Path, value: Any, measures: Measures, by: str = "") -> Row:
    """A row of results; `by` is "kind" or "agent" in a break-down.

    Raises:
      UserError: it has no name, or a rate that is none; the message names the file `path`.
    """

    def figure(x: Any, what: str) -> float | None:
        if x is None or (isinstance(x, float) and not math.isfinite(x)):
            return None
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 <= x <= 1:
            raise UserError(f"{path}: {what} is {x!r}, not a rate between 0 and 1")
        return float(x)

    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UserError(f"{path}: a row without a name: {str(value)[:80]}")
    where = f"row {value['name']!r}: "
    group = str(value.get("group", value.get(by, ""))) if by else ""
    # A break-down by agent may name the agent in the place of the question of that name.
    lost = {"agent"} if by == "agent" and isinstance(value.get("agent"), str) else set()
    rates = {m: None if m in lost else figure(value.get(m), where + m) for m in measures.names}
    intervals = {}
    for measure, bounds in (value.get("ci95") or {}).items():
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise UserError(f"{path}: {where}ci95 of {measure} is {bounds!r}, not [low, high]")
        # The normal interval of an average may reach beyond 0 and 1; no average does.
        ends = [figure(min(max(b, 0.0), 1.0) if isinstance(b, (int, float)) else b, where + "ci95") for b in bounds]
        if None not in ends and measure in measures.names:
            intervals[measure] = tuple(ends)
    count, invalid = value.get("n"), value.get("invalid")
    return Row(
        value["name"], rates, intervals,
        count if isinstance(count, int) else None, invalid if isinstance(invalid, int) else 0,
        group,
    )  # fmt: skip


def _read_log(contents: Contents) -> None:
    for line in read_log(contents.folder / "metrics.jsonl"):
        if not isinstance(line, dict) or not isinstance(line.get("step"), (int, float)):
            raise UserError(f"{contents.folder / 'metrics.jsonl'}: a line without a step: {str(line)[:80]}")
        for name, y in line.items():
            if name != "step" and (y is None or isinstance(y, (int, float))):
                value = float(y) if y is not None and math.isfinite(y) else None
                contents.log.setdefault(name, []).append((line["step"], value))
    contents.log = {n: points for n, points in contents.log.items() if any(y is not None for _, y in points)}


WITHIN_GROUP = "within_group/"  # prefix of the log's correlations, see `core.metrics.within_group_correlations`


def rl_start(contents: Contents) -> float | None:
    """The first logged step in which RL has a weight; None without RL, or where the log does not tell.

    Earlier logs do not hold the weight, but correlations inside groups, which steps with RL alone have.
    """
    objective = (contents.config or {}).get("objective")
    if not isinstance(objective, Mapping) or objective.get("rl") == "none" or objective.get("kind") == "sft":
        return None
    if weights := contents.log.get("train/rl_weight"):
        return min((step for step, weight in weights if weight), default=None)
    pairs = [points for name, points in contents.log.items() if name.startswith(WITHIN_GROUP)]
    return min((step for points in pairs for step, y in points if y is not None), default=None)


def within_group(contents: Contents) -> dict[tuple[str, str], float]:
    """Mean over steps of each pair's correlation inside groups, from the log; pairs that never had one are left out."""
    found = {}
    for name, points in contents.log.items():
        values = [y for _, y in points if y is not None]
        if name.startswith(WITHIN_GROUP) and values:
            a, _, b = name.removeprefix(WITHIN_GROUP).partition("~")
            found[a, b] = sum(values) / len(values)
    return found


def _read_clips(folder: pathlib.Path) -> tuple[list[Clip], list[str]]:
    """The tasks of a folder of clips that have one, and a sentence for each entry that cannot be used."""
    path = folder / INDEX
    entries = read_json(path)
    clips, notes = [], []
    if entries is None:
        return clips, notes
    if not isinstance(entries, list):
        raise UserError(f"{path}: not a list of tasks")
    for entry in entries:
        try:
            texts = {name: entry[name] for name in ("id", "task", "solution", "agent", "kind")}
            paths = {
                role: [clip_path(folder, role, str(texts["id"]), suffix) for suffix in (".png", ".webp")]
                for role in ROLES
            }
            fps = float(entry.get("fps") or FPS)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            notes.append(f"An entry of clips.json cannot be used ({type(error).__name__}: {error}).")
            continue
        films = {role: path for role, of_role in paths.items() for path in of_role if path.is_file()}
        if films:
            texts = {name: str(text) for name, text in texts.items()}
            clips.append(Clip(**texts, fps=fps if 0 < fps <= 1000 else FPS, films=films))
    return clips, notes


def _read_controls(contents: Contents) -> None:
    """The figures of negative controls; damaged ones are left out with a note, since no other figure needs them."""
    try:
        value = read_json(contents.folder / CONTROLS)
        if value is None:
            return
        for row in value["rows"]:
            if not isinstance(row["control"], str) or not isinstance(row["question"], str):
                raise TypeError("a row without the names of its control and question")
            for name in ("n", "rate", "plain_rate", "score", "plain_score", "difference", "low", "high"):
                if row[name] is not None:
                    float(row[name])
            if row["passes"] not in (True, False, None):
                raise TypeError(f"passes is {row['passes']!r}")
        contents.controls = value | {"judge": str(value["judge"]), "failed": dict(value["failed"])}
    except UserError as error:
        contents.notes.append(f"The judge's negative controls are left out: {CONTROLS} is damaged ({error.__cause__}).")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        contents.notes.append(
            f"The judge's negative controls are left out: {CONTROLS} is damaged ({type(error).__name__}: {error})."
        )


@dataclasses.dataclass(frozen=True)
class Change:
    """How one measure differs between two roles.

    Attributes:
      before, after: the rates.
      verdict: "up" or "down" where the paired 95 % interval lies above or below 0, else "overlap". Without a paired
        one: "up" or "down" where the roles' intervals are apart, "overlap" where not, "unknown" without intervals.
      paired: mean difference and its 95 % interval, task by task, where both roles' verdicts are known.
    """

    measure: str
    before: float
    after: float
    verdict: str
    paired: tuple[float, float, float] | None = None


def changes(contents: Contents, before: str, after: str) -> list[Change]:
    """What changed from role to role, for every measure that both have; [] if one of them is missing."""
    first, second = contents.row(before), contents.row(after)
    if first is None or second is None:
        return []
    found = []
    for measure in contents.measures.names:
        a, b = first.rates[measure], second.rates[measure]
        if a is None or b is None:
            continue
        verdict, pairs = "unknown", _paired(contents, before, after, measure)
        if pairs:
            verdict = "up" if pairs[1] > 0 else "down" if pairs[2] < 0 else "overlap"
        elif measure in first.intervals and measure in second.intervals:
            (low_a, high_a), (low_b, high_b) = first.intervals[measure], second.intervals[measure]
            verdict = "up" if low_b > high_a else "down" if high_b < low_a else "overlap"
        found.append(Change(measure, a, b, verdict, pairs))
    return found


def _paired(contents: Contents, before: str, after: str, measure: str) -> tuple[float, float, float] | None:
    if (before, after, measure) in contents.paired:
        return contents.paired[before, after, measure]  # over all noises
    first, second = contents.verdicts.get(before, {}), contents.verdicts.get(after, {})
    measures, sides = contents.measures, (first, second)
    questions = measures.questions
    both = [record for record in first if all(set(questions) <= set(side.get(record, ())) for side in sides)]
    if len(both) < 2:
        return None
    one, two = (np.array([[side[r][q] for q in questions] for r in both], np.float64) for side in sides)
    return score_difference(measures.values(two, measure), measures.values(one, measure))


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A config's leaves by their dotted names."""
    return list(
        itertools.chain.from_iterable(
            flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(f"{prefix}{name}", value)]
            for name, value in config.items()
        )
    )
