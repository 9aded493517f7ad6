"""`world-distill evaluate`: the benchmark's rates for the roles of a run (protocol of WorldTasks-Bench)."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from world_distill import build, console
from world_distill.core.measures import Measures
from world_distill.data.records.fit import check_fit
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.devices import hosts
from world_distill.errors import UserError
from world_distill.evaluation import comparison, dreamgen, held_out, worldtasks
from world_distill.evaluation.scoring import NAMES, Verdict, breakdown, markdown, summarise
from world_distill.interfaces import Benchmark
from world_distill.reports import report, run_data
from world_distill.reports.kept_clips import KeptClips
from world_distill.storage import atomic
from world_distill.training import run_folder
from world_distill.weights import base_model

ROLES = ("base", "demonstrator", "executor")
RESULTS = ("evaluation.json", "results.json")  # of a folder, by `evaluate` and by `quickstart`
CLIPS = run_data.RESULTS["evaluation.json"]  # folder of the clips that are kept, in that of the run
KEPT_TASKS = 200  # of which the verb keeps clips if it is not told how many

Keep = Callable[[str, str, np.ndarray], None]


def evaluate(
    workdir: pathlib.Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    config: Any = None,
    roles: Sequence[str] = (),
    split: str = "test",
    limit: int = 0,
    noises: int = 1,
    against: Mapping[str, pathlib.Path] | None = None,
    export_clips: pathlib.Path | None = None,
    clips: int | None = 0,
) -> dict[str, Any]:
    """Scores the roles of a run's folder; returns rows, breakdowns, held-out figures and verdicts.

    Args:
      workdir: the run's folder.
      overrides: changes to settings that may change after training (`run_folder.FREE_KEYS`).
      config: of a folder that holds no run: its base and Demonstrator are scored, and nothing is trained.
      roles: which of `ROLES`. Empty: those that there are, without an Executor before any training, and without the
        Demonstrator where records have no solutions.
      split: record set to score on.
      limit: look at the first tasks only; 0 looks at all.
      noises: clips of each task, each from another noise.
      against: by name, folders or files of other evaluations, which are compared with this one case by case.
      export_clips: folder for the clips as MP4, as the scripts of DreamGen Bench read them.
      clips: tasks, evenly over the record set, whose clips are kept in `CLIPS` of the run's folder; None keeps all.

    Raises:
      UserError: the folder holds no run, names no benchmark, or an override is of another value.
      RecordError: the records are missing or damaged.
    """
    others = {name: read_results(path) for name, path in (against or {}).items()}
    config = run_folder.run_config(workdir, overrides, config)
    build.start_devices(config)
    with contextlib.ExitStack() as stack:
        # The quick things first: the weights of the base take minutes.
        reader = _records(run_folder.data_folder(config, workdir), split)
        benchmark = stack.enter_context(run_folder.open_benchmark(config, workdir))
        for name, other in others.items():
            _check_questions(name, other, benchmark)
        audit = stack.enter_context(run_folder.open_held_out(config, workdir))
        fps = build.make_family(config).fps
        exported = dreamgen.ClipFolder(export_clips, fps) if export_clips and hosts.is_main() else None
        kept = None
        if hosts.is_main():
            numbers = _spread(min(limit or len(reader), len(reader)), clips)
            kept = stack.enter_context(KeptClips(workdir / CLIPS, reader, numbers, fps))
        opened = run_folder.open_run(workdir, config=config)
        roles = roles or _there(opened, reader, limit)
        if opened.executor is None and "executor" in roles:
            raise UserError(f"{workdir} holds no trained Executor; --roles base scores the untrained model")
        progress = stack.enter_context(console.Progress("clip", shown=hosts.is_main()))
        result = evaluate_roles(
            opened, roles=roles, split=split, limit=limit, noises=noises, audit=audit, benchmark=benchmark,
            keep=_keeping(exported, kept, reader) if export_clips or clips != 0 else None, progress=progress.at,
        )  # fmt: skip
        if kept is not None and (count := kept.finish()):
            result["clips"] = count
    if exported is not None:
        exported.finish(result, benchmark.questions)
    return result | ({"against": _against(result, others)} if others else {})


def _records(folder: pathlib.Path, split: str) -> RecordReader:
    try:
        return RecordReader(folder, split)
    except RecordError as error:
        raise RecordError(
            f"{error}. --split names another set; `world-distill encode --test 0.02` splits one off, and"
            " `encode --name test` makes one of records of its own"
        ) from error


def _there(opened: run_folder.Run, reader: RecordReader, limit: int) -> tuple[str, ...]:
    """The roles that can be scored."""
    heads = reader.heads().take(range(min(limit or len(reader), len(reader))))
    told = all(characters > len(task) for task, characters in zip(heads.task, heads.characters, strict=True))
    left = {"executor": opened.executor is not None, "demonstrator": told}
    if not left["demonstrator"]:
        console.say("the Demonstrator is left out: there are tasks without a solution to tell it")
    if not left["executor"]:
        console.say("the Executor is left out: nothing is trained yet")
    return tuple(role for role in ROLES if left.get(role, True))


def _spread(count: int, most: int | None) -> Sequence[int]:
    """At most `most` of the numbers below `count`, evenly from the first to the last."""
    if most is None or most >= count:
        return range(count)
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


def _keeping(folder: dreamgen.ClipFolder | None, kept: KeptClips | None, reader: RecordReader) -> Keep:
    """Writes each clip of a record into the folders, on the process that has them."""
    heads = reader.heads()
    known = dict(zip(heads.id, zip(heads.task, heads.agent, heads.kind, strict=True), strict=True))

    def keep(role: str, record: str, clip: np.ndarray) -> None:
        if folder is not None:
            folder.write(role, record, *known[record], clip)
        if kept is not None:
            kept.keep(role, record, clip)

    return keep


def evaluate_roles(
    opened: run_folder.Run,
    *,
    roles: Sequence[str],
    split: str,
    limit: int = 0,
    noises: int = 1,
    keep: Keep | None = None,
    audit: held_out.HeldOut | None = None,
    benchmark: Benchmark | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Rows and breakdowns for each role of an opened run (`run_folder.open_run`).

    `keep(role, record id, clip)` sees every first clip of a task, and `audit` every clip; its figures are in `held_out`
    by role, with gaps against the first one. `benchmark` is one of `run_folder.open_benchmark`; None makes the
    config's, without a memory. `progress(done, all)` is called with numbers of clips.
    """
    config = opened.config
    reader = RecordReader(opened.data, split)
    check_fit(reader, opened.family, base_model.origin(config.base))
    scorer: Benchmark = benchmark or build.make(config, "benchmark")
    measures = Measures(tuple(scorer.questions))
    evaluator = opened.evaluator(scorer)
    verdicts: dict[str, list[Verdict]] = {}
    audited: dict[str, dict[str, float]] = {}
    for number, role in enumerate(roles):
        seen = None if keep is None else (lambda record, clip, role=role: keep(role, record, clip))
        shown = None if progress is None else (lambda n, of, k=number: progress(k * of + n, len(roles) * of))
        verdicts[role] = evaluator.run(
            reader,
            opened.base,
            opened.executor if role == "executor" else None,
            text="solution" if role == "demonstrator" else "task",
            limit=limit,
            noises=noises,
            keep=seen,
            watch=audit and audit.watch,
            progress=shown,
        )
        if audit is not None:
            audited[role] = audit.take(next(iter(audited.values()), None))
    return {
        "split": split,
        "seed": config.seed,
        "step": opened.step,
        "rows": [summarise(role, verdicts[role], measures) for role in roles],
        "by_kind": [row for role in roles for row in breakdown(role, verdicts[role], "kind", measures)],
        "by_agent": [row for role in roles for row in breakdown(role, verdicts[role], "agent", measures)],
        "held_out": audited,
        "verdicts": {role: [v.to_json() for v in verdicts[role]] for role in roles},
    } | _more(scorer, measures, verdicts, noises)


