"""`world-distill probe`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

SAMPLE = 64  # tasks that are looked at by default

HELP = """\
Before training: have the judge compare the Demonstrator with the Executor on a sample of tasks.

Distillation can teach the Executor no more than the Demonstrator shows. So both make clips for the same tasks from the
same noise, the Demonstrator told the solution, the Executor (the base, or the LoRA file of config.executor.start) told
the task, each with its own guidance (config.demonstrator.guidance, config.rollout.guidance); and the config's judge
answers its questions about them. Shows how often it said yes and the mean log-odds, clipped as the reward clips them
(config.rollout.clip), for each question and each kind of task, with the paired difference and its 95 % interval; and
says in words whether the Demonstrator is better, and where it is not.

The sample is drawn by the seed, and a larger one has the smaller one's tasks. Answers go into the judgment cache of
WORKDIR, so that a call that was interrupted, or is repeated, asks nothing twice.

  world-distill probe --config sandbox --data runs/quickstart/data --workdir runs/probe
  world-distill probe --config wan22_5b --data data --limit 200 --clips 2 --workdir runs/wan --json probe.json
  world-distill probe --config wan22_5b --data data --keep train_better --clips 4 --workdir runs/wan

--keep NAME looks at all tasks and writes a record set without those on which the Demonstrator is not better: a task
stays if, averaged over its clips and over the questions, the Demonstrator's clipped log-odds are above the Executor's.
Equal counts as not better, as when both are sure to succeed. Tasks without an answer stay, and are counted. One clip
tells little about one task: take --clips 4 or more. To train on it: --config.train_set=NAME.

--controls N also makes negative controls of the Demonstrator's clips for the first N tasks, to which a sound judge says
no, and warns of each that passes (`world-distill judgments --help`).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    arguments.add_workdir(parser)
    parser.add_argument("--data", type=arguments.path, help="folder of the encoded records (default: config.data)")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    parser.add_argument(
        "--limit",
        type=arguments.LIMIT,
        help=f"tasks to look at; 0: all (default: {SAMPLE}, and all with --keep)",
    )
    parser.add_argument(
        "--clips", type=arguments.COUNT, default=1, help="clips a task, of each of the two (default: 1)"
    )
    parser.add_argument("--keep", metavar="NAME", help="write the tasks on which the Demonstrator is better")
    parser.add_argument(
        "--controls",
        metavar="N",
        type=arguments.LIMIT,
        default=0,
        help="tasks to make negative controls of (default: 0)",
    )
    arguments.add_seed(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.records.reader import EncodedRecord, RecordReader
    from world_distill.evaluation import controls
    from world_distill.evaluation.probe_figures import figures, table, words
    from world_distill.programs import probe

    config = arguments.config_from(args)
    folder = _check(args, args.data or (pathlib.Path(config.data) if config.data else None))
    reader = RecordReader(folder, args.name, EncodedRecord)
    limit = (0 if args.keep else SAMPLE) if args.limit is None else args.limit
    with arguments.progress_bar("clip") as show:
        probed, judged = probe.probe(
            config, reader, args.workdir, limit=limit, clips=args.clips, controls=args.controls, progress=show
        )
    found = {"data": str(reader.index_path), "seed": config.seed, **judged, **figures(probed)}
    console.say(table(found["rows"]) + "\n\n" + words(found))
    if found["invalid"]:
        console.say(f"{found['invalid']} of {found['tasks'] * found['clips']} pairs of clips have no judgment.")
    if args.controls:
        console.say("\n" + controls.text(found["controls"]))
    if args.keep:
        found["kept"] = probe.keep_better(probed, reader, folder, args.keep)
        console.say(", ".join(f"{name}: {count}" for name, count in found["kept"].items()))
    train = ["train", "--config", args.config, f"--config.data={folder}", "--workdir", args.workdir]
    if args.keep:
        train.insert(-2, f"--config.train_set={args.keep}")
    console.finish(f"compared {found['tasks']} tasks", *([args.json] if args.json else []), then=[train])
    if args.json:
        atomic.write_json(args.json, found)
    return 0


def _check(args: argparse.Namespace, folder: pathlib.Path | None) -> pathlib.Path:
    """The folder of the records. Raises UserError where it is not given, or flags do not go together."""
    if folder is None:
        raise UserError("--data is needed: the folder of the encoded records (`world-distill encode`)")
    if args.keep and args.limit:
        raise UserError("--keep looks at all tasks: leave --limit out")
    if args.keep == args.name:
        raise UserError(f"--keep {args.keep} would replace the records that are looked at: give another name")
    return folder
