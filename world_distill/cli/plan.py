"""`world-distill plan`."""

import argparse
from collections.abc import Mapping
from typing import Any

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

LOCAL = "local"  # in place of a topology: the devices of this machine

HELP = """\
Compile every phase of a training step for a TPU slice, without having one (or for this machine's GPUs), and say
whether it fits.

Phases: the rollout, the Demonstrator's velocities, the update, the decoding of clips and the encoding of scenes. For
each: memory a chip (what the program needs and what lies beside it) against what the chip has, compile time,
operations and collectives. For a TPU also cycles by what they are spent on, as its compiler estimates them, and from
these a range of seconds; --explain names the most expensive instructions and the lines of code that made them. For a
GPU a time from its peak at --utilisation. Needs the extra `tpu` (for its compiler); weights are never made.
Ends with exit code 1 if a phase does not fit, and names the largest arrays.

  world-distill plan --config wan22_5b:wmsd --topology v5p:2x2x1
  world-distill plan --config wan22_5b:wmsd --topology v5p:2x2x1 --phases update --explain
  world-distill plan --config wan22_5b:wmsd --topology v5e:4x4 --slices 2 --config.mesh.data=2
  world-distill plan --config wan22_5b:wmsd --topology v6e:2x4 --search
  world-distill plan --config wan22_5b:wmsd --topology local                # on a machine with GPUs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--topology", required=True,
        help=f"generation and chips, such as v5e:2x4, v5p:4x4x4, v6e:8x8; {LOCAL}: this machine's devices (GPUs)",
    )  # fmt: skip
    parser.add_argument(
        "--slices",
        type=arguments.COUNT,
        default=1,
        help="slices of that topology, joined by DCN (default: 1)",
    )
    parser.add_argument(
        "--utilisation",
        type=arguments.PART,
        help=f"share of the peak that times assume for --topology {LOCAL} (0.4); on TPUs its compiler says",
    )
    parser.add_argument("--explain", action="store_true", help="the most expensive instructions of each phase")
    parser.add_argument("--phases", default="", help="only these, comma-separated (and those that they need)")
    parser.add_argument("--search", action="store_true", help="try mesh shapes, micro-batches and remat policies")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.devices import chips
    from world_distill.programs import plan, plan_text

    if args.explain and args.search:
        raise UserError("--explain is of one plan, --search of many: run plan again with the settings that it finds")
    utilisation = plan.UTILISATION if args.utilisation is None else args.utilisation
    config = arguments.config_from(args)
    devices = plan.topology(args.topology, args.slices)
    chip = chips.chip(devices[0].device_kind)
    if args.utilisation is not None and chip and chip.ghz:
        raise UserError(f"--utilisation {args.utilisation:g}: the compiler for {chip.name} says the cycles")
    only = arguments.chosen("--phases", args.phases, plan.PHASES)
    if args.search:
        result = plan.search(config, devices, only, utilisation, say=console.say)
    else:
        phases = plan.make_plan(config, devices, only, say=console.say)
        result = plan.summary(config, devices, phases, utilisation)
        for line in plan_text.describe(result, explain=args.explain):
            console.say(line)
    _finish(args, result)
    if args.json:
        atomic.write_json(args.json, result)
    return 0 if result["fits"] else 1


def _finish(args: argparse.Namespace, result: dict) -> None:
    where = [args.json] if args.json else []
    train = ("train", "--config", args.config, *_flags(args.overrides), "--workdir", "runs/mine")
    if args.search and result["fits"]:
        train = (*train[:-2], *_flags(result["tried"][-1]["change"]), *train[-2:])
    again = ("plan", "--config", args.config, *_flags(args.overrides), "--topology", args.topology, "--search")
    then = [train] if result["fits"] else [] if args.search else [again]
    console.finish(f"planned {args.config} for {args.topology}", *where, then=then)


def _flags(changes: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in changes.items()]
