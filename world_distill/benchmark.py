"""`world-distill benchmark`: how fast each part of a training step is, and what the loop adds to them.

    rollout       the Executor's sampler steps
    decode        clips from latents
    demonstrator  velocities at all visited states
    judge         all questions about all clips, without the cache
    update        the optimiser updates of one step
    loop          a whole step, less the sum of the parts: data, cache, advantages, transfers
    pretraining   one update of the base model, clips ready made (of the sandbox's model, which has such a stage)

Every part runs alone, after a warm-up, on the same batch, in turns; the median is shown. On a machine that other
programs share, compare figures of one run only.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from world_distill import arguments, components, prepare, pretrain, runs
from world_distill.collect import Collector
from world_distill.data.pipeline import pad_texts, task_batches
from world_distill.data.records import RecordReader
from world_distill.interfaces import ModelFamily
from world_distill.judges.rubric import load_rubric
from world_distill.programs import make_programs
from world_distill.sharding import batch_sharding

HELP = """\
Measure the speed of rollout, Demonstrator, judge and update, and the loop's overhead.

Samples a second for each part at the config's sizes, and the share of a whole step that is none of them. Needs no
training run: records are made in a temporary folder.

  world-distill benchmark --config sandbox
  world-distill benchmark --config wan22_5b:mid --repeats 3 --json speed.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser, default="sandbox")
    parser.add_argument("--repeats", type=int, default=7, help="times that every part runs (default: 7)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    config = arguments.config_from(args)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(config, pathlib.Path(folder), args.repeats)
    rows = result["rollouts_per_step"]
    arguments.say(f"{result['device']}, {rows} rollouts a step, median of {args.repeats}")
    for name, part in result["parts"].items():
        arguments.say(f"{name:>13}  {part['seconds']:8.3f} s  {part['samples_per_second']:8.1f} samples/s")
    arguments.say(
        f"{'whole step':>13}  {result['step_seconds']:8.3f} s  {rows / result['step_seconds']:8.1f} samples/s"
    )
    if "pretraining" in result:
        base = result["pretraining"]
        arguments.say(f"{'pretraining':>13}  {base['seconds']:8.3f} s  {base['samples_per_second']:8.1f} samples/s")
    arguments.say(f"{'loop':>13}  {100 * result['overhead']:7.1f} % of a step is none of the parts")
    if args.json:
        arguments.write_json(args.json, result)
    return 0


def measure(config, folder: pathlib.Path, repeats: int) -> dict:
    """Seconds and samples a second of every part; see the module's text."""
    mesh = components.start_devices(config)
    programs = make_programs(config, mesh)
    family, objective, collection = programs.family, programs.objective, programs.collection
    data = runs.data_folder(config, folder)
    prepare.make_records(config, data)
    base = components.load_base(family, config, mesh)
    state = programs.init(base, config.seed)
    judge = components.make(config, "judge")
    collector = Collector(programs, judge=judge, cache=None, rubric=load_rubric(config.judge.rubric or None))
    batches = task_batches(
        RecordReader(data, "train"), tasks_per_step=collection.tasks, seed=config.seed,
        text_length=config.text_length,
    )  # fmt: skip
    last = config.steps - 1  # of a schedule: with all losses in force
    phase = objective.phase(last)
    tasks = collection.draw(batches, phase.rl)
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
    if parts.show is not None:
        jobs["demonstrator"] = lambda: jax.block_until_ready(parts.show())

    def whole():
        made, _ = collector(state, base, collection.draw(batches, phase.rl), key, last)
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
    if pretraining is not None:
        clips = config.pretrain.batch
        result["pretraining"] = {"clips": clips, "seconds": pretraining, "samples_per_second": clips / pretraining}
    return result


def _pretraining(config, family: ModelFamily, mesh: jax.sharding.Mesh) -> Callable[[], None]:
    """One update of the base model, on the same clips every time."""
    state, step = pretrain.make_training(config, family, mesh)
    clips, captions = components.make(config, "clips").batch(config.seed, 0, config.pretrain.batch)
    batch = (clips, *pad_texts(family.encode_text(captions), config.text_length))
    batch = [jax.device_put(x, batch_sharding(mesh)) for x in batch]
    key = jax.random.key(config.seed)

    def job():
        nonlocal state  # its buffers are given away
        state, metrics = step(state, *batch, key)
        jax.block_until_ready(metrics)

    return job
