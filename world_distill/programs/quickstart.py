"""`world-distill quickstart`: the whole method, from nothing to a table and a report, on a laptop CPU.

Nothing here is special to it: the stages are those of the other verbs, on one config and in one folder.
"""

import json
import pathlib
import time

from world_distill import build, console
from world_distill.core.measures import Measures
from world_distill.data.records.reader import RecordReader
from world_distill.errors import UserError
from world_distill.evaluation.scoring import markdown
from world_distill.programs import prepare, train
from world_distill.programs.evaluate import ROLES, evaluate_roles
from world_distill.reports import report, run_data
from world_distill.reports.kept_clips import KeptClips
from world_distill.storage import atomic
from world_distill.training import run_folder
from world_distill.weights import base_model

CLIPS = 24  # test tasks whose clips are kept for the report


def quickstart(config, workdir: pathlib.Path) -> dict:
    """Runs (or continues) all stages in `workdir`; returns what is in its results.json."""
    started = time.perf_counter()

    def stage(number: int, text: str) -> None:
        console.say(f"[{time.perf_counter() - started:5.0f} s] {number}/4 {text}")

    stage(1, "scenes, tasks and solutions")
    run_folder.check_folder(config, workdir)
    base = base_model.base_path(build.make_family(config), config.base)
    if base and base != base_model.RANDOM and not pathlib.Path(base).exists():
        raise UserError(f"there is no {base}: --config.base names the base's weights")
    run_folder.claim_folder(config, workdir)
    prepare.make_records(config, run_folder.data_folder(config, workdir), say=console.say)
    stage(2, f"training: {config.steps} steps")
    train.train(config, workdir)
    stage(3, "held-out tasks: base, Demonstrator, Executor")
    results = score(workdir)
    stage(4, "report")
    report.build(workdir)
    console.say("\n" + markdown(results["rows"], measures=Measures.of(results)) + "\n")
    console.say(f"{console.duration(time.perf_counter() - started)} in all")
    return results


def score(workdir: pathlib.Path) -> dict:
    """Scores every role on the test tasks, keeps some clips, and writes results.json; reads it where it is there."""
    opened = run_folder.open_run(workdir)
    path = workdir / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
        if results.get("step") == opened.step:
            return results
    reader = RecordReader(opened.data, "test")
    shown = range(0, len(reader), max(1, len(reader) // CLIPS))
    with (
        KeptClips(workdir / run_data.RESULTS[path.name], reader, shown, opened.family.fps) as kept,
        run_folder.open_benchmark(opened.config, workdir) as benchmark,
    ):
        results = evaluate_roles(opened, roles=ROLES, split="test", keep=kept.keep, benchmark=benchmark)
        kept.finish()
    atomic.write_json(path, results)
    return json.loads(path.read_text())
