"""`world-distill demonstrate`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Give encoded records the Demonstrator's clips, for supervised fine-tuning on them (objective.kind = sft).

The Demonstrator, told each record's solution, makes one clip a record, with the config's sampler and guidance
(config.demonstrator.guidance). The clips go into a record set of their own as latents, neither decoded nor encoded.
Training on it is fine-tuning on what a better-informed model makes; off-policy distillation (rollout.role =
demonstrator) learns from the Demonstrator's velocities instead, and needs no such set.

A clip depends on config.seed, the record and the weights alone. Called again after an interruption, it goes on at the
first shard that is not finished. Another seed, sampler or model replaces the set. Several jobs that share the folder do
a shard each with --shard I/N.

  world-distill demonstrate --config sandbox --config.data=data --out train_shown
  world-distill demonstrate --config ltx2 --config.data=data --out train_shown --shard 3/16 --clip-dtype bfloat16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    add = parser.add_argument
    add("--data", type=pathlib.Path, help="folder of the encoded records (default: config.data)")
    add("--name", default="train", help="name of their set (default: train)")
    add("--out", metavar="NAME", help="name of the new set, in the same folder (default: the old one's with _shown)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shards", type=arguments.COUNT, default=1, help="files to spread the records over (default: 1)"
    )
    which.add_argument("--shard", metavar="I/N", help="write shard I (from 0) of N only")
    add(
        "--clip-dtype",
        choices=("bfloat16", "float16", "float32"),
        help="store latents of scenes and clips in this type (default: the sampler's own, float32)",
    )
    arguments.add_seed(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.records.reader import EncodedRecord, RecordReader
    from world_distill.programs.demonstrate import demonstrate

    only, shards = arguments.parse_shard(args.shard) if args.shard else (None, args.shards)
    config = arguments.config_from(args)
    folder = args.data or (pathlib.Path(config.data) if config.data else None)
    if folder is None:
        raise UserError("--data is needed: the folder of the encoded records (`world-distill encode`)")
    name = args.out or f"{args.name}_shown"
    reader = RecordReader(folder, args.name, EncodedRecord)
    with arguments.progress_bar("clip") as show:
        counts = demonstrate(
            config, reader, folder, name=name, shards=shards, only=only, clip_dtype=args.clip_dtype, progress=show
        )  # fmt: skip
    if args.json:
        atomic.write_json(args.json, counts)
    if counts["shards_missing"]:
        console.finish(f"{counts['shards_missing']} of {shards} shards are still to be written", folder / name)
        return 0
    made = f"made {counts['written']} clips, {console.disk(counts['bytes'])}" if counts["written"] else "nothing to do"
    train = (
        "train", "--config", fine_tuning(args.config), f"--config.data={folder}",
        f"--config.train_set={name}", "--workdir", "runs/sft",
    )  # fmt: skip
    console.finish(made, folder / name, then=[train])
    return 0


def fine_tuning(config: str) -> str:
    """The config `FILE:ARG` with its variant for fine-tuning; that of the tiny model for the tiny model."""
    name, _, arg = config.partition(":")
    items = [item.strip() for item in arg.split(",") if item.strip()]
    others = [item for item in items if "=" in item and not item.startswith("variant")]
    tiny = {"debug", "variant=debug"} & {item.replace(" ", "") for item in items}
    return f"{name}:{','.join(['debug_sft' if tiny else 'sft', *others])}"
