"""`world-distill scenes`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments

SPLITS = ("train", "validation", "test")

HELP = """\
Draw scene images with the world that the config names.

Each image is a PNG; the same seed and split always give the same images. With pictures of your own, leave this out and
call annotate on them.

  world-distill scenes --config sandbox --out images/train --count 400
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the images")
    parser.add_argument("--count", type=int, help="how many (default: config.scenes.SPLIT)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which stream of scenes (default: train)")
    arguments.add_seed(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill import build

    config = arguments.config_from(args)
    count = config.scenes[args.split] if args.count is None else args.count
    make_scenes = build.make_partial(config, "scenes")
    paths = make_scenes(str(args.out), count, split=args.split, seed=config.seed)
    console.say(
        f"wrote {len(paths)} images to {args.out}; next: world-distill annotate --config {args.config}"
        f" --images {args.out} --out data"
    )
    return 0
