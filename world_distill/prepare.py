"""`world-distill scenes | annotate | encode`: from images to the records that training reads.

    scenes    images            drawn by a world, or your own folder of pictures
    annotate  images -> tasks   a VLM writes tasks and solutions (`NAME_annotated` records)
    encode    tasks -> arrays   scene latents and text states (`NAME` records)

Every stage can be called again after an interruption, and then goes on.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator

from tqdm import tqdm

from world_distill import arguments, components
from world_distill.config import UserError, section
from world_distill.data.annotate import annotate_images
from world_distill.data.encode import encode_records
from world_distill.data.image_filters import Filters
from world_distill.data.image_sources import find_images
from world_distill.data.negative import keep_negative
from world_distill.data.records import RecordError, RecordReader
from world_distill.guidance import Guidance
from world_distill.structs import PyTree

SPLITS = ("train", "validation", "test")


def make_records(config, folder: pathlib.Path, *, say=lambda text: None) -> None:
    """Scenes, tasks and encoded records of all three splits in `folder`; what is there already is kept."""
    encoder = Encoder(config)
    for split in SPLITS:
        if is_complete(folder, split):
            if encoder.guidance.used:  # records of an earlier version have no negative text
                encoder.keep_negative(folder, split)
            continue
        make_scenes = components.make_partial(config, "scenes")
        paths = make_scenes(str(folder / "scenes" / split), config.scenes[split], split=split, seed=config.seed)
        pairs = config.annotator.pairs if split == "train" else config.annotator.test_pairs
        if not is_complete(folder, f"{split}_annotated"):
            annotate_images(
                paths, components.make(config, "annotator"), folder, name=f"{split}_annotated", max_pairs=pairs,
                seed=config.seed, filters=section(config.filters, Filters), max_side=config.annotator.max_side,
                max_failures=config.annotator.max_failures,
            )  # fmt: skip
        reader = RecordReader(folder, f"{split}_annotated")
        encoder.keep_negative(folder, split)
        encoder.encode(reader, folder, name=split, batch=config.encode_batch)
        say(f"{split}: {len(paths)} scenes, {len(reader)} tasks")


class Encoder:
    """The encoders of a config's family. Their weights are read when there is something to encode, and once."""

    def __init__(self, config):
        self._config, self._family = config, components.make_family(config)
        self.guidance = Guidance.of(config)

    @functools.cached_property
    def _codec(self) -> PyTree:
        return components.load_codec(self._family, self._config)

    def encode(self, reader: RecordReader, folder: pathlib.Path, *, name: str, **options) -> dict[str, int]:
        """`encode_records` with these encoders; its other `options` and its counts."""
        family, size = self._family, self._family.image_size
        metadata = {
            "family": family.name,
            "weights": pathlib.Path(components.base_path(family, self._config.base) or "").name,
            "text_encoder": self._text_encoder,
            "image_size": "x".join(map(str, size)) if size else "as annotated",  # height x width
            "scene": "x".join(map(str, family.latent_shape[1:])),  # h w c of its latent
        }
        return encode_records(
            reader, folder, name=name, encode_scene=lambda images: family.encode_scene(self._codec, images),
            encode_text=family.encode_text, size=size, metadata=metadata, **options,
        )  # fmt: skip

    def keep_negative(self, folder: pathlib.Path, name: str) -> bool:
        """Encodes the config's negative text for a record set that lacks it; returns whether it did.

        To be called before `encode`, so that a set that is complete has it.
        """
        text, encode = self.guidance.negative, self._family.encode_text
        return keep_negative(folder, name, text, text_encoder=self._text_encoder, encode_text=encode)

    @property
    def _text_encoder(self) -> str:
        return pathlib.Path(self._family.text_encoder).name


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, all) that draws a bar on a terminal; what is done at its first call costs no time."""
    with tqdm(unit=unit, disable=None) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:
                bar.total, bar.initial, bar.n = total, done, done
            bar.update(done - bar.n)

        yield show


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

--images is a folder, a glob pattern in quotes (braces too: 'set-{000..012}.tar'), tar archives such as webdatasets, or
JSONL: a row's image is in `image`, `image_path`, `file_name` or `path`, relative to the file and inside its folder, and
its other fields go into the records as the image's source (`licence` counts as the image's licence).

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


def annotate_add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--images", required=True, help="folder, glob pattern in quotes, .tar, .tar.gz or .jsonl")
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
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and go on")
    parser.add_argument(
        "--max-failures", metavar="SHARE", type=float, help="of the images that the annotator may fail on, 0 to 1"
        " (default: config.annotator.max_failures)",
    )  # fmt: skip
    parser.add_argument("--licence", default="unspecified", help="of images and texts, for records and data card")
    arguments.add_seed(parser)
    arguments.add_json(parser)


def annotate_run(args: argparse.Namespace) -> int:
    only, shards = parse_shard(args.shard) if args.shard else (None, args.shards)
    config = arguments.config_from(args)
    annotator = config.annotator

    def given(flag, default):
        return default if flag is None else flag

    filters = section(config.filters, Filters)
    min_side, max_side = given(args.min_side, filters.min_side), given(args.max_side, annotator.max_side)
    max_failures = given(args.max_failures, annotator.max_failures)
    if min_side < 0 or max_side < 0 or not 0 <= max_failures <= 1:
        raise UserError("--min-side and --max-side are at least 0, --max-failures is from 0 to 1")
    images = find_images(args.images)
    if not images:
        raise UserError(f"--images {args.images}: no images there")
    with progress_bar("image") as show:
        counts = annotate_images(
            images, components.make(config, "annotator"), args.out, name=f"{args.name}_annotated",
            max_pairs=args.pairs or annotator.pairs, seed=config.seed, shards=shards, only=only, max_side=max_side,
            filters=dataclasses.replace(filters, broken=filters.broken or args.skip_bad, min_side=min_side),
            max_failures=max_failures, licence=args.licence, progress=show,
        )  # fmt: skip
    for name, count in counts.items():
        arguments.say(f"{name}: {count}")
    if args.json:
        arguments.write_json(args.json, counts)
    return 0


ENCODE_HELP = """\
Turn annotated records into what training reads: scene latents and text-encoder states.

