"""Videos with what is said of them: folders with texts beside the files, and tables of paths.

    folder      clips/0.mp4 with clips/0.txt; or metadata.jsonl, metadata.csv about the videos of their folder
    table       JSONL, JSON or CSV, compressed or not: a path and a task or a caption a row

A task is what the Executor is told, a caption what the Demonstrator is told. Where there is one text alone, it is what
the Executor is told; a caption then serves as the solution, too.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from world_distill.data import field_names
from world_distill.data.images import kinds
from world_distill.data.images.compression import DAMAGE
from world_distill.data.images.files import File, find_files, is_address
from world_distill.data.images.png import ImageError
from world_distill.data.images.rows import Row, text_rows
from world_distill.data.images.sources import is_inside
from world_distill.data.images.unused import Unused
from world_distill.data.videos.decode import SUFFIXES
from world_distill.data.worldtasks.values import as_paragraphs, as_text, has_agent, with_agent
from world_distill.errors import UserError

FIELDS = (
    "video",
    "video_path",
    "video_file",
    "media_path",
    "clip",
    "clip_path",
    "file_name",
    "filename",
    "path",
    "mp4",
)


@dataclasses.dataclass(frozen=True)
class Video:
    """A video with its texts.

    Attributes:
      path: of the file.
      name: its path below the folder of all videos.
      task: what the Executor is told.
      solution: what the Demonstrator is told; empty if nothing is.
      agent: the one that the task names; may be empty.
      kind: of the task.
      where: file and line of the words, for messages.
      origin: licence, url and author, as far as known.
    """

    path: pathlib.Path
    name: str
    task: str
    solution: str
    agent: str
    kind: str
    where: str
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A video or a row that makes no record: `reason` is one word for counting, `why` a sentence."""

    video: str
    where: str
    reason: str
    why: str


def find_videos(
    spec: str | os.PathLike, *, root: str | os.PathLike | None = None, unused: Unused | None = None
) -> tuple[pathlib.Path, list[Video | LeftOut]]:
    """(the folder of all videos, each video with its texts, in order).

    Args:
      spec: a folder (with all below it), or a table.
      root: folder that has the videos that a table names; None: that of the table. None outside of it is read.
      unused: learns what was passed over.

    Raises:
      UserError: an address; a file that is no table; no videos; `root` beside a folder; a damaged table.
    """
    spec, unused = os.fspath(spec), Unused() if unused is None else unused
    if is_address(spec) or (root is not None and is_address(os.fspath(root))):
        raise UserError(f"{spec}: videos are read from folders of this machine: copy them first")
    if not os.path.exists(spec):
        raise UserError(f"{spec}: no such file or folder")
    is_folder = os.path.isdir(spec)
    if is_folder and root is not None:
        raise UserError(f"--video-root is for tables, whose rows name videos; {spec} is a folder")
    if not is_folder and kinds.rows_of(spec) not in ("jsonl", "json", "csv"):
        raise UserError(f"{spec}: neither a folder of videos nor a table of them (.jsonl, .json, .csv)")
    try:
        files = find_files(spec, unused)
        folder = pathlib.Path(spec if is_folder else root or os.path.dirname(spec) or ".").resolve()
        found = list(_in_folder(folder, files, unused) if is_folder else _in_table(folder, files[0]))
    except (ImageError, *DAMAGE) as error:
        raise UserError(f"{spec}: {error}") from error
    if not found:
        raise UserError(f"{spec}: no videos ({', '.join(SUFFIXES)})")
    return folder, found


def _in_folder(root: pathlib.Path, files: Sequence[File], unused: Unused) -> Iterator[Video | LeftOut]:
    videos = [file for file in files if file.name.lower().endswith(SUFFIXES) and not kinds.is_unremarkable(file.name)]
    tables = [file for file in files if _is_metadata(file)]
    texts = {os.path.splitext(file.path)[0]: file for file in files if file.name.lower().endswith(".txt")}
    described = set()
    for table in tables:
        for item in _in_table(root, table):
            if isinstance(item, Video):
                described.add(os.path.realpath(item.path))
            yield item
    for video in videos:
        if os.path.realpath(video.path) in described:
            continue
        text = texts.pop(os.path.splitext(video.path)[0], None)
        if text is None:
            yield LeftOut(video.name, video.name, "no_text", f"no {_stem(video.name)}.txt beside it")
            continue
        with text.open() as opened:
            words = opened.read(1 << 20).decode("utf-8-sig", "replace")
        yield _video(pathlib.Path(video.path), video.name, {"task": words}, text.name)
    used = {file.path for file in (*videos, *tables)}
    for file in files:
        if file.path in used or kinds.is_unremarkable(file.name):
            continue
        if file.name.lower().endswith(".txt"):
            if os.path.splitext(file.path)[0] in texts:
                unused.add(file.name, "no video beside it")
        else:
            is_rows = kinds.rows_of(file.name) is not None
            unused.add(file.name, "rows: name the file itself" if is_rows else "no video by its name")


def _in_table(root: pathlib.Path, table: File) -> Iterator[Video | LeftOut]:
    for row in text_rows(table):
        where = f"{table.name}:{row.number}"
        if row.bad is not None:
            yield LeftOut("", where, *row.bad)
            continue
        yield _of_row(root, row, where)


def _of_row(root: pathlib.Path, row: Row, where: str) -> Video | LeftOut:
    fields = field_names.with_plain_names(row.fields)
    given = next((fields[name] for name in FIELDS if isinstance(fields.get(name), str) and fields[name].strip()), None)
    if given is None:
        has = ", ".join(map(str, row.fields))[:200]
        return LeftOut("", where, "no_video", f"no path in any of {', '.join(FIELDS)}; it has {has}")
    path = next((p for p in (pathlib.Path(row.file.folder) / given, root / given) if p.is_file()), None)
    if path is None:
        return LeftOut(given, where, "missing", "is not there: --video-root names the folder that has the videos")
    if not is_inside(root, path):
        return LeftOut(given, where, "outside", f"lies outside of {root.name}/: --video-root names another folder")
    name = pathlib.Path(os.path.relpath(path.resolve(), root)).as_posix()
    return _video(path, name, fields, where)


def _video(path: pathlib.Path, name: str, fields: Mapping[str, Any], where: str) -> Video | LeftOut:
    """A video with the texts of its row; `fields` have plain names."""
    task, caption = (_first(field, fields) for field in ("task", "solution"))
    if not task and not caption:
        return LeftOut(name, where, "no_text", "neither a task nor a caption")
    caption = caption or ("" if has_agent(task) else task)
    task, agent = with_agent(as_text(task) or as_text(caption) or "", "")
    origin = {field: text for field in field_names.PROVENANCE if (text := _first(field, fields))}
    kind = _first("kind", fields) or "video"
    return Video(path, name, task, caption, _first("agent", fields) or agent, kind, where, origin)


def _first(field: str, fields: Mapping[str, Any]) -> str:
    """The first text that a row has under a field's names; "" if there is none."""
    return next((text for _, value in field_names.values_of(field, fields) if (text := as_paragraphs(value))), "")


def _is_metadata(file: File) -> bool:
    return kinds.rows_of(file.name) in ("jsonl", "json", "csv") and kinds.base_name(file.name).startswith("metadata.")


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]
