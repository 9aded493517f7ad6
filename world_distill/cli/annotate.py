"""`world-distill annotate`."""

import argparse
import dataclasses
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Have the config's annotator write tasks and solutions for images.

--images is a folder, a file, a glob pattern in quotes (braces too: 'set-{000..012}.tar'), or an address of fsspec
(gs://, s3://, hf://). Read are pictures, archives such as webdatasets (tar, compressed or not, zip), Parquet, Arrow
(`save_to_disk`), a text with a path a line, and rows of JSONL, JSON and CSV: a row's image is in `image`, `file_name`,
`path` or the like, in the folder of the file or in --image-root. Its other fields, those of metadata.* in a folder,
and a .txt or .json beside a picture go into the records as the image's source (`licence` counts as the image's
licence). The last line says what was not used, and why.

Images are looked at first. config.filters says which are left out, for being small, dark, bright, flat, blurred or
nearly the same as an earlier one; each is listed with the reason in NAME_annotated.rejected.jsonl, and counted. The
rest is shrunk to --max-side, shown to the annotator, and kept like that in the records.

Answers are kept in a journal as they come: called again after an interruption, it asks about no image twice, and about
those that the annotator failed on. Writes NAME_annotated records and a data card with all counts into the folder OUT.

Several machines that share the folder and the images do a part each with --shard I/N, I from 0 to N - 1; the last of
them to finish makes the set whole. All look at the images before their part too, so that near-duplicates are the same
as without parts.

  world-distill annotate --config sandbox --images 'images/train/*.png' --out data --name train
  world-distill annotate --config wan22_5b --images 'photos-{000..063}.tar' --out data --shard 0/4   # 1/4 ... elsewhere
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--images", required=True, help="folder, file, glob pattern in quotes, or address")
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="folder of the pictures that rows name (default: that of the rows)"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the records")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    parser.add_argument("--pairs", type=int, help="tasks an image, at most (default: config.annotator.pairs)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shards", type=int, default=1, help="files to spread the records over (default: 1)")
    which.add_argument("--shard", metavar="I/N", help="do part I (from 0) of N only")
    parser.add_argument(
        "--max-side", type=int, help="pixels that the longer side is shrunk to; 0: as it is"
        " (default: config.annotator.max_side)",
    )  # fmt: skip
    parser.add_argument(
        "--min-side", type=int, help="leave out images with a shorter side of fewer pixels"
        " (default: config.filters.min_side)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out images, rows and archives that are damaged, and go on"
    )
    parser.add_argument(
        "--max-failures", metavar="SHARE", type=float, help="of the images that the annotator may fail on, 0 to 1"
        " (default: config.annotator.max_failures)",
    )  # fmt: skip
    parser.add_argument("--licence", default="unspecified", help="of images and texts, for records and data card")
    arguments.add_seed(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill import build
    from world_distill.data.annotation.annotate import annotate_images
    from world_distill.data.images.filters import Filters
    from world_distill.data.images.png import ImageError
    from world_distill.data.images.reader import find_images
    from world_distill.data.images.unused import Unused
    from world_distill.data.records.shard_files import check_maker
    from world_distill.settings.loading import section

    only, shards = arguments.parse_shard(args.shard) if args.shard else (None, args.shards)
    config = arguments.config_from(args)
    annotator = config.annotator

    def given(flag, default):
        return default if flag is None else flag

    filters = section(config.filters, Filters)
    min_side, max_side = given(args.min_side, filters.min_side), given(args.max_side, annotator.max_side)
    max_failures = given(args.max_failures, annotator.max_failures)
    if min_side < 0 or max_side < 0 or not 0 <= max_failures <= 1:
        raise UserError("--min-side and --max-side are at least 0, --max-failures is from 0 to 1")
    check_maker(args.out, f"{args.name}_annotated", "annotate")
    unused, skip_bad = Unused(), filters.broken or args.skip_bad
    images = find_images(args.images, image_root=args.image_root, skip_bad=skip_bad, unused=unused)
    if not images:
        raise UserError(f"--images {args.images}: no images there; {unused.line() or 'no other files either'}")
    try:
        with arguments.progress_bar("image") as show:
            counts = annotate_images(
                images, build.make(config, "annotator"), args.out, name=f"{args.name}_annotated",
                max_pairs=args.pairs or annotator.pairs, seed=config.seed, shards=shards, only=only, max_side=max_side,
                filters=dataclasses.replace(filters, broken=skip_bad, min_side=min_side), max_failures=max_failures,
                licence=args.licence, unused=unused, progress=show,
            )  # fmt: skip
    except ImageError as error:
        if skip_bad:
            raise
        raise UserError(f"{error} (--skip-bad leaves such images out, and lists them)") from error
    for name, count in counts.items():
        console.say(f"{name}: {count}")
    if line := unused.line():
        console.say(line)
    if args.json:
        atomic.write_json(args.json, counts)
    encode = ("encode", "--config", args.config, "--records", args.out, "--name", args.name)
    console.finish("wrote tasks and solutions", f"{args.out / args.name}_annotated", then=[encode])
    return 0
