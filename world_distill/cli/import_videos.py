"""`world-distill import-videos`: a folder or a table of videos, as annotated records."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """\
Read videos with their captions or tasks into annotated records, for supervised fine-tuning (objective.kind = sft).

--videos is a folder, with NAME.txt beside NAME.mp4 or with a metadata.jsonl or metadata.csv; or a table (JSONL, JSON or
CSV) with the path of a video and its task, its caption or both in each row. Paths are looked for beside the table and
in --video-root; none outside of it is read. MP4, MOV, WebM, Matroska and AVI are read, whatever FFmpeg decodes of them.

The task is what the Executor is told. A caption that stands alone is told to both Executor and Demonstrator.

A video's first frame becomes the scene. Its pixels stay where they are: `encode` reads them, at the model's frame rate
and length, from the video's beginning. Damaged videos, videos without a text and paths that lead nowhere are left out,
counted, and listed in NAME_annotated.left_out.jsonl. Called again, it writes the same bytes.

  world-distill import-videos --videos clips --out data --name train
  world-distill import-videos --videos robot.jsonl --video-root /mnt/robot --out data --name train --licence CC-BY-4.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--videos", required=True, help="folder of videos, or a table of them (.jsonl, .json, .csv)")
    add("--video-root", metavar="FOLDER", help="folder of the videos that a table names (default: the table's)")
    add("--licence", default="unspecified", help="of videos whose row names none, for records and data card")
    add("--out", type=pathlib.Path, required=True, help="folder for the records")
    add("--name", default="train", help="name of the record set (default: train)")
    add("--shards", type=arguments.COUNT, default=1, help="files to spread the records over (default: 1)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.images.unused import Unused
    from world_distill.data.records.resumable import left_out_path
    from world_distill.data.records.shard_files import check_maker
    from world_distill.data.videos.convert import import_videos
    from world_distill.data.videos.find import find_videos

    unused, name = Unused(), f"{args.name}_annotated"
    check_maker(args.out, name, "import-videos")
    root, found = find_videos(args.videos, root=args.video_root, unused=unused)
    with arguments.progress_bar("video") as show:
        card = import_videos(
            root, found, args.out, name, shards=args.shards, licence=args.licence, progress=show
        )  # fmt: skip
    counts = card["counts"]
    for key, count in counts.items():
        console.say(f"{key}: {count}")
    if counts["left_out"]:
        console.say(f"{left_out_path(args.out, name)} says what was left out and why")
    if line := unused.line():
        console.say(line)
    if args.json:
        atomic.write_json(args.json, card)
    encode = ("encode", "--config", "CONFIG", "--records", args.out, "--name", args.name)
    console.finish("imported videos", f"{args.out / name}", then=[encode])
    return 0
