"""A run's folder: its config, its records, its state on the mesh, and what later programs need of it.

`config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `judgments.sqlite`, `judged_clips/` if some are kept,
`controls.json` where the judge was asked about negative controls, `benchmark.sqlite` where the benchmark asks a judge,
and `data/` where the config names no other records.
"""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from world_distill import build, console
from world_distill.errors import UserError
from world_distill.evaluation.held_out import HeldOut, make_held_out
from world_distill.evaluation.scoring import Evaluator
from world_distill.interfaces import Benchmark, Judge, ModelFamily
from world_distill.judges.ask import check_judge
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.memory.kept_clips import KeptClips
from world_distill.judges.memory.segments import SyncedCache, is_shared
from world_distill.models.lora import DIFFERENCES
from world_distill.settings.guidance import Guidance
from world_distill.settings.loading import diff, from_json, leaves, override, to_json, translate
from world_distill.settings.rollout import RolloutSettings
from world_distill.storage import array_store, atomic
from world_distill.storage.checkpoints import Checkpointer
from world_distill.structs import PyTree, TrainState
from world_distill.weights import base_model
from world_distill.weights.lora_files import read_lora
from world_distill.weights.lora_layouts import LoraModel
from world_distill.weights.lora_reading import Reading

_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")  # in an address

# What may change between two calls on the same folder: how long, how talkatively and how well audited, not what is
# trained.
FREE_KEYS = (
    "steps", "log_every", "save_every", "keep", "evaluate_every", "evaluate_tasks", "evaluate_batch",
    "encode_batch", "ablation", "reproduce", "checkpoints", "held_out", "benchmark", "judge.cache", "judge.keep_clips",
    "judge.controls",
)  # fmt: skip


@dataclasses.dataclass
class Run:
    """A run's parts, as programs after training need them."""

    config: Any
    mesh: jax.sharding.Mesh
    family: ModelFamily
    base: PyTree
    executor: PyTree | None  # the slow average of the trained weights; None before the first checkpoint
    step: int
    data: pathlib.Path

    def evaluator(self, benchmark: Benchmark) -> Evaluator:
        """An evaluator for this run's model."""
        return make_evaluator(self.config, self.family, self.mesh, benchmark)


def make_evaluator(config, family: ModelFamily, mesh: jax.sharding.Mesh, benchmark: Benchmark | None) -> Evaluator:
    """The evaluator with the config's sampler and sizes; without a benchmark it samples only."""
    # Evaluation always samples the ODE: a stochastic sampler serves training only.
    grid, _ = build.sampler_grid(config)
    return Evaluator(
        family, mesh, benchmark, grid=grid, batch=config.evaluate_batch, lengths=build.text_lengths(family, config),
        seed=config.seed, guidance=Guidance.of(config),
    )  # fmt: skip


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a run's folder. Raises UserError where there is no run."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json); train one with `world-distill train --workdir`")
    return from_json(path.read_text())


def run_config(workdir: pathlib.Path, overrides: Mapping[str, Any] | None = None, config: Any = None) -> ConfigDict:
    """The config of a run's folder, with `overrides` of values that have no part in what was trained (`FREE_KEYS`).

    `config` is that of a folder in which nothing was trained yet; the folder becomes its run's.

    Raises:
      UserError: the folder holds no run, another config's, or an override is of another value.
    """
    if config is not None:
        claim_folder(config, workdir)
        return config
    config = read_config(workdir)
    if fixed := [key for key in overrides or () if not is_free(key)]:
        raise UserError(f"--config.{fixed[0]} is part of what was trained in {workdir}; that cannot change any more")
    build.make_room(config, overrides or {})
    override(config, overrides or {})
    return config


def open_run(workdir: pathlib.Path, overrides: Mapping[str, Any] | None = None, *, config: Any = None) -> Run:
    """Opens a run's folder: its config, the base, and the newest Executor.

    `config` is what `run_config` gave, if it was called before; `overrides` are for it.

    Raises:
      UserError: see `run_config`.
    """
    config = run_config(workdir, overrides) if config is None else config
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    base = base_model.load_base(family, config, mesh)
    executor, step = load_executor(config, mesh, workdir)
    return Run(config, mesh, family, base, executor=executor, step=step, data=data_folder(config, workdir))


