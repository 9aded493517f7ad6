"""`world-distill reproduce`: the rows of the paper's table on one benchmark, over several seeds, at equal compute.

Every row is made by `demonstrate`, `train` and `evaluate` in a folder of its own, WORKDIR/runs/ROW/SEED, as its
commands would make it. What is finished there is read, what was begun goes on, and a row that fails is named and left
out.
`ablate` asks another question: it compares variants of the sandbox, from beginnings that they share, by claims.

Rows with the same seed share test tasks and starting noise, so their differences are paired by task, noise and seed. A
task that several seeds have is one case, whose clips are averaged. The interval over seeds says how much another
training run would change.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from world_distill import build, console
from world_distill.core.measures import Measures
from world_distill.core.metrics import student_interval
from world_distill.data.records.reader import EncodedRecord, RecordReader
from world_distill.devices import hosts
from world_distill.errors import UserError
from world_distill.evaluation import comparison, worldtasks
from world_distill.evaluation.scoring import Verdict, breakdown, markdown, summarise
from world_distill.programs import demonstrate, evaluate, prepare, train
from world_distill.programs.paper_rows import Run, Study, count_records, make_runs
from world_distill.reports import paper_table
from world_distill.settings.loading import diff
from world_distill.storage import atomic
from world_distill.training import run_folder
from world_distill.weights import base_model

RESULTS, PAGE = paper_table.RESULTS, paper_table.PAGE


def reproduce(study: Study) -> dict[str, Any]:
    """Makes every run that is not finished, and compares the rows; writes reproduce.json, reproduce.md and PAGE.

    Returns:
      rows (pooled over seeds), by_seed, paired (differences with intervals over cases, and over seeds where there are
      several), by_kind, failed (row, seed and why) and commands (by row and seed).

    Raises:
      UserError: see `make_runs`; no records to score; or no row could be made.
    """
    runs = make_runs(study)
    if not count_records(runs[0].config, study.split):  # before hours of training
        raise UserError(
            f"{runs[0].config.data} has no records {study.split!r} to score: "
            f"`world-distill import-tasks --bench --name {study.split}` and `encode --name {study.split}` make them"
        )
    found: dict[str, dict[int, dict[str, Any]]] = collections.defaultdict(dict)
    failed = []
    build.start_devices(runs[0].config)
    known = [finished(run, study) for run in runs]
    hosts.agree("list of finished runs", str([scores is not None for scores in known]))
    for number, (run, scores) in enumerate(zip(runs, known, strict=True), 1):
        name = f"run {number}/{len(runs)}: {run.row}, seed {run.seed}"
        try:
            if scores is not None:
                console.say(f"{name}: there already")
                if hosts.is_main() and not (run.folder / "evaluation.html").is_file():  # killed before its last file
                    evaluate.write(run.folder, scores)
            else:
                console.say(name + (f", {run.steps} steps" if run.trains else ""))
                scores = _make(run, study)
            found[run.row][run.seed] = scores
        except Exception as error:
            # Others of the job would wait for this process; and a job that was told to stop is to stop.
            if jax.process_count() > 1 or getattr(error, "exit_code", None) is not None:
                raise
            logging.info("%s", name, exc_info=True)
            why = str(error) if isinstance(error, (UserError, ValueError, OSError)) else ""
            failed.append({"row": run.row, "seed": run.seed, "why": why or f"{type(error).__name__}: {error}"})
            console.warn(f"{name} failed, and is left out: {failed[-1]['why']}")
    if not found:
        raise UserError(f"no row could be made; the first failed with: {failed[0]['why']}")
    result = compare(study, runs, found) | {"failed": failed}
    if hosts.is_main():
        atomic.write_json(study.workdir / RESULTS, result)
        atomic.write_text(study.workdir / "reproduce.md", tables(result) + "\n")
        paper_table.build(study.workdir)
    return result


def _make(run: Run, study: Study) -> dict[str, Any]:
    """Trains and scores a run, or goes on with it; what `evaluate` returns."""
    if base_model.base_path(build.make_family(run.config), run.config.base) is None:
        raise UserError(
            f"its weights are not named: --config.base does for all rows, --row {run.row}.base for this one"
        )
    if run.makes_records:
        prepare.make_records(run.config, pathlib.Path(run.config.data), say=console.say)
    if run.shown is not None:
        name, by = run.shown
        reader = RecordReader(pathlib.Path(by.config.data), by.config.train_set, EncodedRecord)
        with console.Progress("clip", shown=hosts.is_main()) as progress:
            demonstrate.demonstrate(
                by.config, reader, pathlib.Path(by.config.data), name=name, shards=by.shards,
                progress=progress.at,
            )  # fmt: skip
    if run.trains:
        train.train(run.config, run.folder)
    result = evaluate.evaluate(
        run.folder, config=None if run.trains else run.config, roles=(run.role,), split=study.split,
        limit=study.limit, noises=study.noises, clips=evaluate.KEPT_TASKS,
    )  # fmt: skip
    if hosts.is_main():
        evaluate.write(run.folder, result)
    return json.loads(json.dumps(result))  # as it is read again


def finished(run: Run, study: Study) -> dict[str, Any] | None:
    """What `evaluate` wrote of this very run, benchmark and number of clips; None where it wrote nothing such."""
    path = run.folder / "evaluation.json"
    if not path.is_file() or not (run.folder / "config.json").is_file():
        return None
    changed = [line.partition(":")[0] for line in diff(run_folder.read_config(run.folder), run.config)]
    if any(not run_folder.is_free(key) or key.partition(".")[0] == "benchmark" for key in changed):
        return None
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        clips = scores["verdicts"].get(run.role, ())
        if (scores["step"], scores["split"], scores.get("noises", 1)) != (run.steps, study.split, study.noises):
            return None
        count = len(RecordReader(pathlib.Path(run.config.data), study.split))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None
    return scores if len(clips) == study.noises * min(study.limit or count, count) else None


# ---- Comparing


def compare(study: Study, runs: Sequence[Run], found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """The table, from what `evaluate` returned for each row and seed.

    Raises:
      UserError: rows were scored on different questions.
    """
    scored = [scores for by_seed in found.values() for scores in by_seed.values()]
    if len({Measures.of(scores) for scores in scored}) > 1:
        raise UserError(f"{study.workdir}: rows were scored on different questions; take another --workdir")
    measures, about = Measures.of(scored[0]), scored[0].get("benchmark")
    first = {run.row: run for run in reversed(runs) if run.row in found}  # in the order of rows
    order = [name for name in dict.fromkeys(run.row for run in runs) if name in found]
    verdicts = {name: {seed: _verdicts(first[name], found[name][seed]) for seed in found[name]} for name in order}
    joined = {name: _joined(by_seed, study) for name, by_seed in verdicts.items()}
    result = {
        "config": study.config, "seeds": list(study.seeds), "split": study.split, "noises": study.noises,
        "rows": [
            summarise(name, joined[name], measures)
            | {"steps": first[name].steps, "role": first[name].role, "seeds": list(verdicts[name])}
            for name in order
        ],
        "by_seed": [
            summarise(name, clips, measures) | {"seed": seed}
            for name in order
            for seed, clips in verdicts[name].items()
        ],
        "paired": [
            {"before": one, "after": other} | entry
            for one, other in _pairs([first[name] for name in order])
            for entry in _paired(verdicts[one], verdicts[other], study, measures)
        ],
        "by_kind": [row for name in order for row in breakdown(name, joined[name], "kind", measures)],
        "commands": [
            {"row": run.row, "seed": run.seed, "calls": [console.command(*call) for call in run.calls(study)]}
            for run in runs
        ],
    }  # fmt: skip
    return result | ({"benchmark": about} if about else {})


def _verdicts(run: Run, scores: Mapping[str, Any]) -> list[Verdict]:
    return [Verdict.from_json(verdict) for verdict in scores["verdicts"][run.role]]


def _joined(by_seed: Mapping[int, Sequence[Verdict]], study: Study) -> list[Verdict]:
    """The verdicts of all seeds. A task that several seeds have is one case: their clips are more noises of it."""
    first = {seed: study.noises * number for number, seed in enumerate(study.seeds)}
    return [
        dataclasses.replace(verdict, noise=first[seed] + verdict.noise)
        for seed, verdicts in by_seed.items()
        for verdict in verdicts
    ]


def _pairs(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(before, after): untrained rows and what may be above them; then the other trained rows and the reference."""
    names = {role: [run.row for run in runs if run.role == role] for role in ("base", "demonstrator", "executor")}
    trained = names["executor"]
    found = [(base, other) for base in names["base"] for other in (*names["demonstrator"], *trained)]
    found += [(shown, other) for shown in names["demonstrator"] for other in trained]
    reference = [run.row for run in runs if run.is_reference]
    return found + [(other, above) for above in reference for other in trained if other != above]


