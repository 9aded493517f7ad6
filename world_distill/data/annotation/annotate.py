"""Scene images to annotated records: an annotator (a VLM, or the sandbox's oracle) writes tasks and solutions.

Images are looked at first (`image_scan`): what is broken, poor or there already is not asked about, and is listed in
NAME.rejected.jsonl. Annotators are slow and cost money, so every answer goes at once into a journal (`journal`); a
restarted job asks nothing twice. The records and the data card NAME.card.json are written in the order of the images
when all have been asked about, so they say nothing of interruptions, threads or times.

Several machines can do a part each: neighbouring images, a shard of the records and a journal of their own. The last
one makes the set whole.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from absl import logging

from world_distill.data.annotation.asking import Questions
from world_distill.data.annotation.data_card import FILTERED, DataCard, Findings
from world_distill.data.annotation.journal import Journal
from world_distill.data.annotation.pair_rules import CHAT_MARK, check_pair, has_mark, task_key
from world_distill.data.images.decode import as_kept, decode_image, shrink
from world_distill.data.images.filters import Filters
from world_distill.data.images.ordered import map_ordered
from world_distill.data.images.png import ImageError
from world_distill.data.images.scan import Rejection, Scanned, scan
from world_distill.data.images.sources import FileImage, ImageSource, as_sources
from world_distill.data.images.unused import Unused
from world_distill.data.records.reader import AnnotatedRecord, RecordError, write_records
from world_distill.data.records.resumable import ResumableSet
from world_distill.data.records.shard_files import check_name, part_suffix, remove_leftovers
from world_distill.interfaces import Annotator, TaskPair


def annotate_images(
    images: Sequence[ImageSource | str | os.PathLike],
    annotator: Annotator,
    out_dir: str | os.PathLike,
    *,
    name: str,
    max_pairs: int,
    seed: int,
    shards: int = 1,
    only: int | None = None,
    validate: bool = True,
    filters: Filters | None = None,
    min_side: int = 16,
    max_side: int = 0,
    max_failures: float = 0.1,
    licence: str = "unspecified",
    unused: Unused | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Asks the annotator about every image and writes data set `name` of AnnotatedRecords into `out_dir`.

    Args:
      images: sources, in their order, or paths, in sorted order. Of those with the same bytes, the first counts.
      annotator: is asked with a seed of its own for each image, drawn from `seed` and the image, by as many threads as
        its `concurrency` says.
      out_dir: for the data set, its card, the journal and the list of rejected images.
      name: of the data set.
      max_pairs: tasks an image at most.
      seed: changes what is asked; answers to another seed are not taken from the journal.
      shards: files to spread the records over.
      only: the one part of `shards` to do, from 0; None does all. Each may be done by another process, on a machine of
        its own that sees `out_dir` and all images: those before the part are looked at, too, for the sake of repeats.
      validate: drop tasks that `check_pair` rejects, and repeated ones of an image.
      filters: which images are left out; None leaves out only repeated bytes.
      min_side: pixels below which an image cannot be used.
      max_side: pixels that the longer side is shrunk to before anyone sees it, the records included; 0: as it is.
      max_failures: share of the images that the annotator may fail on (AnnotationError). They are left out, and asked
        about again at the next call.
      licence: of images and texts, for the card; an image whose source names one has that.
      unused: what was passed over in finding the images: its lines go into the list of rejected images, and it learns
        which images are left out.
      progress: called with (images done, images).

    Returns:
      Counts: images, bad_images, repeated_images, filtered_REASON, asked, remembered, failed, nothing_to_do, pairs,
      kept, rejected_REASON (of pairs), and shards_missing with `only` (0: the data set is complete).

    Raises:
      ImageError: an image cannot be used; missing ones are listed all at once, before anything is asked.
      RecordError: a journal is damaged or in use by another process, no task is left (card and list of rejected images
        are written), the annotator failed too often, or the disk refuses.
      UserError: no server of the annotator can be reached, or none is of use.
    """
    sources, filters, out_dir = as_sources(images), filters or Filters(), pathlib.Path(out_dir)
    check_name(name, shards)
    if only is not None and not 0 <= only < shards:
        raise RecordError(f"no shard {only} among {shards}: they are counted from 0 to {shards - 1}")
    n = len(sources)
    part = range(n) if only is None else range(n * only // shards, n * (only + 1) // shards)
    missing = [s.where for s in (sources[i] for i in part) if isinstance(s, FileImage) and not s.path.is_file()]
    if missing and not filters.broken:
        raise ImageError(f"{len(missing)} of {len(part)} images are missing: {', '.join(missing[:20])}")
    request = {"annotator": annotator.name, "seed": seed, "max_pairs": max_pairs}
    request |= {"max_side": max_side} if max_side else {}
    sizes = {"min_side": min_side, "max_side": max_side}
    suffix = "" if only is None else part_suffix(only, shards)
    with Journal(out_dir, name, request, part=suffix) as journal:
        remove_leftovers(out_dir, [f"{name}{suffix}{end}" for end in (".card.json", ".rejected.jsonl", ".json")])
        ask = functools.partial(
            Questions, annotator, journal, max_pairs=max_pairs, seed=seed, max_failures=max_failures
        )
        seen = _ask_about(scan(sources, part, filters, **sizes), len(part), journal, ask, progress)
        counts = seen.counts()
        kept = {digest: _choose(pairs, max_pairs, validate, counts) for digest, pairs in seen.answers.items()}
        kept = {digest: pairs for digest, pairs in kept.items() if pairs}
        licences = {digest: seen.accepted[digest].metadata.get("licence", licence) for digest in kept}
        skipped = [] if unused is None else unused.lines
        if unused is not None:
            for source, rejection in seen.rejected:
                unused.add(source.name, rejection.reason)

        def record_of(read: tuple[str, bytes]) -> list[AnnotatedRecord]:
            digest, data = read
            origin = {"file": seen.accepted[digest].name, "annotator": annotator.name, "licence": licences[digest]}
            return _records(seen.accepted[digest], data, digest, kept[digest], origin, **sizes)

        # Bytes are read in this thread, in order, as compressed archives and tables want it.
        read = ((digest, seen.accepted[digest].read()) for digest in kept)
        records = itertools.chain.from_iterable(map_ordered(record_of, read))
        filtered_by = {"validated": validate, **sizes, "filters": dataclasses.asdict(filters)}
        card = DataCard(out_dir, name, {"name": name, "licence": licence, **request, **filtered_by})
        pairs = itertools.chain.from_iterable(kept.values())
        findings = Findings.of(counts, pairs, licences.values(), seen.rejected, () if only else skipped)
        if not kept and only is None:
            card.write([findings])
            raise RecordError(_nothing_left(out_dir, name, counts))
        if only is None:
            write_records(out_dir, name, records, shards)
            card.write([findings])
            return dict(counts)
        findings.write(out_dir, name, only, shards)
        names = hashlib.sha256("\n".join(source.name for source in sources).encode()).hexdigest()
        target = ResumableSet(out_dir, name, shards, request={**card.head, "images": names}, sequential=True)
        target.write(only, records)
        left = target.join()
        if not left:
            card.write([Findings.read(out_dir, name, i, shards) for i in range(shards)])
        return dict(counts) | {"shards": shards, "shards_missing": len(left)}


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What became of the images, in their order."""

    images: int
    accepted: dict[str, ImageSource]  # by hash
    answers: dict[str, list[TaskPair]]  # to those
    rejected: list[tuple[ImageSource, Rejection]]
    asked: int  # answers of this call

    def counts(self) -> collections.Counter:
        reasons = collections.Counter(rejection.reason for _, rejection in self.rejected)
        counts = {"images": self.images, "bad_images": reasons["broken"], "repeated_images": reasons["repeated"]}
        counts |= {f"filtered_{reason}": reasons[reason] for reason in FILTERED if reasons[reason]}
        counts |= {"asked": self.asked, "remembered": len(self.answers) - self.asked, "failed": reasons["failed"]}
        counts["nothing_to_do"] = sum(not pairs for pairs in self.answers.values())
        return collections.Counter(counts | {"pairs": 0, "kept": 0})


def _ask_about(
    scanned: Iterable[Scanned],
    total: int,
    journal: Journal,
    ask: Callable[..., Questions],
    progress: Callable[[int, int], None] | None,
) -> _Seen:
    """Has all good images answered, from the journal or by the annotator, and says what became of each."""
    lock, done = threading.Lock(), 0

    def settled() -> None:
        nonlocal done
        with lock:
            done += 1
            if progress is not None:
                progress(done, total)

    accepted: dict[str, ImageSource] = {}
    rejected: list[tuple[ImageSource, Rejection]] = []
    with ask(settled=settled) as questions:
        for image in scanned:
            if image.rejection is not None:
                if image.rejection.reason == "broken":
                    logging.warning("%s", image.rejection.value)
                rejected.append((image.source, image.rejection))
                settled()
                continue
            accepted[image.digest] = image.source
            if image.digest in journal.answers:
                questions.remember()
            else:
                assert image.pixels is not None  # nothing is against it
                questions.ask(image.digest, image.pixels, image.source.where)
    failed = [digest for digest in accepted if digest in questions.failed]
    rejected += [(accepted.pop(digest), Rejection("failed", questions.failed[digest])) for digest in failed]
    answers = {digest: journal.answers[digest] for digest in accepted}
    return _Seen(total, accepted, answers, rejected, questions.asked)


def _nothing_left(folder: pathlib.Path, name: str, counts: Mapping[str, int]) -> str:
    """Why no task is left, and what to do."""
    shown = ", ".join(f"{key} {count}" for key, count in counts.items() if count)
    text = f"no task is left to write ({shown}); {folder / name}.rejected.jsonl lists the images"
    if any(count for key, count in counts.items() if key.startswith("filtered_")):
        text += "; config.filters says which are left out: see '--config.filters=?'"
    return text


def _records(
    image: ImageSource,
    data: bytes,
    digest: str,
    pairs: Sequence[TaskPair],
    origin: dict[str, str],
    *,
    min_side: int,
    max_side: int,
) -> list[AnnotatedRecord]:
    """The records of one image, as it was annotated. Raises ImageError if it is another one by now."""
    if hashlib.sha256(data).hexdigest() != digest:
        raise ImageError(f"{image.where} has changed since it was annotated")
    kept = as_kept(data, shrink(decode_image(data, image.where, min_side=min_side), max_side))
    fields = {"image_id": digest[:16], "image_png": kept, "source": {**image.metadata, **origin}}
    return [AnnotatedRecord(id=f"{digest[:16]}-{i}", **dataclasses.asdict(p), **fields) for i, p in enumerate(pairs)]


def _choose(pairs: list[TaskPair], max_pairs: int, validate: bool, counts: collections.Counter) -> list[TaskPair]:
    """The pairs of one image that go into the data set; `counts` learns what became of the others."""
    kept, tasks = [], set()
    for pair in pairs:
        # Marks of a chat are refused whatever is validated: they would reach text encoders and judges.
        reason = check_pair(pair) if validate else CHAT_MARK if has_mark(pair) else None
        if reason is None and validate and task_key(pair.task) in tasks:
            reason = "repeated"
        if reason is None and len(kept) == max_pairs:
            reason = "above_max_pairs"
        if reason is None:
            tasks.add(task_key(pair.task))
            kept.append(dataclasses.replace(pair, task=pair.task.strip(), solution=pair.solution.strip()))
        else:
            counts[f"rejected_{reason}"] += 1
    counts["pairs"] += len(pairs)
    counts["kept"] += len(kept)
    return kept