def load_executor(config, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> tuple[PyTree | None, int]:
    """(slow average of a run's trained weights, its step); (None, 0) before the first checkpoint. Needs no base."""
    with Checkpointer(checkpoint_folder(config, workdir), keep=config.keep) as checkpointer:
        family = build.make_family(config, mesh)
        restored = checkpointer.restore_executor(base_model.abstract_executor(family, mesh, config.executor.rank))
    return (None, 0) if restored is None else restored


def checkpoint_folder(config, workdir: pathlib.Path) -> str:
    """Where the run's checkpoints are: a folder, or the address of a bucket."""
    return config.checkpoints or str(workdir / "checkpoints")


def data_folder(config, workdir: pathlib.Path) -> pathlib.Path:
    """Where the run's encoded records are."""
    return pathlib.Path(config.data) if config.data else workdir / "data"


def start_from_file(path: str, config, family: ModelFamily, state: TrainState) -> TrainState:
    """A fresh state whose Executor is that of a LoRA file or folder. Raises as `read_start` does."""
    found = read_start(path, config, family, state)
    for line in found.notes:
        logging.warning("config.executor.start = %s: %s", path, line)
    lora = found.tree

    def placed():  # a copy for each, since the training step gives its buffers away
        return jax.tree.map(lambda x, y: jax.device_put(np.array(x), y.sharding), lora, state.lora)

    rolled = None if state.lora_rolled is None else placed()
    return dataclasses.replace(state, lora=placed(), lora_ema=placed(), lora_old=placed(), lora_rolled=rolled)


def check_start(config, workdir: pathlib.Path, family: ModelFamily, state: TrainState) -> None:
    """Raises as `read_start` does where a run that has not begun starts from a LoRA file, before the base is read."""
    if config.executor.start and not (config.checkpoints or _has_begun(workdir)):
        read_start(config.executor.start, config, family, state)


def read_start(path: str, config, family: ModelFamily, state: TrainState) -> Reading:
    """The LoRA of a file or folder (`weights.lora_names`), of the layers and the rank of a state or an abstract one.

    Raises:
      UserError: a family or an Executor without LoRA, or other layers or another rank than the config's.
      TensorFileError: no LoRA file, or one of another model.
    """
    if family.published is None or not config.executor.rank:
        raise UserError(f"config.executor.start = {path!r}: only LoRA of a published family can be read from a file")
    without, alpha = tuple(config.executor.start_without), config.executor.start_alpha or None
    found = read_lora(path, LoraModel.of(family), scale=family.lora_scale, without=without, alpha=alpha)
    lora = found.tree
    have, want = ({n: x.shape for n, x in array_store.by_name(tree).items()} for tree in (lora, state.lora))
    if lines := base_model.differences(have, want):
        flags = " ".join(f"'--config.executor.{key}={value}'" for key, value in fitting_settings(lora).items())
        raise UserError(
            f"the LoRA in {path} is not of the layers and the rank that config.executor says. These flags fit it:\n"
            f"  {flags}\nWhat differs:\n  " + "\n  ".join(lines)
        )
    return found


def fitting_settings(lora: PyTree) -> dict[str, Any]:
    """The values of the section `executor` under which training starts from this LoRA."""
    flat = array_store.by_name({name: value for name, value in lora.items() if name != DIFFERENCES})
    factors = {path: x for path, x in flat.items() if path.endswith(".a")}
    rank = next((x.shape[-1] for x in factors.values()), 0)
    layers = sorted(path.removesuffix(".a") for path in factors)
    found = {"rank": rank, "alpha": float(rank), "targets": _pattern(layers)}
    differences = array_store.by_name(lora.get(DIFFERENCES, {}))
    return found | ({"differences": _pattern(sorted(differences))} if differences else {})


def _pattern(paths: Iterable[str]) -> str:
    return "|".join(path.replace(".", r"\.") for path in paths)


def is_free(key: str) -> bool:
    """Whether a key of the config, or the section that it is in, is in `FREE_KEYS`."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def fixed_settings(config) -> dict[str, Any]:
    """The config's values without those of `FREE_KEYS`."""
    settings = config.to_dict()
    for key in FREE_KEYS:
        *parents, last = key.split(".")
        functools.reduce(dict.__getitem__, parents, settings).pop(last, None)
    return settings


def todays_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The `fixed_settings` that a checkpoint of this or an earlier version holds, in today's keys and units."""
    return fixed_settings(ConfigDict(translate(saved)))


def open_cache(config, workdir: pathlib.Path, name: str = "judgments") -> JudgmentCache:
    """The run's memory of judgments, which keeps the clips that the config says.

    That of another `name` is apart: its file lies in the run's folder, and what hosts share in a folder of this name.

    Raises:
      CacheError: its file, or the address that it is shared through, cannot be used.
    """
    address, share = config.judge.cache, config.judge.keep_clips
    if not 0 <= share <= 1:
        raise UserError(f"config.judge.keep_clips is a share from 0 to 1, not {share}")
    keep = KeptClips(workdir / "judged_clips", share=share) if share else None
    if name != "judgments":
        address, keep = f"{address.rstrip('/')}/{name}/" if is_shared(address) else "", None
    if address and not is_shared(address):
        return JudgmentCache(address, keep=keep)
    # Hosts may have one folder, on a network file system: then each has a file of its own there.
    host = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    local = workdir / f"{name}{host}.sqlite"
    return SyncedCache(local, address, keep=keep) if address else JudgmentCache(local, keep=keep)


def check_folder(config, workdir: pathlib.Path) -> None:
    """Refuses the folder of another run. A folder in which nothing was trained yet is no run's.

    Raises:
      UserError: the folder's config differs in what is trained, every differing key is named; or the config holds a
        password, which does not belong on a disk.
    """
    path = workdir / "config.json"
    secret = [key for key, value in leaves(config).items() if _PASSWORD.search(str(value))]
    if secret:
        raise UserError(
            f"config.{secret[0]} holds an address with a password, which config.json and checkpoints would keep: leave "
            "it out, and name the environment variable that holds the key in api_key_env"
        )
    if path.exists() and _has_begun(workdir):
        lines = [line for line in diff(from_json(path.read_text()), config) if not is_free(line.partition(":")[0])]
        if lines:
            raise UserError(
                f"{workdir} holds a run of another config; take another --workdir, or the same settings:\n  "
                + "\n  ".join(line if len(line) <= 160 else f"{line[:159]}…" for line in lines)
            )


def claim_folder(config, workdir: pathlib.Path) -> None:
    """Writes config.json: from now on, the folder is this run's. To be called when all that the run reads is open.

    Raises:
      UserError: see `check_folder`.
    """
    check_folder(config, workdir)
    atomic.write_text(workdir / "config.json", to_json(config) + "\n")


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from training in a folder, until the block ends or this process does.

    Raises:
      UserError: another process trains there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    folder = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{workdir}: another process trains in this folder; wait for it, or name another"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def _has_begun(workdir: pathlib.Path) -> bool:
    """Whether more than a config lies in a folder; earlier versions wrote that before they had looked at anything."""
    log, saved = workdir / "metrics.jsonl", workdir / "checkpoints"
    made = (workdir / "data" / "scenes", workdir / "results.json")  # by `quickstart`, from this config
    return (
        (log.exists() and log.stat().st_size > 0)
        or (saved.is_dir() and any(saved.iterdir()))
        or any(path.exists() for path in made)
    )


@contextlib.contextmanager
def open_held_out(config, workdir: pathlib.Path) -> Iterator[HeldOut | None]:
    """The held-out judge of a run, beside the judge that its config rewards with, if any, through the run's cache."""
    if not config.held_out.factory:
        yield None
        return
    questions = RolloutSettings(**config.rollout.to_dict()).questions if config.objective.rl != "none" else ()
    reward = build.make(config, "judge") if questions else None
    with open_cache(config, workdir) as cache:
        yield make_held_out(config, questions, reward, cache)


BENCHMARK = "benchmark"  # the name of its memory of judgments


@contextlib.contextmanager
def open_benchmark(config, workdir: pathlib.Path, *, writes: bool = True) -> Iterator[Benchmark]:
    """The benchmark that the config names; one that asks judges has, with `writes`, a memory of their answers.

    Its judges are tested first. The memory is apart from that of rewards: audits of the reward do not mix both.

    Raises:
      UserError: the config names none, or a judge fails its test.
    """
    if not config.benchmark.factory:
        raise UserError(
            f"{workdir} names no benchmark, so nothing says whether a clip is good; let a VLM on a server say it:"
            " --config.benchmark.factory=world_distill.evaluation:WorldTasksBench"
            " --config.benchmark.options.servers=http://HOST:8000/v1 --config.benchmark.options.model=NAME"
        )
    benchmark = build.make(config, "benchmark")
    if (begin := getattr(benchmark, "begin", None)) is None:
        yield benchmark
        return
    with open_cache(config, workdir, BENCHMARK) if writes else contextlib.nullcontext() as cache:
        begin(cache, build.make_family(config).fps)
        for judge in getattr(benchmark, "judges", {}).values():
            test_judge(judge, "benchmark")
        with contextlib.suppress(OSError, ValueError):  # the reward's questions may be gone; here nobody asks them
            if getattr(benchmark, "describe", dict)().get("rubric") == build.make_rubric(config).version:
                logging.warning("the benchmark asks the reward's own questions: what was trained to please will pass")
        yield benchmark


def test_judge(judge: Judge | None, part: str = "judge") -> None:
    """Tests a judge that can be, before anything slow is begun; one that cannot be reached may still come up.

    Raises:
      UserError: it cannot judge.
    """
    try:
        for line in check_judge(judge):
            console.say(f"{part}: {line}")
    except ConnectionError as error:
        logging.warning("%s; going on: what is cached needs no judge, and for the rest it will be waited for", error)