Reads NAME_annotated in the folder, writes NAME beside it, a shard after the other. Called again after an interruption
it goes on at the first shard that is not finished, and does nothing where all are. It counts as the same work if the
annotated records, the number of shards, the names of model family, weights and text encoder, and the sizes are the
same; any other work of that NAME is replaced. To have it done anew, delete NAME-*.note.

Several machines that share the folder do a shard each with --shard I/N, I from 0 to N - 1; the last of them to finish
makes the set whole. An image is encoded once for each shard that holds a task of it.

The states of config.demonstrator.negative, which guidance leads away from, are kept in NAME.negative. For another text,
or for records that were encoded without one, call it again in the same way: the records stay, and the text is encoded.

  world-distill encode --config sandbox --records data --name train
  world-distill encode --config sandbox --records data --name train --shard 0/4     # and 1/4, 2/4, 3/4 elsewhere
"""


def encode_add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--records", type=pathlib.Path, required=True, help="folder of the annotated records")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shards", type=int, default=1, help="files to spread the records over (default: 1)")
    which.add_argument("--shard", metavar="I/N", help="write shard I (from 0) of N only")
    parser.add_argument("--batch", type=int, help="images and texts encoded at once (default: config.encode_batch)")
    arguments.add_json(parser)


def encode_run(args: argparse.Namespace) -> int:
    only, shards = parse_shard(args.shard) if args.shard else (None, args.shards)
    config = arguments.config_from(args)
    batch = config.encode_batch if args.batch is None else args.batch
    if shards < 1 or batch < 1:
        raise UserError("--shards and --batch are at least 1")
    reader = RecordReader(args.records, f"{args.name}_annotated")
    encoder = Encoder(config)
    negative = encoder.keep_negative(args.records, args.name)
    with progress_bar("record") as show:
        counts = encoder.encode(
            reader, args.records, name=args.name, shards=shards, only=only, batch=batch, progress=show
        )
    arguments.say(describe_encoding(counts, args.records / args.name, negative=negative))
    if args.json:
        arguments.write_json(args.json, counts)
    return 0


def parse_shard(text: str) -> tuple[int, int]:
    """(shard, shards) from "I/N".

    Raises:
      UserError: not two numbers, or I is not in 0 ... N - 1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(f"--shard {text}: give I/N, such as 0/4 for the first of four")
    shard, shards = int(match[1]), int(match[2])
    if shard >= shards:
        raise UserError(f"--shard {text}: shards are counted from 0, so N = {shards} has {_span(shards)}")
    return shard, shards


def _span(shards: int) -> str:
    return f"0/{shards} to {shards - 1}/{shards}" if shards else "none"


def describe_encoding(counts: dict[str, int], where: pathlib.Path, *, negative: bool = False) -> str:
    """One line about the counts of `encode_records`, and about the negative text where nothing else was encoded."""
    missing = counts["shards_missing"]
    if missing:
        rest = f"{missing} of {counts['shards']} shards of {where} are still to be written"
        return f"encoded {counts['encoded']} records; {rest}"
    if counts["encoded"]:
        return f"encoded {counts['encoded']} records; {where} is complete with {counts['records']}"
    if negative:
        return f"encoded the negative text; {where} is complete with {counts['records']} records"
    return f"{where} is complete with {counts['records']} records: nothing to do"