def _paired(
    before: Mapping[int, Sequence[Verdict]], after: Mapping[int, Sequence[Verdict]], study: Study, measures: Measures
) -> list[dict[str, Any]]:
    """`comparison.paired` over the seeds that both rows have, each entry with `by_seed` and their `ci95_seeds`."""
    seeds = [seed for seed in before if seed in after]
    entries = comparison.paired(
        _joined({seed: before[seed] for seed in seeds}, study), _joined({seed: after[seed] for seed in seeds}, study),
        measures,
    )  # fmt: skip
    each = [comparison.paired(before[seed], after[seed], measures) for seed in seeds]
    for number, entry in enumerate(entries):
        values = [found[number]["difference"] for found in each if found]
        entry |= {"by_seed": values, "seeds": len(values)}
        if len(values) > 1:
            mean, low, high = student_interval(np.array(values))
            entry |= {"mean_of_seeds": mean, "ci95_seeds": [low, high]}
    return entries


# ---- Tables


def tables(result: Mapping[str, Any], kinds: bool = True) -> str:
    """The table, paired differences, the paper's figures where they are of this benchmark, failures and commands.

    With `kinds`, the rates by kind of task, too.
    """
    measures, about = Measures.of(result), result.get("benchmark") or {}
    rows = [row | {"steps": row["steps"] or "–", "seeds": len(row["seeds"])} for row in result["rows"]]
    found = [markdown(rows, first=("name", "steps", "seeds"), measures=measures)]
    if result["paired"]:
        found += ["Differences, with 95 % intervals over cases:", comparison.paired_table(result["paired"], measures)]
        over_seeds = [
            entry | {"difference": entry["mean_of_seeds"], "ci95": entry["ci95_seeds"], "n": entry["seeds"]}
            for entry in result["paired"]
            if "ci95_seeds" in entry
        ]
        if over_seeds:
            found += ["The same, with 95 % intervals over seeds:", comparison.paired_table(over_seeds, measures)]
    if about.get("paper"):
        found.append(worldtasks.paper_table(result["rows"], about["paper"], measures))
    found += [f"{line['row']}, seed {line['seed']}, failed: {line['why']}" for line in result["failed"]]
    if kinds:
        found.append(markdown(result["by_kind"], first=("group", "name"), measures=measures))
    return "\n\n".join([*found, _commands(result)])


def _commands(result: Mapping[str, Any]) -> str:
    """The calls that make each row alone, as a Markdown block."""
    lines = [f"# {line['row']}, seed {line['seed']}\n" + "\n".join(line["calls"]) for line in result["commands"]]
    return "```sh\n" + "\n".join(lines) + "\n```"
