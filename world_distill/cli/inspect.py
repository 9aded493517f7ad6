"""`world-distill inspect`."""

import argparse
import pathlib
import re
import shutil

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Show the records of a set: counts, then a table of tasks and solutions.

Counts come from the heads of the records, so that they take a second for 150,000; pictures and arrays are read of the
records that are shown. (Sets of earlier versions have no heads, and are read whole.)

--records and --name say which: train_annotated is what `annotate` wrote, train what `encode` made of it. --task keeps
the records whose task matches a regular expression, whatever its case; --random shows a random sample instead of the
first ones, the same one for the same --seed. --html writes a page with the pictures, one file without anything outside.

  world-distill inspect --records data --name train_annotated
  world-distill inspect --records data --name train --task 'cup|bottle' --random --limit 50 --html tasks.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", type=pathlib.Path, required=True, help="folder of the record set")
    parser.add_argument("--name", default="train_annotated", help="name of the record set (default: train_annotated)")
    parser.add_argument("--limit", type=int, default=20, help="records to show; 0: all (default: 20)")
    parser.add_argument("--random", action="store_true", help="show a random sample, not the first records")
    parser.add_argument("--task", metavar="REGEX", help="only records whose task matches")
    parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="also write a page with pictures")
    arguments.add_seed(parser, default=0)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.records.reader import RecordReader
    from world_distill.reports import records

    try:
        wanted = re.compile(args.task or "", re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--task {args.task}: not a regular expression ({error})") from error
    if args.limit < 0:
        raise UserError("--limit is at least 0")
    reader = RecordReader(args.records, args.name)
    matching, counts = records.survey(reader, wanted)
    rows = records.choose(matching, args.limit, args.seed if args.random else None)
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [*records.describe(counts), *records.table((reader.without_scene(i) for i in rows), width)]
    for line in lines:
        console.say(line)
    if args.html:
        title = f"Records of {args.name}"
        atomic.write_text(args.html, records.html_page(title, counts, [reader[i] for i in rows]))
    if args.json:
        atomic.write_json(args.json, counts)
    if args.html:
        console.finish("wrote a page to be opened in a browser", args.html)
    return 0
