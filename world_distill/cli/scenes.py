"""`world-distill scenes`."""

import argparse

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError

SPLITS = ("train", "validation", "test")

HELP = """\
Draw scene images with the world that the config names.

Each image is a PNG; the same seed and split always give the same images. With pictures of your own, leave this out and
call annotate on them.

  world-distill scenes --config sandbox --out images/train --count 400
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--out", type=arguments.path, required=True, help="folder for the images")
    parser.add_argument("--count", type=arguments.COUNT, help="how many (default: config.scenes.SPLIT)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which stream of scenes (default: train)")
    arguments.add_seed(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill import build

    config = arguments.config_from(args, needs=("scenes",), verb="scenes")
    count = config.scenes[args.split] if args.count is None else args.count
    if not count:
        raise UserError(f"config.scenes.{args.split} is 0", remedy="say how many to draw", command="--count 400")
    make_scenes = build.make_partial(config, "scenes")
    paths = make_scenes(str(args.out), count, split=args.split, seed=config.seed)
    then = ("annotate", "--config", args.config, "--images", args.out, "--out", "data", "--name", args.split)
    console.finish(f"drew {len(paths)} images", args.out, then=[then])
    return 0
