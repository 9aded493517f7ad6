"""`world-distill import-tasks`: WorldTasks, or a data set like it, as annotated records."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from world_distill import console
from world_distill.cli import arguments
from world_distill.data.worldtasks.folder import BENCH, TRAIN, rows_file
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Read the authors' WorldTasks, a local folder of JSONL and pictures, into annotated records.

Its field names are not published, so a field is known by any of several names, and rows may have one task or a list of
them. What was taken for what is printed, with the names that were not used: if that is wrong, say it with --field.
Fields: image, task, solution, agent, kind, id, and tasks (a row's list).

Pictures are looked for beside the rows, in images/, train/, bench/ and all shard_* folders; none outside of the folder
is read, not by a link either (`hf download --local-dir` makes plain files). A task is `[agent]: what to do`; one that
names no agent is not used, unless --agent says who. Tasks that cannot be used are listed in
NAME_annotated.unusable.jsonl, with line, reason and keys; pairs that break a rule of `annotate` are counted, and left
out with --strict. Then call encode. Called again, or after an interruption, it writes the same bytes.

  world-distill import-tasks --folder WorldTasks --out data --name train --licence other
  world-distill import-tasks --folder WorldTasks --rows train/train.jsonl --field solution=long_text --out data
  world-distill import-tasks --folder WorldTasks --bench --out data --name test

--bench takes the benchmark's rows, which need no solution. Base and Executor can be evaluated on such records; training
and the Demonstrator refuse them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folder", type=pathlib.Path, required=True, help="the data set's folder")
    add("--rows", help=f"JSONL file in it (default: the first of {', '.join(TRAIN[:2])}; {', '.join(BENCH[:2])})")
    add("--bench", action="store_true", help="the benchmark: tasks need no solution")
    add("--field", metavar="FIELD=NAME", action="append", default=[], help="which name a field has; may be repeated")
    add("--agent", default="", help="of tasks that name none (default: those are not used)")
    add("--strict", action="store_true", help="leave out pairs that break a rule of annotate")
    add("--max-side", type=int, default=0, help="pixels that the longer side is shrunk to; 0: as it is (default: 0)")
    add("--licence", default="unspecified", help="of images and texts, for records and data card")
    add("--out", type=pathlib.Path, required=True, help="folder for the records")
    add("--name", default="train", help="name of the record set (default: train)")
    add("--shards", type=int, default=1, help="files to spread the records over (default: 1)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.worldtasks.convert import TaskImport
    from world_distill.data.worldtasks.fields import Schema

    if args.max_side < 0:
        raise UserError("--max-side is at least 0")
    schema = Schema(_fields(args.field), agent=args.agent, needs_solution=not args.bench)
    rows = rows_file(args.folder, args.rows, BENCH if args.bench else TRAIN)
    importing = TaskImport(
        args.folder, rows, schema, licence=args.licence, strict=args.strict, max_side=args.max_side
    )  # fmt: skip
    try:
        with arguments.progress_bar("task") as show:
            card = importing.write(args.out, f"{args.name}_annotated", args.shards, progress=show)
    except ValueError:
        console.say(describe(schema.report()))
        raise
    console.say(describe(card["schema"], card))
    console.say(f"next: world-distill encode --config CONFIG --records {args.out} --name {args.name}")
    if args.json:
        atomic.write_json(args.json, card)
    return 0


def _fields(given: Sequence[str]) -> dict[str, str]:
    from world_distill.data.worldtasks.fields import ALIASES

    fields = {}
    for text in given:
        field, equals, name = text.partition("=")
        if not (equals and name) or field not in ALIASES:
            raise UserError(f"--field {text}: expected FIELD=NAME, with a field of {', '.join(ALIASES)}")
        fields[field] = name
    return fields


def describe(schema: Mapping[str, Any], card: Mapping[str, Any] | None = None) -> str:
    """What was understood, and what came of it, as lines."""
    from world_distill.data.worldtasks.fields import shorten

    lines = [f"{schema['rows']} rows, {schema['rows_with_a_list']} of them with a list of tasks"]
    for field, names in schema["fields"].items():
        taken = ", ".join(f"{name!r} ({count})" for name, count in names.items())
        if names or field not in ("agent", "kind", "id", "tasks"):
            lines.append(f"  {field:<8} from {taken or 'nothing: no name that is known'}")
    for row in schema["ambiguous"]:
        lines.append(f"  {row['field']}: {row['taken']!r} was taken, and not {row['not']!r} ({row['tasks']})")
    if schema["unused"]:
        unused = ", ".join(f"{name!r} ({count})" for name, count in list(schema["unused"].items())[:40])
        lines.append(f"  not used: {unused}")
    if card is None:
        return "\n".join(lines)
    if card["example"]:
        lines += ["an example:", *(f"  {name:<8} {shorten(text)}" for name, text in card["example"].items())]
    lines += [f"{name}: {count}" for name, count in card["counts"].items()]
    lines += [f"breaks rule {rule}: {count}" for rule, count in card["broken_rules"].items()]
    return "\n".join(lines)
