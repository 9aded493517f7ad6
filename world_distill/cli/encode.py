"""`world-distill encode`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--records", type=pathlib.Path, required=True, help="folder of the annotated records")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shards", type=int, default=1, help="files to spread the records over (default: 1)")
    which.add_argument("--shard", metavar="I/N", help="write shard I (from 0) of N only")
    parser.add_argument("--batch", type=int, help="images and texts encoded at once (default: config.encode_batch)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.records.reader import RecordReader
    from world_distill.programs import prepare

    only, shards = arguments.parse_shard(args.shard) if args.shard else (None, args.shards)
    config = arguments.config_from(args)
    batch = config.encode_batch if args.batch is None else args.batch
    if shards < 1 or batch < 1:
        raise UserError("--shards and --batch are at least 1")
    reader = RecordReader(args.records, f"{args.name}_annotated")
    encoder = prepare.Encoder(config)
    negative = encoder.keep_negative(args.records, args.name)
    with arguments.progress_bar("record") as show:
        counts = encoder.encode(
            reader, args.records, name=args.name, shards=shards, only=only, batch=batch, progress=show
        )
    console.say(describe(counts, args.records / args.name, negative=negative))
    if args.name == "train" and not counts["shards_missing"]:
        console.say(
            f"next: world-distill train --config {args.config} --config.data={args.records} --workdir runs/mine"
        )
    if args.json:
        atomic.write_json(args.json, counts)
    return 0


def describe(counts: dict[str, int], where: pathlib.Path, *, negative: bool = False) -> str:
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
