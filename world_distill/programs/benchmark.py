"""`world-distill benchmark`: how fast each part of a training step is, and what the loop adds to them.

    rollout       the Executor's sampler steps
    decode        clips from latents
    demonstrator  velocities at all visited states
    judge         all questions about all clips, without the cache
    update        the optimiser updates of one step
    loop          a whole step, less the sum of the parts: data, cache, advantages, transfers
    pretraining   one update of the base model, clips ready made (of the sandbox's model, which has such a stage)

Every part runs alone, after a warm-up, on the same batch, in turns; the median is shown. On a machine that other
programs share, compare figures of one run only. On an accelerator that `chips` knows, the prediction of `world-distill
plan` stands beside a part.
"""

import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from world_distill import build
from world_distill.data.records.batches import task_batches
from world_distill.data.records.negative import load_negative
from world_distill.data.records.reader import RecordReader
from world_distill.devices import chips
from world_distill.devices.sharding import batch_sharding
from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily
from world_distill.programs import plan, prepare, pretrain
from world_distill.training import run_folder
from world_distill.training.collect import Collector, draw_tasks
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model


def measure(config, folder: pathlib.Path, repeats: int) -> dict:
    """Seconds and samples a second of every part; see the module's text."""
    mesh = build.start_devices(config)
    programs = make_programs(config, mesh)
    family, objective, collection = programs.family, programs.objective, programs.rollout_settings
    if objective.sft:
        raise UserError(
            "objective.kind = sft has one part, the update: `train` logs its seconds, and `plan` predicts them"
        )
    data = run_folder.data_folder(config, folder)
    prepare.make_records(config, data)
    base = base_model.load_base(family, config, mesh)
    state = programs.init(base, config.seed)
    judge = build.make(config, "judge")
    reader, rubric = RecordReader(data, "train"), build.make_rubric(config, judge=judge)
    lengths = build.text_lengths(family, config)
    negative = load_negative(reader, programs.guidance, lengths, mesh)
    collector = Collector(programs, judge=judge, cache=None, rubric=rubric, negative=negative)
    batches = task_batches(reader, tasks_per_step=collection.tasks, seed=config.seed, lengths=lengths)
    last = config.steps - 1  # of a schedule: with all losses in force
    phase = objective.phase(last)
    tasks = draw_tasks(collection, mesh, batches, phase.rl)
    trained = programs.init(base, config.seed)  # an update gives away the buffers of the state that it is given
    key = jax.random.key(config.seed)
    parts = collector.parts(state, base, tasks, key, last)
    batch, _ = collector(state, base, tasks, key, last)

    def update(batch):
        nonlocal trained
        trained, metrics = programs.update[phase](trained, base, batch)
        jax.block_until_ready((trained, metrics))

    jobs = {
        "rollout": lambda: jax.block_until_ready(parts.roll()),
        "decode": lambda: jax.block_until_ready(parts.decode()),
        "judge": parts.judge,
        "update": lambda: update(batch),
    }
    if (demonstrate := parts.demonstrate) is not None:
        jobs["demonstrator"] = lambda: jax.block_until_ready(demonstrate())

    def whole():
        made, _ = collector(state, base, draw_tasks(collection, mesh, batches, phase.rl), key, last)
        update(made)

    jobs["step"] = whole
    if "pretrain" in config:
        jobs["pretraining"] = _pretraining(config, family, mesh)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if turn:  # the first turn compiles
                times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    total, pretraining = seconds.pop("step"), seconds.pop("pretraining", None)
    rows = collection.tasks * collection.group
    result = {
        "device": f"{len(mesh.devices.flat)} x {jax.devices()[0].device_kind}",
        "rollouts_per_step": rows,
        "parts": {n: {"seconds": s, "samples_per_second": rows / s} for n, s in seconds.items()},
        "step_seconds": total,
        "overhead": float(np.clip(1 - sum(seconds.values()) / total, -1, 1)),
    }
    devices = list(mesh.devices.flat)
    if chips.chip(devices[0].device_kind):
        phases = tuple(name for name in plan.PHASES if name in seconds)
        planned = plan.summary(config, devices, plan.make_plan(config, devices, phases))
        result["predicted"] = {phase["name"]: phase["seconds"] for phase in planned["phases"] if phase["seconds"]}
        result["predicted_step"] = planned["step_seconds"]
    if pretraining is not None:
        clips = config.pretrain.batch
        result["pretraining"] = {"clips": clips, "seconds": pretraining, "samples_per_second": clips / pretraining}
    return result


def _pretraining(config, family: ModelFamily, mesh: jax.sharding.Mesh) -> Callable[[], None]:
    """One update of the base model, on the same clips every time."""
    state, step = pretrain.make_training(config, family, mesh)
    clips, captions = build.make(config, "clips").batch(config.seed, 0, config.pretrain.batch)
    batch = jax.device_put((clips, pretrain.encode_captions(config, family, captions)), batch_sharding(mesh))
    key = jax.random.key(config.seed)

    def job():
        nonlocal state  # its buffers are given away
        state, metrics = step(state, *batch, key)
        jax.block_until_ready(metrics)

    return job