def _more(
    benchmark: Benchmark, measures: Measures, verdicts: Mapping[str, Sequence[Verdict]], noises: int
) -> dict[str, Any]:
    """What results hold of benchmarks that describe themselves, or that have other questions than the usual ones."""
    found: dict[str, Any] = {"noises": noises} if noises > 1 else {}
    described = getattr(benchmark, "describe", dict)()
    if not described and measures == Measures():
        return found
    about = {"name": benchmark.name, "questions": list(measures.questions)} | described
    labels = list(getattr(benchmark, "judges", ()))
    return found | {
        "benchmark": about,
        "paired": comparison.paired_roles(verdicts, measures),
        "judges": comparison.judges(verdicts, labels, measures),
        "agreement": comparison.agreement(verdicts, labels, measures),
    }


# ---- Beside other evaluations


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """What an evaluation has written: a file, or the one of a run's folder.

    Raises:
      UserError: there is none.
    """
    path = pathlib.Path(path)
    found = [path] if path.is_file() else [path / name for name in RESULTS if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} holds no evaluation ({' or '.join(RESULTS)}); `world-distill evaluate` writes it")
    try:
        result = json.loads(found[0].read_text(encoding="utf-8"))
        verdicts = {role: [Verdict.from_json(v) for v in clips] for role, clips in result["verdicts"].items()}
        return result | {"verdicts": verdicts}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{found[0]} is no evaluation ({type(error).__name__}: {error})") from error


