"""`world-distill reproduce`."""

import argparse
import collections
from collections.abc import Sequence

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Fill the rows of the paper's table on one benchmark, over several seeds: the base, the captioned Demonstrator,
supervised fine-tuning, off-policy and on-policy distillation, and WMSD.

Trained rows get the compute of WMSD, in forward passes. Fine-tuning learns from the Demonstrator's clips of the
training tasks, which are made first and not counted; `--row sft.train_set=NAME` names other records with clips. Ends
with the table, paired differences with intervals over cases and over seeds, the paper's figures where the benchmark is
WorldTasks-Bench, and the commands that make each row alone. A page, WORKDIR/reproduce.html, has the same and the rows'
clips side by side; `report` makes it of a table of earlier versions.

Every row has a folder, WORKDIR/runs/ROW/SEED. Called again, reproduce reads what is finished and goes on with the rest;
a row that fails is named and does not stop the others. --plan says what is left to run, and what it costs.

  world-distill reproduce --plan
  world-distill reproduce --config sandbox:kinds=full --workdir runs/table
  world-distill reproduce --config wan22_5b --config.base=weights/wan22-5b --config.data=data --workdir runs/table \\
      --seeds 0 --rows base,demonstrator,wmsd --config.benchmark.options.servers=http://localhost:8000/v1
  world-distill reproduce --config ltx2 --config.base=weights/ltx2-8-step --config.data=data --workdir runs/table \\
      --row sft.base=weights/ltx2 --row base_undistilled.base=weights/ltx2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    arguments.add_workdir(parser, default="runs/reproduce")
    add = parser.add_argument
    add("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    add("--rows", default="", help="comma-separated (default: those of config.reproduce.rows)")
    add(
        "--row", action="append", default=[], metavar="ROW.KEY=VALUE",
        help="a setting of one row alone; may be repeated",
    )  # fmt: skip
    add("--split", default="test", help="record set to score on (default: test)")
    add("--limit", type=arguments.LIMIT, default=0, help="score the first N tasks only (default: all)")
    add(
        "--noises", type=arguments.COUNT, default=1, metavar="N",
        help="clips of each task, each from another noise (default: 1)",
    )  # fmt: skip
    add("--plan", action="store_true", help="say what is left to run and what it costs, and run nothing")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.devices import hosts
    from world_distill.programs import paper_plan, reproduce
    from world_distill.programs.paper_rows import Study

    study = Study(
        args.config, args.workdir, args.overrides, _own(args.row), arguments.seeds(args.seeds),
        rows=tuple(filter(None, args.rows.split(","))), split=args.split, limit=args.limit, noises=args.noises,
    )  # fmt: skip
    if args.plan:
        planned = paper_plan.plan(study)
        console.say(paper_plan.table(planned))
        console.say()
        if any(not entry["clips"] for entry in planned if not entry["finished"]):
            console.say(f"no records {args.split!r} are there yet: their clips and the questions about them count as 0")
        console.finish("nothing was run; the same call without --plan runs what is left", args.workdir)
        if args.json:
            atomic.write_json(args.json, planned)
        return 0
    result = reproduce.reproduce(study)
    if not hosts.is_main():
        return 0
    console.say("\n" + reproduce.tables(result, kinds=False) + "\n")
    failed = len(result["failed"])
    again = f"; {failed} runs failed, and the same call tries them again" if failed else ""
    console.finish(
        f"{len(result['rows'])} rows of the table{again}",
        args.workdir / reproduce.PAGE, args.workdir / reproduce.RESULTS, args.workdir / "reproduce.md",
        then=[("report", "--workdir", args.workdir / "runs" / result["rows"][-1]["name"] / str(study.seeds[0]))],
    )  # fmt: skip
    if args.json:
        atomic.write_json(args.json, result)
    return 1 if failed else 0


def _own(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """Settings by row and key."""
    own: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for text in given:
        address, equals, value = text.partition("=")
        row, dot, key = address.partition(".")
        if not (equals and dot and row and key):
            raise UserError(f"--row {text}: give ROW.KEY=VALUE, such as sft.train_set=films")
        own[row][key] = value
    return own
