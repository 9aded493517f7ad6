"""`world-distill judgments`: what the judge said, on record: counted, compared, exported, merged, and asked again."""

import argparse
import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from world_distill import arguments, components, judgment_figures, judgment_files, rejudge
from world_distill.config import ConfigDict, UserError, from_json, load_config, override
from world_distill.judges.cache import JudgmentCache
from world_distill.judges.rubric import load_rubric
from world_distill.judges.segments import is_shared
from world_distill.kept_clips import KeptClips

HELP = """\
Audit a judge: what it was asked and answered, and whether another judge agrees.

PATH is a run's folder, a cache file (judgments.sqlite), or the address that hosts share one through (gs://bucket/run).
Without further flags it prints, for each judge and question, how many answers there are, how often it said yes, how
its log-odds are spread, and how many are undecided (within +-1); how many of the run's questions the cache answered;
and where two judges, or two wordings, were asked about the same clip, how well they agree.

  world-distill judgments runs/mine
  world-distill judgments runs/mine --export judgments.parquet        or .jsonl, .jsonl.gz
  world-distill judgments all.sqlite --merge host0.sqlite host1.sqlite gs://bucket/run

--merge takes over the answers of other caches. An answer that is there stays; one that differs is counted and listed.

A reward can be gamed: the clips get to please one judge, and not to be better. So keep a share of the judged clips
while training (--config.judge.keep_clips=0.05), and have another model, or other wordings, judge them again:

  world-distill judgments runs/mine --rejudge --config.judge.options.model=Another/VLM
  world-distill judgments runs/mine --rejudge --config.judge.rubric=my/questions --json audit.json
  world-distill judgments runs/mine --rejudge --config wan22_5b --flips 20

The judge is that of the run's config, or of --config, with these changes. For each question it shows in how many
clips both say the same (sign), Spearman's rank correlation (1: the same order, 0: none), and the clips on which they
differ most, with their tasks. Low agreement on clips late in training, where it was high early, is the sign of gaming.
Answers go into the cache, so that an interrupted call goes on where it stopped. PATH has to be a file or a folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="run folder, cache file, or shared address (gs://…, folder/)")
    parser.add_argument("--export", metavar="FILE", type=pathlib.Path, help="write all judgments as JSONL or Parquet")
    parser.add_argument("--merge", metavar="CACHE", nargs="+", default=[], help="take over the answers of these caches")
    parser.add_argument("--rejudge", action="store_true", help="have the config's judge judge the kept clips again")
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="for --rejudge (default: the config of the run PATH)")
    parser.add_argument("--clips", metavar="DIR", type=pathlib.Path, help="kept clips (default: judged_clips by PATH)")
    parser.add_argument("--flips", type=int, default=10, help="disagreements to list for each question (default: 10)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.overrides and not args.rejudge:
        raise UserError("--config.KEY is for --rejudge")
    result: dict[str, Any] = {"path": args.path}
    with open_caches(args.path, writes=bool(args.merge) or args.rejudge, creates=bool(args.merge)) as cache:
        for other in args.merge:
            result.setdefault("merged", []).append(merge(cache, other))
        if args.rejudge:
            result["rejudged"] = _rejudge(args, cache)
        elif args.export:
            count = judgment_files.export(cache.entries(), args.export)
            arguments.say(f"{count} judgments in {args.export}")
            result |= {"exported": count, "file": args.export}
        else:
            result |= judgment_figures.overview(cache)
            result["hit_rate"] = judgment_figures.hit_rate(pathlib.Path(args.path))
            arguments.say(judgment_figures.text(result, limit=args.flips))
    if args.json:
        arguments.write_json(args.json, result)
    return 0


def merge(cache: JudgmentCache, other: str) -> dict[str, Any]:
    """Takes over what `other` holds, and says what came of it."""
    new = known = 0
    conflicts = []
    with open_caches(other) as source:
        for part in judgment_files.parts(source.entries()):
            added = cache.add(part, source=other)
            new, known, conflicts = new + added.new, known + added.known, conflicts + added.conflicts
    arguments.say(f"{other}: {new} new, {known} known, {len(conflicts)} that differ from answers that stay")
    rows = [
        {
            "key": c.entry.key, "kept": c.kept, "other": c.entry.log_odds, "judge": c.entry.judge,
            "question": c.entry.about.question, "task": c.entry.about.task,
        }
        for c in conflicts
    ]  # fmt: skip
    for row in rows[:10]:
        arguments.say(f"  kept {row['kept']:+.3f}, other {row['other']:+.3f}: {row['question']} of {row['task']}")
    return {"path": other, "new": new, "known": known, "conflicts": rows}


@contextlib.contextmanager
def open_caches(path: str, *, writes: bool = False, creates: bool = False) -> Iterator[JudgmentCache]:
    """The cache that a file, a run's folder or a shared address holds; a copy in a temporary folder of several.

    Raises:
      UserError: there is none, or it should be written to and is not one file.
    """
    files = _files(path, creates)
    if len(files) == 1:
        with JudgmentCache(files[0]) as cache:
            yield cache
        return
    if writes:
        raise UserError(f"{path} is not one cache file: merge it into one first (judgments all.sqlite --merge {path})")
    with tempfile.TemporaryDirectory() as folder, JudgmentCache(pathlib.Path(folder) / "all.sqlite") as cache:
        for file in files:
            with JudgmentCache(file) as source:
                for part in judgment_files.parts(source.entries()):
                    cache.add(part, source=str(file))
        if not files:
            judgment_files.add_segments(cache, path)
        yield cache


def _files(path: str, creates: bool) -> Sequence[pathlib.Path]:
    """The cache files at `path`; none for a shared address."""
    local = pathlib.Path(path)
    if "://" in path or (local / "segments").is_dir():
        return ()
    if local.is_dir():
        config = _config_of(local)
        named = config.judge.cache if config is not None else ""
        if named and not is_shared(named):
            local = pathlib.Path(named)
        elif files := sorted(local.glob("judgments*.sqlite")):
            return files
        else:
            raise UserError(f"{path} holds no judgments.sqlite: nothing was judged there yet")
    if not local.exists() and not creates:
        raise UserError(f"{local}: no such file")
    return (local,)


def _config_of(folder: pathlib.Path) -> ConfigDict | None:
    path = folder / "config.json"
    return from_json(path.read_text()) if path.exists() else None


def _rejudge(args: argparse.Namespace, cache: JudgmentCache) -> dict[str, Any]:
    path = pathlib.Path(args.path)
    folder = path if path.is_dir() else path.parent
    config = load_config(args.config) if args.config else _config_of(folder)
    if config is None:
        raise UserError(f"{folder} holds no config.json: --config says which judge to ask")
    override(config, args.overrides)
    clips = KeptClips(args.clips or folder / "judged_clips")
    judge, rubric = components.make(config, "judge"), load_rubric(config.judge.rubric or None)
    result = rejudge.rejudge(cache, clips, judge, rubric)
    arguments.say(rejudge.text(result, limit=args.flips))
    return result
