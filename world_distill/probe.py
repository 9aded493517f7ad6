"""`world-distill probe`: before training, is the Demonstrator better than the Executor at all?"""

import argparse
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from world_distill import arguments, components, prepare, runs
from world_distill.collect import TooFewJudgments
from world_distill.config import UserError
from world_distill.data.negative import read_negative, write_negative
from world_distill.data.pipeline import fixed_batches
from world_distill.data.records import EncodedRecord, RecordReader, write_records
from world_distill.interfaces import Judge, ModelFamily
from world_distill.judges.cache import JudgmentCache
from world_distill.judges.judging import judge_clips
from world_distill.judges.rubric import Rubric, load_rubric
from world_distill.lora_files import read_lora
from world_distill.probe_figures import ROLES, Probed, figures, table, words
from world_distill.scoring import Evaluator
from world_distill.sharding import tree_shardings
from world_distill.structs import Negative, PyTree

HELP = """\
Before training: have the judge compare the Demonstrator with the Executor on a sample of tasks.

Distillation can teach the Executor no more than the Demonstrator shows. So both make clips for the same tasks from the
same noise, the Demonstrator told the solution, the Executor (the base, or the LoRA file of config.executor.start) told
the task, each with its own guidance (config.demonstrator.guidance, config.rollout.guidance); and the config's judge
answers its questions about them. Shows how often it said yes and the mean log-odds, clipped as the reward clips them
(config.rollout.clip), for each question and each kind of task, with the paired difference and its 95 % interval; and
says in words whether the Demonstrator is better, and where it is not.

The sample is drawn by the seed, and a larger one has the smaller one's tasks. Answers go into the judgment cache of
WORKDIR, so that a call that was interrupted, or is repeated, asks nothing twice.

  world-distill probe --config sandbox --data runs/quickstart/data --workdir runs/probe
  world-distill probe --config wan22_5b --data data --limit 200 --clips 2 --workdir runs/wan --json probe.json
  world-distill probe --config wan22_5b --data data --keep train_better --clips 4 --workdir runs/wan

--keep NAME looks at all tasks and writes a record set without those on which the Demonstrator is not better: a task
stays if, averaged over its clips and over the questions, the Demonstrator's clipped log-odds are above the Executor's.
Equal counts as not better, as when both are sure to succeed. Tasks without an answer stay, and are counted. One clip
tells little about one task: take --clips 4 or more. To train on it: --config.train_set=NAME.
"""
_SAMPLE = 64  # tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    arguments.add_workdir(parser)
    parser.add_argument("--data", type=pathlib.Path, help="folder of the encoded records (default: config.data)")
    parser.add_argument("--name", default="train", help="name of the record set (default: train)")
    parser.add_argument("--limit", type=int, help=f"tasks to look at; 0: all (default: {_SAMPLE}, and all with --keep)")
    parser.add_argument("--clips", type=int, default=1, help="clips a task, of each of the two (default: 1)")
    parser.add_argument("--keep", metavar="NAME", help="write the tasks on which the Demonstrator is better")
    arguments.add_seed(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    config = arguments.config_from(args)
    folder = args.data or (pathlib.Path(config.data) if config.data else None)
    _check_flags(args, folder)
    reader = RecordReader(folder, args.name, EncodedRecord)
    limit = (0 if args.keep else _SAMPLE) if args.limit is None else args.limit
    with prepare.progress_bar("clip") as show:
        probed, judged = probe(config, reader, args.workdir, limit=limit, clips=args.clips, progress=show)
    found = {"data": str(reader.index_path), "seed": config.seed, **judged, **figures(probed)}
    arguments.say(table(found["rows"]) + "\n\n" + words(found))
    if found["invalid"]:
        arguments.say(f"{found['invalid']} of {found['tasks'] * found['clips']} pairs of clips have no judgment.")
    if args.keep:
        found["kept"] = keep_better(probed, reader, folder, args.keep)
        arguments.say(", ".join(f"{name}: {count}" for name, count in found["kept"].items()))
    if args.json:
        arguments.write_json(args.json, found)
    return 0


def _check_flags(args: argparse.Namespace, folder: pathlib.Path | None) -> None:
    if folder is None:
        raise UserError("--data is needed: the folder of the encoded records (`world-distill encode`)")
    if args.clips < 1 or (args.limit or 0) < 0:
        raise UserError("--clips is at least 1, --limit at least 0")
    if args.keep and args.limit:
        raise UserError("--keep looks at all tasks: leave --limit out")
    if args.keep == args.name:
        raise UserError(f"--keep {args.keep} would replace the records that are looked at: give another name")


def probe(
    config,
    reader: RecordReader,
    workdir: pathlib.Path,
    *,
    limit: int = 0,
    clips: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Probed, dict[str, Any]]:
    """The judge's answers about both models' clips, and what was asked: judge, rubric, hits and misses of the cache.

    Args:
      config: names model, sampler, judge and rubric.
      reader: encoded records.
      workdir: of the judgment cache.
      limit: tasks to look at; 0 takes all.
      clips: clips a task, for each of the two.
      progress: called with (clips judged, clips).

    Raises:
      TooFewJudgments: more of the clips have no judgment than config.rollout.max_invalid allows.
      UserError: the records do not fit the model, or the judge fails its own test.
    """
    mesh = components.start_devices(config)
    family = components.make_family(config, mesh)
    if (shape := reader[0].scene.shape[1:]) != family.latent_shape[1:]:
        raise UserError(f"{reader.index_path}: scenes are {shape} latents, config.model has {family.latent_shape[1:]}")
    judge, rubric = components.make(config, "judge"), load_rubric(config.judge.rubric or None)
    for line in judge.check() if hasattr(judge, "check") else ():
        arguments.say(f"judge: {line}")
    base, lora = components.load_base(family, config, mesh), _executor(config, family, mesh)
    evaluator = runs.make_evaluator(config, family, mesh, None)
    chosen = sample_of(len(reader), limit, config.seed)
    batches = fixed_batches(reader, config.evaluate_batch, text_length=config.text_length, indices=chosen)
    parts: dict[str, list] = {role: [] for role in ROLES}
    ids, tasks, kinds = [], [], []
    with runs.open_cache(config, workdir) as cache:
        for batch in batches:
            count = int(batch["weight"].sum())
            for role, text, weights in ((ROLES[0], "solution", None), (ROLES[1], "task", lora)):
                negative = evaluator.negative(reader, text)
                made = [
                    _clips(evaluator, batch, base, weights, text, number, negative)[:count] for number in range(clips)
                ]
                parts[role].append(_judge(judge, cache, made, batch, rubric))
                if progress is not None:
                    done = 2 * len(ids) + (1 + ROLES.index(role)) * count
                    progress(done * clips, 2 * len(chosen) * clips)
            ids, tasks, kinds = (a + batch[n][:count] for a, n in ((ids, "ids"), (tasks, "task"), (kinds, "kind")))
        asked = {"hits": cache.hits, "misses": cache.misses}
    scores = {role: {q: np.concatenate([p[q] for p in parts[role]]) for q in rubric.names} for role in ROLES}
    probed = Probed(ids, tasks, kinds, scores, float(config.rollout.clip))
    _check_judged(probed, config.rollout.max_invalid)
    return probed, {"judge": judge.name, "rubric": rubric.version, **asked}


def sample_of(total: int, limit: int, seed: int) -> list[int]:
    """`limit` of `total` records in their order, drawn by `seed`; all for 0. A larger sample has the smaller one's."""
    drawn = np.random.default_rng([seed, 4]).permutation(total)
    return sorted(drawn[: limit or total].tolist())


def keep_better(probed: Probed, reader: RecordReader, folder: pathlib.Path, name: str) -> dict[str, int]:
    """Writes the records of `reader` on which the Demonstrator is better, or that were not judged; returns counts.

    Raises:
      UserError: none is left.
      RecordError: see `write_records`.
    """
    advantage = dict(zip(probed.ids, probed.advantage(), strict=True))
    kept = {record for record, value in advantage.items() if not value <= 0}  # NaN: not judged
    if not kept:
        raise UserError(f"the Demonstrator is better on none of {len(advantage)} tasks: no records are left to write")
    write_records(
        folder, name, (record for record in reader if record.id in kept), reader.shards,
        metadata={**reader.metadata, "kept_of": reader.fingerprint},
    )  # fmt: skip
    if (negative := read_negative(reader.index_path.parent, reader.index_path.stem)) is not None:
        write_negative(folder, name, negative)
    unjudged = int((~probed.judged).sum())
    return {"records": len(advantage), "kept": len(kept), "dropped": len(advantage) - len(kept), "unjudged": unjudged}


def noise_numbers(ids: Sequence[str], number: int) -> np.ndarray:
    """Numbers [b] that clip `number` of each task draws its noise by: of the task alone, wherever it stands."""
    digests = (hashlib.sha256(f"{number}/{record}".encode()).digest() for record in ids)
    return np.array([int.from_bytes(digest[:4], "big") >> 1 for digest in digests], np.int32)


def _clips(
    evaluator: Evaluator,
    batch: dict[str, Any],
    base: PyTree,
    lora: PyTree | None,
    text: str,
    number: int,
    negative: Negative | None,
) -> np.ndarray:
    rows = noise_numbers(batch["ids"], number)
    return evaluator.clips(batch, base, lora, text=text, rows=rows, negative=negative)


def _judge(
    judge: Judge, cache: JudgmentCache, made: Sequence[np.ndarray], batch: dict[str, Any], rubric: Rubric
) -> dict[str, np.ndarray]:
    """Log-odds [b k] of every question about k arrays of clips [b F H W 3], which are asked about together."""
    count, times = len(made[0]), len(made)
    tasks, agents, ids = (batch[name][:count] * times for name in ("task", "agent", "ids"))
    judgment = judge_clips(judge, cache, np.concatenate(made), tasks, agents, rubric, rubric.names, records=ids)
    return {name: values.reshape(times, count).T for name, values in judgment.scores.items()}


def _executor(config, family: ModelFamily, mesh: jax.sharding.Mesh) -> PyTree | None:
    """The LoRA that training starts from; None is the base, which a new Executor equals."""
    path = config.executor.start
    if not path:
        return None
    if family.linears is None:
        raise UserError(f"config.executor.start = {path!r}: model family {family.name} has no LoRA files")
    lora = read_lora(path, family.linears, family.kernel_shapes(), scale=family.lora_scale)
    return jax.device_put(lora, tree_shardings(mesh, family.lora_axes(lora), lora))


def _check_judged(probed: Probed, limit: float) -> None:
    failed, pairs = int((~probed.valid).sum()), probed.valid.size
    if failed > limit * pairs:
        raise TooFewJudgments(
            f"{failed} of {pairs} pairs of clips have no judgment, and config.rollout.max_invalid lets {limit:g} of"
            " them through: the warnings above say what the judge answered. Call it again when the judge works: what"
            " was answered is in the cache"
        )
