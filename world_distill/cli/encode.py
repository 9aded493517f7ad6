"""`world-distill encode`."""

import argparse
import pathlib
from collections.abc import Collection

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Turn annotated records into what training reads: scene latents and text-encoder states.

Reads NAME_annotated in the folder, writes NAME beside it, a shard after the other, and says before what it will take on
the disk and then how long. Called again after an interruption it goes on at the first shard that is not finished, and
does nothing where all are. It counts as the same work if the annotated records, the number of shards, the names of
model family, weights and text encoder, and the sizes are the same; any other work of that NAME is replaced, and it says
what differs. To have it done anew, delete NAME-*.note.

A picture is encoded and stored once for all of its tasks, whatever their order and the number of shards. A task whose
text is longer than config.text_length, or than the text encoder takes, is left out and listed in NAME.left_out.jsonl;
so are the tasks of a damaged picture.

--validation 0.02 and --test 0.02 split shares of the images off, as the sets `validation` (which training evaluates on)
and `test`. Which images depends on their files alone: it is the same for any order and number of records.

Several machines that share the folder do a shard each with --shard I/N, I from 0 to N - 1; the last of them to finish
makes the set whole. The processes of one job (launch/README.md) share the shards out by themselves: each takes every
N-th of --shards.

Records that `import-videos` made get their clips, at the model's frame rate, length and size. A video that is too
short, damaged or changed is left out and listed. Where the videos have moved, --videos names their folder.

The states of config.demonstrator.negative, which guidance leads away from, are kept in NAME.negative. For another text,
or for records that were encoded without one, call it again in the same way: the records stay, and the text is encoded.

  world-distill encode --config sandbox --records data --name train
  world-distill encode --config sandbox --records data --name train --validation 0.02
  world-distill encode --config sandbox --records data --name train --shard 0/4     # and 1/4, 2/4, 3/4 elsewhere
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--records", type=pathlib.Path, required=True, help="folder of the annotated records")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shards", type=int, help="files to spread the images over (default: one a process)")
    which.add_argument("--shard", metavar="I/N", help="write shard I (from 0) of N only")
    clips = parser.add_mutually_exclusive_group()
    clips.add_argument(
        "--videos", type=pathlib.Path, metavar="FOLDER", help="folder of the videos (default: that of import-videos)"
    )
    clips.add_argument("--no-clips", action="store_true", help="encode the first frames of the videos alone")
    parser.add_argument("--batch", type=int, help="images and texts encoded at once (default: config.encode_batch)")
    for name, use in (("validation", "training evaluates on"), ("test", "`evaluate` takes by default")):
        parser.add_argument(
            f"--{name}", metavar="SHARE", type=float, default=0.0,
            help=f"share of the images to split off as the set `{name}`, which {use} (default: 0)",
        )  # fmt: skip
    parser.add_argument(
        "--scene-dtype",
        choices=("bfloat16", "float16", "float32"),
        help="store latents of scenes and clips in this type; training reads them in the encoder's own all the same"
        " (default: the encoder's own, which loses nothing; without clips, texts take most of the disk)",
    )
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.records.reader import RecordReader
    from world_distill.data.records.splits import Splits
    from world_distill.devices import hosts
    from world_distill.programs import prepare

    hosts.start()
    only, shards = share_out(args.shard, args.shards, *hosts.place_in_job())
    config = arguments.config_from(args)
    batch = config.encode_batch if args.batch is None else args.batch
    if shards < 1 or batch < 1:
        raise UserError("--shards and --batch are at least 1")
    splits = Splits(args.validation, args.test)
    reader = RecordReader(args.records, f"{args.name}_annotated")
    encoder = prepare.Encoder(config)
    counts = encoder.encode_split(
        reader, args.records, name=args.name, splits=splits, shards=shards, only=only, batch=batch,
        clips=None if args.no_clips else encoder.clips_of(reader, args.videos), scene_dtype=args.scene_dtype,
        say=console.say, progress=lambda: arguments.progress_bar("task"),
    )  # fmt: skip
    lines = [line for name, of_set in counts.items() for line in describe(of_set, args.records / name)]
    for line in lines[:-1]:
        console.say(line)
    whole = not any(of_set["shards_missing"] for of_set in counts.values())
    train = ("train", "--config", args.config, f"--config.data={args.records}", "--workdir", "runs/mine")
    console.finish(lines[-1], then=[train] if whole and args.name == "train" else [])
    if args.json:
        atomic.write_json(args.json, counts if splits else counts[args.name])
    return 0


def share_out(
    shard: str | None, shards: int | None, process: int, processes: int
) -> tuple[Collection[int] | None, int]:
    """(shards that this process of the job writes, None for all; how many there are), from `--shard` and `--shards`.

    Raises:
      UserError: `--shard` in a job that shares them out itself, or fewer shards than processes.
    """
    if shard:
        one, shards = arguments.parse_shard(shard)
        if processes > 1:
            raise UserError(
                f"--shard {shard}: this is process {process} of a job of {processes}, which share the shards out: give"
                f" --shards {max(shards, processes)} instead, or start a job of one process on each machine"
            )
        return [one], shards
    if processes == 1:
        return None, 1 if shards is None else shards
    shards = processes if shards is None else shards
    if 0 < shards < processes:
        raise UserError(f"--shards {shards} for {processes} processes: give at least --shards {processes}")
    return range(process, shards, processes), shards


def describe(counts: dict[str, int], where: pathlib.Path) -> list[str]:
    """Lines about the counts of one set of `Encoder.encode_split`."""
    from world_distill.data.records.reader import RecordReader

    missing, encoded, left_out = (counts[key] for key in ("shards_missing", "encoded", "left_out"))
    begin = f"encoded {encoded} records"
    if missing:
        lines = [f"{begin}; {missing} of {counts['shards']} shards of {where} are still to be written"]
    else:
        reader = RecordReader(where.parent, where.name)
        left_out = reader.left_out
        begin = begin if encoded else "encoded the negative text" if counts["negative"] else ""
        lines = [f"{begin}{'; ' if begin else ''}{where} is complete with {len(reader)} records"]
        lines[0] += "" if begin else ": nothing to do"
    if encoded:
        each = console.disk(counts["bytes"] / encoded)
        expected = console.disk(counts["estimated_bytes"] / (encoded + counts["left_out"]))
        lines.append(f"wrote {console.disk(counts['bytes'])}, {each} a record (estimate: {expected})")
    if left_out:
        where_listed = "listed when all shards are written" if missing else f"{where}.left_out.jsonl says which and why"
        lines.append(f"left out {left_out} records: {where_listed}")
    return lines
