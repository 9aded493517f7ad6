"""`world-distill report`."""

import argparse
import pathlib

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Make one HTML page of a run: results with intervals, training curves, and clips side by side.

The page is a single file that opens from disk, on a phone too. It shows what the folder WORKDIR holds: the figures of
`quickstart` or `evaluate`, the log of `train` with the start of RL, what the judge says of negative controls, and the
clips that were kept, failures first, with a filter and a slider through their frames. Of a folder of `reproduce`, it is
the page of the table.

  world-distill report --workdir runs/mine
  world-distill report --workdir runs/mine --out page.html --gifs gifs --json figures.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_workdir(parser)
    parser.add_argument("--out", metavar="PATH", type=arguments.path, help="the page (default: WORKDIR/report.html)")
    parser.add_argument("--gifs", metavar="DIR", type=arguments.path, help="also write every clip there, as GIF")
    parser.add_argument(
        "--mp4", metavar="DIR", type=arguments.path, help="also write every clip there, as MP4 (extra: vlm)"
    )
    parser.add_argument(
        "--sheet", metavar="PATH", type=arguments.path, help="also write one PNG with all frames of all clips"
    )
    parser.add_argument("--tasks", metavar="IDS", default="", help="comma-separated records that the sheet is to show")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.reports import clip_cards, paper_table, report
    from world_distill.reports.run_data import read, read_json

    if (args.workdir / paper_table.RESULTS).is_file():
        if args.gifs or args.mp4 or args.sheet:
            raise UserError(f"{args.workdir} is of `reproduce`; --gifs, --mp4 and --sheet take the folder of one run")
        path = paper_table.build(args.workdir, args.out)
        _finish(path)
        if args.json:
            atomic.write_json(args.json, read_json(args.workdir / paper_table.RESULTS) | {"page": path})
        return 0
    contents = read(args.workdir)
    path = report.build(args.workdir, args.out)
    for folder, suffix in ((args.gifs, "gif"), (args.mp4, "mp4")):
        if folder is not None:
            console.say(f"{clip_cards.export(contents, folder, suffix)} clips in {folder}")
    if args.sheet is not None:
        clip_cards.export_sheet(contents, args.sheet, tuple(filter(None, args.tasks.split(","))))
        console.say(f"all frames in {args.sheet}")
    _finish(path)
    if args.json:
        atomic.write_json(args.json, report.figures(contents) | {"page": path})
    return 0


def _finish(path: pathlib.Path) -> None:
    console.finish(f"one page of {path.stat().st_size / 1e6:.1f} MB, to be opened in a browser", path)
