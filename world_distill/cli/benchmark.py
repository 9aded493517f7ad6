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
    predicted = result.get("predicted", {})
    for name, part in result["parts"].items():
        _say(name, part["seconds"], part["samples_per_second"], predicted.get(name))
    _say("whole step", result["step_seconds"], rows / result["step_seconds"], result.get("predicted_step"))
    if "pretraining" in result:
        base = result["pretraining"]
        _say("pretraining", base["seconds"], base["samples_per_second"])
    console.say(f"{'loop':>13}  {console.percent(result['overhead']):>9} of a step is none of the parts")
    console.finish("measured; nothing is kept but --json", *([args.json] if args.json else []))
    if args.json:
        atomic.write_json(args.json, result)
    return 0


def _say(name: str, seconds: float, rate: float, predicted: tuple[float, float] | None = None) -> None:
    more = f"  predicted {predicted[0]:.3g} to {predicted[1]:.3g} s" if predicted else ""
    console.say(f"{name:>13}  {seconds:8.3f} s  {rate:8.1f} samples/s{more}")
