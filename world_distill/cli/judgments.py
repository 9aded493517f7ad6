"""`world-distill judgments`."""

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from world_distill import console
from world_distill.cli import arguments
from world_distill.errors import UserError
from world_distill.storage import atomic

if TYPE_CHECKING:
    from world_distill.judges.memory.cache import JudgmentCache

CONTROL_CLIPS = 32  # that --controls takes by default

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

A judge can also be wrong in ways that training finds. Negative controls are clips to which the answer is no: a still
picture, another task's clip, a clip backwards or out of order, "DONE" painted into the frames, a task that tells the
judge to say yes. --controls makes them from the kept clips, has the judge answer, and warns of each that passes:

  world-distill judgments runs/mine --controls
  world-distill judgments runs/mine --controls --limit 100 --config.judge.options.model=Another/VLM --json controls.json

Answers go into the cache, so that an interrupted call goes on where it stopped. PATH has to be a file or a folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="run folder, cache file, or shared address (gs://…, folder/)")
    parser.add_argument("--export", metavar="FILE", type=arguments.path, help="write all judgments as JSONL or Parquet")
    parser.add_argument("--merge", metavar="CACHE", nargs="+", default=[], help="take over the answers of these caches")
    parser.add_argument("--rejudge", action="store_true", help="have the config's judge judge the kept clips again")
    parser.add_argument("--controls", action="store_true", help="have the config's judge answer negative controls")
    parser.add_argument(
        "--limit",
        metavar="N",
        type=arguments.LIMIT,
        help=f"kept clips that --controls takes, evenly over the run; 0: all (default: {CONTROL_CLIPS})",
    )
    parser.add_argument(
        "--config", metavar="FILE.py[:ARG]", help="for --rejudge and --controls (default: the config of the run PATH)"
    )
    parser.add_argument(
        "--clips", metavar="DIR", type=arguments.path, help="kept clips (default: judged_clips by PATH)"
    )
    parser.add_argument(
        "--flips",
        type=arguments.LIMIT,
        default=10,
        help="disagreements to list for each question (default: 10)",
    )
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from world_distill.evaluation import agreement
    from world_distill.judges.memory import transfer

    asks = args.rejudge or args.controls
    if (args.overrides or args.config) and not asks:
        raise UserError("--config is for --rejudge and --controls")
    if sum(map(bool, (args.rejudge, args.controls, args.export))) > 1:
        raise UserError("--rejudge, --controls and --export are calls of their own: give one of them")
    if args.limit is not None and not args.controls:
        raise UserError("--limit is for --controls")
    result: dict[str, Any] = {"path": args.path}
    writes, where = bool(args.merge) or asks, args.path
    with transfer.open_caches(args.path, writes=writes, creates=bool(args.merge)) as cache:
        for other in args.merge:
            merged = transfer.merge(cache, other)
            result.setdefault("merged", []).append(merged)
            _say_merged(merged)
        if args.rejudge:
            result["rejudged"] = _rejudge(args, cache)
            made = "had the kept clips judged again"
        elif args.controls:
            result["controls"] = _controls(args, cache)
            made = "had negative controls judged"
        elif args.export:
            count = transfer.export(cache.entries(), args.export)
            made, where = f"exported {count} judgments", args.export
            result |= {"exported": count, "file": args.export}
        else:
            result |= agreement.overview(cache)
            result["hit_rate"] = agreement.hit_rate(pathlib.Path(args.path))
            console.say(agreement.text(result, limit=args.flips))
            made = "took over the answers of other caches" if args.merge else "counted the answers; nothing is changed"
    console.finish(made, where, then=_next(args))
    if args.json:
        atomic.write_json(args.json, result)
    return 0


def _next(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """The calls that ask about kept clips, where there are any."""
    from world_distill.judges.memory.transfer import config_of

    folder = _folder(args.path)
    if args.rejudge or not (args.clips or folder / "judged_clips").is_dir():
        return []
    config = config_of(folder)
    other = () if config is not None else ("--config", "CONFIG")
    if config is not None and "model" not in config.judge.options:  # a judge without a VLM
        other = ("--config.judge.factory=world_distill.judges:ServerJudge",)
    again = ("judgments", args.path, "--rejudge", *other, "--config.judge.options.model=OTHER")
    return [again] if args.controls else [again, ("judgments", args.path, "--controls")]


def _folder(path: str) -> pathlib.Path:
    return pathlib.Path(path) if pathlib.Path(path).is_dir() else pathlib.Path(path).parent


def _say_merged(merged: dict[str, Any]) -> None:
    conflicts = merged["conflicts"]
    console.say(
        f"{merged['path']}: {merged['new']} new, {merged['known']} known, {len(conflicts)} that differ from answers"
        " that stay"
    )
    for row in conflicts[:10]:
        console.say(f"  kept {row['kept']:+.3f}, other {row['other']:+.3f}: {row['question']} of {row['task']}")


def _rejudge(args: argparse.Namespace, cache: "JudgmentCache") -> dict[str, Any]:
    from world_distill.programs import rejudge

    result = rejudge.rejudge(cache, *_asked(args))
    console.say(rejudge.text(result, limit=args.flips))
    return result


def _controls(args: argparse.Namespace, cache: "JudgmentCache") -> dict[str, Any]:
    from world_distill.evaluation import controls
    from world_distill.programs.judge_controls import judge_controls

    result = judge_controls(cache, *_asked(args), limit=CONTROL_CLIPS if args.limit is None else args.limit)
    console.say(controls.text(result))
    return result


def _asked(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The kept clips by PATH, the judge that answers about them, and its questions."""
    from world_distill import build
    from world_distill.judges.memory.kept_clips import KeptClips
    from world_distill.judges.memory.transfer import config_of
    from world_distill.settings.loading import load_config, override

    folder = _folder(args.path)
    config = load_config(args.config) if args.config else config_of(folder)
    if config is None:
        raise UserError(f"{folder} holds no config.json: --config says which judge to ask")
    build.make_room(config, args.overrides)
    override(config, args.overrides)
    judge = build.make(config, "judge")
    return KeptClips(args.clips or folder / "judged_clips"), judge, build.make_rubric(config, judge=judge)
