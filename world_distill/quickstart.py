"""`world-distill quickstart`: the whole method, from nothing to a table and a report, on a laptop CPU.

Nothing here is special to it: the stages are those of the other verbs, on one config and in one folder.
"""

import argparse
import json
import pathlib
import time

from world_distill import arguments, prepare, report, runs, train
from world_distill.data.records import RecordReader
from world_distill.evaluate import ROLES, evaluate_roles
from world_distill.report_data import clip_path
from world_distill.scoring import markdown
from world_distill.video_io import save_strip

HELP = """\
Run the whole method in a small world: draw scenes, have an oracle write tasks and solutions for them, train an Executor
by self-distillation and RL from the oracle's judgments, and compare it with the base model and the Demonstrator on
held-out tasks.

Takes a few minutes on two CPU cores, with no network and no accelerator. Ends with a table (results.json) and a page to
look at (report.html) in WORKDIR. Interrupt it and call it again: it continues where it stopped. --seed changes scenes,
tasks and training; the held-out scenes are in no training or tuning set.

  world-distill quickstart
  world-distill quickstart --seed 1 --workdir runs/second
"""

CLIPS = 24  # test tasks whose clips are kept for the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    arguments.add_workdir(parser, default="runs/quickstart")
    arguments.add_seed(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    results = quickstart(arguments.config_from(args), args.workdir)
    if args.json:
        arguments.write_json(args.json, results)
    return 0


def quickstart(config, workdir: pathlib.Path) -> dict:
    """Runs (or continues) all stages in `workdir`; returns what is in its results.json."""
    started = time.perf_counter()

    def stage(number: int, text: str) -> None:
        arguments.say(f"[{time.perf_counter() - started:5.0f} s] {number}/4 {text}")

    stage(1, "scenes, tasks and solutions")
    runs.check_folder(config, workdir)
    prepare.make_records(config, runs.data_folder(config, workdir), say=arguments.say)
    stage(2, f"training: {config.steps} steps")
    train.train(config, workdir)
    stage(3, "held-out tasks: base, Demonstrator, Executor")
    results = score(workdir)
    stage(4, "report")
    page = report.build(workdir)
    arguments.say("\n" + markdown(results["rows"]) + "\n")
    arguments.say(f"{workdir / 'results.json'}\n{page}\n{time.perf_counter() - started:.0f} s in all")
    return results


def score(workdir: pathlib.Path) -> dict:
    """Scores every role on the test tasks, keeps some clips, and writes results.json; reads it where it is there."""
    opened = runs.open_run(workdir)
    path = workdir / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
        if results.get("step") == opened.step:
            return results
    reader = RecordReader(opened.data, "test")
    stride = max(1, len(reader) // CLIPS)
    shown = {}
    for index in range(0, len(reader), stride):
        record = reader[index]
        shown[record.id] = {name: getattr(record, name) for name in ("id", "task", "solution", "agent", "kind")}
        shown[record.id]["fps"] = opened.family.fps

    def keep(role, record, clip):
        if record in shown:
            save_strip(clip_path(workdir, role, record), clip)

    results = evaluate_roles(opened, roles=ROLES, split="test", keep=keep)
    arguments.write_json(workdir / "clips" / "clips.json", list(shown.values()))
    arguments.write_json(path, results)
    return json.loads(path.read_text())
