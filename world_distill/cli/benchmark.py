"""`world-distill benchmark`."""

import argparse
import pathlib
import tempfile

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Measure the speed of rollout, Demonstrator, judge and update, and the loop's overhead.

Samples a second for each part at the config's sizes, and the share of a whole step that is none of them. Needs no
training run: records are made in a temporary folder.

  world-distill benchmark --config sandbox
  world-distill benchmark --config wan22_5b:mid --repeats 3 --json speed.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--repeats", type=arguments.COUNT, default=7, help="times that every part runs (default: 7)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.programs import benchmark

    config = arguments.config_from(args)
    with tempfile.TemporaryDirectory() as folder:
        result = benchmark.measure(config, pathlib.Path(folder), args.repeats)
    rows = result["rollouts_per_step"]
    console.say(f"{result['device']}, {rows} rollouts a step, median of {args.repeats}")
    for name, part in result["parts"].items():
        console.say(f"{name:>13}  {part['seconds']:8.3f} s  {part['samples_per_second']:8.1f} samples/s")
    console.say(f"{'whole step':>13}  {result['step_seconds']:8.3f} s  {rows / result['step_seconds']:8.1f} samples/s")
    if "pretraining" in result:
        base = result["pretraining"]
        console.say(f"{'pretraining':>13}  {base['seconds']:8.3f} s  {base['samples_per_second']:8.1f} samples/s")
    console.say(f"{'loop':>13}  {console.percent(result['overhead']):>9} of a step is none of the parts")
    console.finish("measured; nothing is kept but --json", *([args.json] if args.json else []))
    if args.json:
        atomic.write_json(args.json, result)
    return 0
