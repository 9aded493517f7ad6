"""`world-distill probe`: before training, is the Demonstrator better than the Executor at all?"""

import hashlib
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from world_distill import build, console
from world_distill.data.records.batches import Role, TaskBatch, fixed_batches, scene_problem
from world_distill.data.records.fit import check_fit
from world_distill.data.records.negative import read_negative, write_negative
from world_distill.data.records.reader import RecordReader, write_records
from world_distill.errors import UserError
from world_distill.evaluation.controls import ask_controls
from world_distill.evaluation.probe_figures import ROLES, Probed
from world_distill.evaluation.scoring import Evaluator
from world_distill.interfaces import Judge, ModelFamily
from world_distill.judges.ask import check_judge, judge_clips, refuse_clip
from world_distill.judges.controls import Shown
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import Rubric
from world_distill.structs import PyTree, Texts
from world_distill.training import run_folder
from world_distill.training.collect import TooFewJudgments
from world_distill.weights import base_model
from world_distill.weights.lora_files import load_lora


def probe(
    config,
    reader: RecordReader,
    workdir: pathlib.Path,
    *,
    limit: int = 0,
    clips: int = 1,
    controls: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Probed, dict[str, Any]]:
    """The judge's answers about both models' clips, and what was asked: judge, rubric, hits and misses of the cache.

    Where there are `controls`, its answers about those stand there, too (`evaluation.controls.ask_controls`).

    Args:
      config: names model, sampler, judge and rubric.
      reader: encoded records.
      workdir: of the judgment cache.
      limit: tasks to look at; 0 takes all.
      clips: clips a task, for each of the two.
      controls: tasks whose first clip by the Demonstrator is made into negative controls.
      progress: called with (clips judged, clips).

    Raises:
      TooFewJudgments: more of the clips have no judgment than config.rollout.max_invalid allows.
      UserError: the records do not fit the model, or the judge fails its own test.
    """
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    if problem := scene_problem(reader[0].scene, family.encoders.scenes):
        raise UserError(f"{reader.index_path}: {problem}")
    check_fit(reader, family, base_model.origin(config.base))
    judge = build.make(config, "judge")
    rubric = build.make_rubric(config, judge=judge)
    refuse_clip(judge, config.rollout.clip)
    for line in check_judge(judge):
        console.say(f"judge: {line}")
    base, lora = base_model.load_base(family, config, mesh), _executor(config, family, mesh)
    evaluator = run_folder.make_evaluator(config, family, mesh, None)
    chosen = sample_of(len(reader), limit, config.seed)
    batches = fixed_batches(reader, config.evaluate_batch, lengths=build.text_lengths(family, config), indices=chosen)
    parts: dict[str, list] = {role: [] for role in ROLES}
    ids, tasks, kinds = [], [], []
    shown: list[Shown] = []
    with run_folder.open_cache(config, workdir) as cache:
        for batch in batches:
            count = int(batch.weight.sum())
            for role, text, weights in _told(lora):
                negative = evaluator.negative(reader, text)
                made = [
                    _clips(evaluator, batch, base, weights, text, number, negative)[:count] for number in range(clips)
                ]
                parts[role].append(_judge(judge, cache, made, batch, rubric))
                if role == ROLES[0]:
                    told = zip(made[0], batch.task, batch.agent, batch.ids, strict=False)  # ends with the real rows
                    shown += [Shown(*one) for one in itertools.islice(told, max(controls - len(shown), 0))]
                if progress is not None:
                    done = 2 * len(ids) + (1 + ROLES.index(role)) * count
                    progress(done * clips, 2 * len(chosen) * clips)
            ids, tasks, kinds = (
                found + values[:count] for found, values in ((ids, batch.ids), (tasks, batch.task), (kinds, batch.kind))
            )
        asked: dict[str, Any] = {"hits": cache.hits, "misses": cache.misses}
        if shown:
            asked["controls"] = ask_controls(judge, cache, shown, rubric, rubric.names)
    scores = {role: {q: np.concatenate([p[q] for p in parts[role]]) for q in rubric.names} for role in ROLES}
    probed = Probed(ids, tasks, kinds, scores, float(config.rollout.clip))
    _check_judged(probed, config.rollout.max_invalid)
    return probed, {"judge": judge.name, "rubric": rubric.version, **asked}


def _told(lora: PyTree) -> tuple[tuple[str, Role, PyTree | None], ...]:
    """(name, what it is told, weights) of both policies."""
    return (ROLES[0], "solution", None), (ROLES[1], "task", lora)


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
    whole = RecordReader(reader.index_path.parent, reader.index_path.stem, clips=reader.has_clips)
    write_records(
        folder, name, (record for record in whole if record.id in kept), reader.shards,
        metadata={**reader.metadata, "kept_of": reader.fingerprint}, scene_dtype=reader.metadata.get("scene_dtype"),
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
    batch: TaskBatch,
    base: PyTree,
    lora: PyTree | None,
    text: Role,
    number: int,
    negative: Texts | None,
) -> np.ndarray:
    rows = noise_numbers(batch.ids, number)
    return evaluator.clips(batch, base, lora, text=text, rows=rows, negative=negative)


def _judge(
    judge: Judge, cache: JudgmentCache, made: Sequence[np.ndarray], batch: TaskBatch, rubric: Rubric
) -> dict[str, np.ndarray]:
    """Log-odds [b k] of every question about k arrays of clips [b F H W 3], which are asked about together."""
    count, times = len(made[0]), len(made)
    tasks, agents, ids = (values[:count] * times for values in (batch.task, batch.agent, batch.ids))
    judgment = judge_clips(judge, cache, np.concatenate(made), tasks, agents, rubric, rubric.names, records=ids)
    return {name: values.reshape(times, count).T for name, values in judgment.scores.items()}


def _executor(config, family: ModelFamily, mesh: jax.sharding.Mesh) -> PyTree | None:
    """The LoRA that training starts from; None is the base, which a new Executor equals."""
    path = config.executor.start
    if not path:
        return None
    without, alpha = tuple(config.executor.start_without), config.executor.start_alpha or None
    return load_lora(path, family, mesh, without=without, alpha=alpha)


def _check_judged(probed: Probed, limit: float) -> None:
    failed, pairs = int((~probed.valid).sum()), probed.valid.size
    if failed > limit * pairs:
        raise TooFewJudgments(
            f"{failed} of {pairs} pairs of clips have no judgment, and config.rollout.max_invalid lets {limit:g} of"
            " them through: the warnings above say what the judge answered. Call it again when the judge works: what"
            " was answered is in the cache"
        )
