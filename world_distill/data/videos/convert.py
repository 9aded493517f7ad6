"""From videos to AnnotatedRecords: the first frame is the scene, and `source` names the video.

The pixels of the clips stay where they are until `encode` reads them, which knows the model's frame rate and length.
Writes the records, NAME.left_out.jsonl with a line for each video that makes none, and NAME.card.json with counts. All
three depend on the files alone: importing again gives the same bytes.
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from world_distill.data.annotation.pair_rules import CHAT_MARK, has_mark
from world_distill.data.images.ordered import map_ordered
from world_distill.data.images.png import encode_png
from world_distill.data.records.reader import AnnotatedRecord, RecordError, write_atomically, write_records
from world_distill.data.records.resumable import left_out_path
from world_distill.data.records.shard_files import check_name, disk
from world_distill.data.videos.decode import VideoError, first_frame
from world_distill.data.videos.digest import file_digest
from world_distill.data.videos.find import LeftOut, Video
from world_distill.interfaces import TaskPair

VIDEOS = "videos"  # key of an annotated set's metadata: the folder of its videos


def import_videos(
    root: pathlib.Path,
    found: Sequence[Video | LeftOut],
    folder: pathlib.Path,
    name: str,
    *,
    shards: int = 1,
    licence: str = "unspecified",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes data set `name` of AnnotatedRecords into `folder`; returns what is on its card.

    Args:
      root: folder of all videos, kept in the index.
      found: `find.find_videos`.
      folder: of the new data set.
      name: of the new data set.
      shards: files to spread the records over.
      licence: of videos whose row names none.
      progress: called with (videos done, videos).

    Raises:
      RecordError: no video can be used (NAME.left_out.jsonl says why), or the disk refuses.
    """
    check_name(name, shards)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    left_out: list[LeftOut] = []
    images: collections.Counter[str] = collections.Counter()
    records = _records(found, left_out, images, licence, progress)
    first = next(records, None)
    if first is not None:
        write_records(folder, name, itertools.chain([first], records), shards, metadata={VIDEOS: str(root)})
    lines = [json.dumps(vars(line), ensure_ascii=False) + "\n" for line in left_out]
    with disk(folder):
        write_atomically(left_out_path(folder, name), "".join(lines).encode("utf-8", "replace"))
    reasons = collections.Counter(line.reason for line in left_out)
    if first is None:
        said = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise RecordError(f"{root}: no video can be used ({said}); {left_out_path(folder, name)} says why")
    counts = {"videos": len(images), "records": sum(images.values()), "left_out": len(left_out)}
    counts |= {f"left_out_{reason}": count for reason, count in sorted(reasons.items())}
    card = {"name": name, "licence": licence, "counts": counts}
    with disk(folder):
        write_atomically(folder / f"{name}.card.json", json.dumps(card, indent=1).encode())
    return card


def _records(
    found: Sequence[Video | LeftOut],
    left_out: list[LeftOut],
    images: collections.Counter[str],
    licence: str,
    progress: Callable[[int, int], None] | None,
) -> Iterator[AnnotatedRecord]:
    """The records in order; `left_out` gets what makes none, `images` how many records each video has."""
    seen: set[tuple[str, str]] = set()
    for number, (item, read) in enumerate(zip(found, map_ordered(_read, found), strict=True), 1):
        if progress is not None:
            progress(number, len(found))
        if isinstance(item, Video) and not isinstance(read, LeftOut):
            digest, picture = read
            if (digest, item.task) not in seen:
                seen.add((digest, item.task))
                source = {"video": item.name, "rows": item.where, "licence": licence, **item.origin}
                yield AnnotatedRecord(
                    f"{digest}-{images[digest]}", digest, picture, item.task, item.solution, item.agent, item.kind,
                    source,
                )  # fmt: skip
                images[digest] += 1
                continue
            read = LeftOut(item.name, item.where, "repeated", "the same video with the same task stands before it")
        assert isinstance(read, LeftOut)
        left_out.append(read)


def _read(item: Video | LeftOut) -> tuple[str, bytes] | LeftOut:
    """(a hash of the file, its first frame as PNG), or why it cannot be used."""
    if isinstance(item, LeftOut):
        return item
    if has_mark(TaskPair(item.task, item.solution, item.agent, item.kind)):
        return LeftOut(item.name, item.where, CHAT_MARK, "a text holds a mark of a chat")
    try:
        return file_digest(item.path), encode_png(first_frame(item.path))
    except VideoError as error:
        return LeftOut(item.name, item.where, "damaged", str(error))
    except OSError as error:
        return LeftOut(item.name, item.where, "unreadable", f"cannot be read ({error.strerror or error})")