def _check_questions(name: str, other: Mapping[str, Any], benchmark: Benchmark) -> None:
    """Raises UserError where another evaluation's benchmark has other questions."""
    theirs, ours = Measures.of(other).questions, tuple(benchmark.questions)
    if theirs != ours:
        raise UserError(f"--against {name}: its benchmark asks {', '.join(theirs)}, and this one {', '.join(ours)}")


def _against(result: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of other evaluations, and how this one's roles differ from theirs. What makes them unlike is warned of."""
    measures = Measures.of(result)
    mine = {role: [Verdict.from_json(v) for v in clips] for role, clips in result["verdicts"].items()}
    rows, differences = [], []
    for name, other in others.items():
        if _asked(other) != _asked(result):
            console.warn(f"{name} was scored by another benchmark: {_asked(other)}, here {_asked(result)}")
        if other.get("seed") != result["seed"]:
            console.warn(f"{name} began from other noise (seed {other.get('seed')}, here {result['seed']})")
        rows += [row | {"name": f"{name}: {row['name']}"} for row in other["rows"]]
        for role in (role for role in mine if role in other["verdicts"]):
            found = comparison.paired(other["verdicts"][role], mine[role], measures)
            if not found:
                console.warn(f"{name} has no clip of {role} in common with this evaluation")
            differences += [{"before": f"{name}: {role}", "after": role} | entry for entry in found]
    return {"rows": rows, "paired": differences}


def _asked(result: Mapping[str, Any]) -> str:
    return (result.get("benchmark") or {}).get("name", "the sandbox's checker")


# ---- Tables and files


def tables(result: Mapping[str, Any]) -> str:
    """The figures of `evaluate` as Markdown: all tasks, by kind, by agent, and the held-out judge's.

    Then what the benchmark has beyond: paired differences, the paper's form, its judges.
    """
    measures, about = Measures.of(result), result.get("benchmark") or {}
    found = [markdown(result["rows"], measures=measures), *_left_out(result)]
    for by in ("kind", "agent"):
        found.append(markdown(result[f"by_{by}"], first=("group", "name"), measures=measures))
    if result["held_out"]:
        found.append(held_out.markdown(result["held_out"]))
    if result.get("paired"):
        found.append(comparison.paired_table(result["paired"], measures))
    if against := result.get("against"):
        found.append(markdown(against["rows"], measures=measures))
        found.append(comparison.paired_table(against["paired"], measures))
    if about.get("paper"):
        found.append(worldtasks.paper_table(result["rows"], about["paper"], measures))
    if about.get("paper_groups"):
        found.append(worldtasks.paper_groups(about["paper_groups"], measures.headline))
    if about.get("paper_splits"):
        found.append(dreamgen.split_table(result["by_kind"], about["paper_splits"], measures.headline))
    if result.get("judges"):
        found.append(comparison.judges_table(result["judges"]))
    if result.get("agreement"):
        found.append(comparison.agreement_table(result["agreement"]))
    return "\n\n".join(found)


def _left_out(result: Mapping[str, Any]) -> list[str]:
    """A line for each role with clips that the benchmark could not judge."""
    lines = []
    for row in (row for row in result["rows"] if row["invalid"]):
        verdicts = map(Verdict.from_json, result["verdicts"][row["name"]])
        ids = [verdict.id for verdict in verdicts if not np.isfinite(list(verdict.scores.values())).all()]
        some = ", ".join(list(dict.fromkeys(ids))[:5]) + ", …" * (len(set(ids)) > 5)
        name = NAMES.get(row["name"], row["name"])
        lines.append(f"{name}: {row['invalid']} clips have no verdict and are left out ({some}).")
    return lines


def write(workdir: pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path:
    """Writes evaluation.json, evaluation.md and evaluation.html into the run's folder; returns the page's path."""
    atomic.write_json(workdir / "evaluation.json", result)
    atomic.write_text(workdir / "evaluation.md", tables(result) + "\n")
    return report.build(workdir, workdir / "evaluation.html", source="evaluation.json")
