"""`world-distill import-tasks`: WorldTasks, or a data set like it, as annotated records."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

HELP = """\
Read tasks and pictures that you have, WorldTasks or a data set of your own, into annotated records.

--folder is a folder, a file, a pattern in quotes, or an address of fsspec (gs://, s3://, hf://). Read are JSONL, JSON
and CSV, compressed or not, metadata.* beside pictures, Parquet, Arrow (`save_to_disk`), tar and zip archives with side
files (webdataset), and pictures with a .txt or .json of the same name. Where names tell splits apart, the training
split counts; --rows names other files.

Field names are not published, so a field is known by any of several names. A row may have one task, a list of them, a
map {task: solution}, task_0 ... task_7, or a model's whole answer in a text. What was taken for what is printed, with
the names that were not used: if that is wrong, say it with --field. Fields: image, task, solution, agent, kind, id,
licence, url, author, tasks (a row's list), and response.

Pictures are looked for beside the rows, in images/, train/ and bench/, then by the end of their path anywhere in the
folder and its archives: rows may have paths of another machine. --image-root names another folder to look in. None
outside of it is read, not by a link either, but for a snapshot in the hub's cache. A task is `[agent]: what to do`;
one that names no agent is not used, unless --agent says who. Tasks that cannot be used are listed in
NAME_annotated.unusable.jsonl, with line, reason and keys; pairs that break a rule of `annotate` are counted, and left
out with --strict. Then call encode. Called again, or after an interruption, it writes the same bytes.

  world-distill import-tasks --folder WorldTasks --out data --name train --licence other
  world-distill import-tasks --folder WorldTasks --rows train/train.jsonl --field solution=long_text --out data
  world-distill import-tasks --folder 'sets/train-*.parquet' --out data --agent 'first person view'
  world-distill import-tasks --folder WorldTasks --bench --out data --name test
  world-distill import-tasks --folder EVAL-175 --dreamgen --out data --name dreamgen

--bench takes the benchmark's rows, which need no solution. Base and Executor can be evaluated on such records; training
and the Demonstrator refuse them. --dreamgen takes the folders of DreamGen Bench: INDEX_instruction.png with its text
beside it; a folder is a split, and its name becomes the kind of task.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--folder", required=True, help="the data set: a folder, a file, a pattern in quotes, or an address")
    add("--rows", help="file or pattern in that folder (default: train/train_filtered.jsonl, or what there is)")
    add("--image-root", metavar="FOLDER", help="folder of the pictures that rows name (default: --folder)")
    add("--bench", action="store_true", help="the benchmark: tasks need no solution")
    add("--dreamgen", action="store_true", help="the folders of DreamGen Bench")
    add("--field", metavar="FIELD=NAME", action="append", default=[], help="which name a field has; may be repeated")
    add("--agent", default="", help="of tasks that name none (default: those are not used)")
    add("--strict", action="store_true", help="leave out pairs that break a rule of annotate")
    add("--skip-bad", action="store_true", help="go on where a file is damaged, with what comes before the damage")
    add("--max-side", type=int, default=0, help="pixels that the longer side is shrunk to; 0: as it is (default: 0)")
    add("--licence", default="unspecified", help="of rows that name none, for records and data card")
    add("--out", type=pathlib.Path, required=True, help="folder for the records")
    add("--name", default="train", help="name of the record set (default: train)")
    add("--shards", type=int, default=1, help="files to spread the records over (default: 1)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.data.images.files import find_files
    from world_distill.data.images.unused import Unused
    from world_distill.data.records.shard_files import check_maker
    from world_distill.data.worldtasks.convert import TaskImport
    from world_distill.data.worldtasks.dreamgen import AGENT, dreamgen_rows
    from world_distill.data.worldtasks.fields import Schema
    from world_distill.data.worldtasks.folder import rows_files

    if args.max_side < 0:
        raise UserError("--max-side is at least 0")
    check_maker(args.out, f"{args.name}_annotated", "import-tasks")
    schema, unused = Schema(_fields(args.field), agent=args.agent, needs_solution=not args.bench), Unused()
    rows, root = None, args.folder
    if args.dreamgen:
        schema = Schema({}, needs_solution=False)
        files = find_files(root, unused)
        rows = dreamgen_rows(files, unused, args.agent or AGENT)
        files = [row.file for row in rows]
        if not rows:
            raise UserError(f"--folder {root} holds no picture INDEX_instruction.png; --dreamgen reads such folders")
    else:
        root, files = rows_files(root, args.rows, bench=args.bench, unused=unused)
    importing = TaskImport(
        root, files, schema, image_root=args.image_root, skip_bad=args.skip_bad, unused=unused, licence=args.licence,
        strict=args.strict, max_side=args.max_side, rows=rows, own_ids=args.dreamgen,
    )  # fmt: skip
    try:
        with arguments.progress_bar("task") as show:
            card = importing.write(args.out, f"{args.name}_annotated", args.shards, progress=show)
    except ValueError:
        console.say("\n".join(filter(None, (describe(schema.report()), unused.line()))))
        raise
    console.say(describe(card["schema"], card))
    if line := unused.line():
        console.say(line)
    if card["counts"]["unusable"]:
        console.say(f"unusable tasks, each with its reason: {args.out / args.name}_annotated.unusable.jsonl")
    if args.json:
        atomic.write_json(args.json, card)
    encode = ("encode", "--config", "CONFIG", "--records", args.out, "--name", args.name)
    console.finish("imported tasks", f"{args.out / args.name}_annotated", then=[encode])
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
        if names or field in ("image", "task", "solution"):
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
