"""`world-distill scenes | annotate | encode`: from images to the records that training reads.

    scenes    images            drawn by a world, or your own folder of pictures
    annotate  images -> tasks   a VLM writes tasks and solutions (`NAME_annotated` records)
    encode    tasks -> arrays   scene latents and text states (`NAME` records)

Every stage writes its result in one step and can be called again after an interruption.
"""

import argparse
import functools
import glob
import pathlib

from world_distill import arguments, components
from world_distill.config import UserError
from world_distill.data.annotate import annotate_images
from world_distill.data.encode import encode_records
from world_distill.data.records import RecordError, RecordReader

SPLITS = ("train", "validation", "test")


def make_records(config, folder: pathlib.Path, *, say=lambda text: None) -> None:
    """Scenes, tasks and encoded records of all three splits in `folder`; what is there already is kept."""
    family = None
    for split in SPLITS:
        if is_complete(folder, split):
            continue
        make_scenes = components.make_partial(config, "scenes")
        paths = make_scenes(str(folder / "scenes" / split), config.scenes[split], split=split, seed=config.seed)
        pairs = config.annotator.pairs if split == "train" else config.annotator.test_pairs
        if not is_complete(folder, f"{split}_annotated"):
            annotate_images(
                paths, components.make(config, "annotator"), folder,
                name=f"{split}_annotated", max_pairs=pairs, seed=config.seed, shards=1,
            )  # fmt: skip
        if family is None:
            family = components.make_family(config)
            codec = components.load_codec(family, config)
        reader = RecordReader(folder, f"{split}_annotated")
        encode_records(
            reader, folder, name=split, encode_scene=functools.partial(family.encode_scene, codec),
            encode_text=family.encode_text, shards=1, batch=64, size=family.image_size,
        )  # fmt: skip
        say(f"{split}: {len(paths)} scenes, {len(reader)} tasks")


def is_complete(folder: pathlib.Path, name: str) -> bool:
    """Whether a whole record set is there."""
    try:
        RecordReader(folder, name)
    except (RecordError, OSError):
        return False
    return True


SCENES_HELP = """\
Draw scene images with the world that the config names.

Each image is a PNG; the same seed and split always give the same images. With pictures of your own, leave this out and
call annotate on them.

  world-distill scenes --config sandbox --out images/train --count 400
"""


def scenes_add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the images")
    parser.add_argument("--count", type=int, help="how many (default: config.scenes.SPLIT)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which stream of scenes (default: train)")
    arguments.add_seed(parser)


def scenes_run(args: argparse.Namespace) -> int:
    config = arguments.config_from(args)
    count = config.scenes[args.split] if args.count is None else args.count
    make_scenes = components.make_partial(config, "scenes")
    paths = make_scenes(str(args.out), count, split=args.split, seed=config.seed)
    arguments.say(f"wrote {len(paths)} images to {args.out}")
    return 0


ANNOTATE_HELP = """\
Have the config's annotator write tasks and solutions for images.

Answers are kept in a journal as they come: called again after an interruption, it asks about no image twice. Writes
NAME_annotated records and a data card with counts and rejections into the folder OUT.

  world-distill annotate --config sandbox --images 'images/train/*.png' --out data --name train
"""


def annotate_add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--images", required=True, help="folder of images, or a glob pattern in quotes")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the records")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    parser.add_argument("--pairs", type=int, help="tasks an image, at most (default: config.annotator.pairs)")
    parser.add_argument("--shards", type=int, default=1, help="files to spread the records over (default: 1)")
    parser.add_argument("--skip-bad", action="store_true", help="count images that cannot be read, and go on")
    arguments.add_seed(parser)
    arguments.add_json(parser)


def annotate_run(args: argparse.Namespace) -> int:
    config = arguments.config_from(args)
    pattern = pathlib.Path(args.images)
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    if pattern.is_dir():
        paths = sorted(p for p in pattern.rglob("*") if p.suffix.lower() in suffixes)
    else:
        paths = [pathlib.Path(p) for p in sorted(glob.glob(args.images, recursive=True))]
    if not paths:
        raise UserError(f"--images {args.images}: no images there")
    counts = annotate_images(
        paths, components.make(config, "annotator"), args.out, name=f"{args.name}_annotated",
        max_pairs=args.pairs or config.annotator.pairs, seed=config.seed, shards=args.shards, skip_bad=args.skip_bad,
    )  # fmt: skip
    for name, count in counts.items():
        arguments.say(f"{name}: {count}")
    if args.json:
        arguments.write_json(args.json, counts)
    return 0


ENCODE_HELP = """\
Turn annotated records into what training reads: scene latents and text-encoder states.

Reads NAME_annotated in the folder, writes NAME beside it.

  world-distill encode --config sandbox --records data --name train
"""


def encode_add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--records", type=pathlib.Path, required=True, help="folder of the annotated records")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    parser.add_argument("--shards", type=int, default=1, help="files to spread the records over (default: 1)")
    parser.add_argument("--batch", type=int, default=64, help="images and texts encoded at once (default: 64)")


def encode_run(args: argparse.Namespace) -> int:
    config = arguments.config_from(args)
    family = components.make_family(config)
    codec = components.load_codec(family, config)
    reader = RecordReader(args.records, f"{args.name}_annotated")
    encode_records(
        reader, args.records, name=args.name, encode_scene=functools.partial(family.encode_scene, codec),
        encode_text=family.encode_text, shards=args.shards, batch=args.batch, size=family.image_size,
    )  # fmt: skip
    arguments.say(f"encoded {len(reader)} records into {args.records}")
    return 0
