"""What a training step asks of a host, beside the seconds that a step takes: reading, placing, judging, weighing, logs.

    python tests/benchmarks/host_work.py --step-seconds SECONDS          # of `world-distill plan`, for such a slice

The collector, the records, the cache of judgments and the log are the real ones, at the sizes of `wan22_5b:wmsd`.
Programs and judge answer at once with noise. Two rows: what one of `--hosts` does in a step of `--rollouts` with its
own share of the clips, and what every host does about all of them (advantages and figures), on clips of one pixel and
texts of one number a token.
A judge's requests are not in it: they are made in threads, beside the device's work (`judge_speed.py`).
"""

import argparse
import functools
import json
import pathlib
import sys
import tempfile
import time
import types

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np

from world_distill.data.records.batches import task_batches
from world_distill.data.records.reader import EncodedRecord, RecordReader, write_records
from world_distill.devices.sharding import make_mesh
from world_distill.interfaces import JudgeAnswer
from world_distill.judges.memory.cache import JudgmentCache
from world_distill.judges.rubric import load_rubric
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.settings.rollout import RolloutSettings
from world_distill.storage.metric_log import MetricLog
from world_distill.training.collect import Collector

WORDS = (30, 250)  # tokens of a task and of a solution


class Noise:
    """A judge that answers at once."""

    name = "noise"

    def __init__(self):
        self._draw = np.random.default_rng(0)

    def ask(self, requests):
        return [JudgeAnswer(float(x)) for x in self._draw.normal(size=len(requests))]


def write(folder: pathlib.Path, config, tasks: int) -> None:
    """Encoded records of the model's own sizes."""
    draw, model = np.random.default_rng(1), config.model
    height, width = (side // 16 for side in model.size)

    def states(tokens: int) -> dict[str, np.ndarray]:
        return {"text": draw.standard_normal((tokens, model.text_width), np.float32).astype(jax.numpy.bfloat16)}

    records = (
        EncodedRecord(
            id=f"record {i}", image_id=f"image {i}", task=f"[hand]: Move the cup to place {i}.", solution="It moves.",
            agent="hand", kind="push", scene={"video": draw.standard_normal((1, height, width, 48), np.float32)},
            task_states=states(WORDS[0]), solution_states=states(WORDS[1]), image_png=b"",
        )
        for i in range(2 * tasks)
    )  # fmt: skip
    write_records(folder, "train", records)


def programs_of(config, mesh, clips: np.ndarray):
    """What stands for a step's programs: each gives the same arrays at once."""
    rows, latents = len(clips), np.zeros((len(clips), 1), np.float32)
    placed = jax.device_put({"latents": {"video": latents}, "clips": clips, "motion": latents[:, 0]})
    rollout = types.SimpleNamespace(latents=placed["latents"], log_probs=None)
    roll = lambda *given: jax.block_until_ready(given) and rollout  # noqa: E731
    settings = dict(config.rollout.to_dict(), tasks=rows // config.rollout.group)
    return types.SimpleNamespace(
        mesh=mesh, rollout_settings=RolloutSettings(**settings), objective=section(config.objective, Objective),
        roll={True: roll, False: roll}, decode=lambda base, latents: placed["clips"][None],
        demonstrate=None, motion=lambda latents: placed["motion"], finish=None, demonstrates=lambda phase: False,
        rewards_distillation=lambda phase: False, keeps_log_probs=False,
    )  # fmt: skip


def measure(config, rows: int, pixels: tuple[int, int], steps: int, folder: pathlib.Path) -> dict[str, float]:
    """Median seconds of each part of a step on this host, with `rows` clips of [frames, *pixels]."""
    write(folder, config, rows // config.rollout.group)
    mesh = make_mesh(devices=jax.devices()[:1])
    draw = np.random.default_rng(2)
    clips = draw.integers(0, 256, (rows, config.model.frames, *pixels, 3), np.uint8)
    programs = programs_of(config, mesh, clips)
    cache = JudgmentCache(folder / "judgments.sqlite")
    tasks = task_batches(
        RecordReader(folder, "train"), tasks_per_step=programs.rollout_settings.tasks, seed=0,
        lengths={"text": config.text_length},
    )  # fmt: skip
    log = MetricLog(folder, 0)
    parts: dict[str, list[float]] = {name: [] for name in ("read", "place", "judge", "weigh", "log")}
    for step in range(steps):
        clips[:, 0] = step  # other clips, whose judgments are not in the cache
        programs.decode = functools.partial(lambda clips, *given: clips, jax.device_put(clips[None]))
        collector = Collector(programs, judge=Noise(), cache=cache, rubric=load_rubric())
        marks = [time.perf_counter()]
        drawn = collector.draw(tasks, step)
        marks.append(time.perf_counter())
        pending = collector.begin({}, {}, drawn, jax.random.key(0), step)
        marks.append(time.perf_counter())
        judged = collector.judge(pending)
        marks.append(time.perf_counter())
        _, info = collector.weigh(pending, judged)
        marks.append(time.perf_counter())
        log.write(step + 1, info)
        marks.append(time.perf_counter())
        for name, seconds in zip(parts, np.diff(marks), strict=True):
            parts[name].append(float(seconds))
    log.close()
    cache.close()
    return {name: float(np.median(seconds[1:])) for name, seconds in parts.items()}  # the first one compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=512, help="of a step (default: 512)")
    parser.add_argument("--hosts", type=int, default=16, help="that share them (default: 16, of 64 v5p chips)")
    parser.add_argument("--steps", type=int, default=6, help="measured (default: 6)")
    parser.add_argument("--step-seconds", type=float, required=True, help="of a step on the devices")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    found = {}
    for name, rows in (("own clips", args.rollouts // args.hosts), ("all clips", args.rollouts)):
        config = load_config("wan22_5b:wmsd")
        if name == "all clips":  # a host neither reads nor places those of others
            config.model.text_width, pixels = 1, (1, 1)
        else:
            pixels = tuple(config.model.size)
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(config, rows, pixels, args.steps, pathlib.Path(folder))
        total = sum(found[name].values())
        listed = "  ".join(f"{part} {1000 * seconds:.0f}" for part, seconds in found[name].items())
        print(f"{name:>9}, {rows:3d}: {listed} ms; {total / args.step_seconds:.2%} of {args.step_seconds:g} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
