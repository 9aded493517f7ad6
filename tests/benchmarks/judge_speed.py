"""What a slow judge costs: requests a second that one client drives, and a step's time with and without overlap.

A simulated server on loopback answers after a fixed latency, in a process of its own.

    python tests/benchmarks/judge_speed.py [--latency 1.0] [--steps 8] [--json FILE]
"""

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import numpy as np

from tests.vlm.fake_server import FakeServer
from world_distill.interfaces import JudgeRequest
from world_distill.judges.server import ServerJudge
from world_distill.programs import prepare, train
from world_distill.settings.loading import load_config


def serve(latency, ports, done):
    with FakeServer(latency=latency) as server:
        ports.put(server.url)
        done.wait()


@contextlib.contextmanager
def server(latency: float):
    """Address of a simulated server."""
    context = multiprocessing.get_context("spawn")
    ports, done = context.Queue(), context.Event()
    process = context.Process(target=serve, args=(latency, ports, done), daemon=True)
    process.start()
    try:
        yield ports.get(timeout=60)
    finally:
        done.set()
        process.join(10)


def requests_per_second(latency: float, side: int, clips: int, concurrency: int) -> float:
    """Questions a second about clips of 16 frames, three a clip."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (clips, 16, 14, 14, 3), np.uint8)  # large areas of one colour: JPEGs of a usual size
    made = np.kron(coarse, np.ones((1, 1, side // 14, side // 14, 1), np.uint8))
    asked = [JudgeRequest(clip, f"Question {q}?") for clip in made for q in range(3)]
    with server(latency) as url:
        judge = ServerJudge(url, "judge", concurrency=concurrency)
        judge.check()
        started = time.perf_counter()
        answers = judge.ask(asked)
        seconds = time.perf_counter() - started
    assert all(answer.error is None for answer in answers)
    return len(asked) / seconds


def step_seconds(latency: float, staleness: int, steps: int, records: pathlib.Path) -> dict[str, float]:
    """Median seconds of a step of the sandbox's RL, of judging, and of the wait for it, in the second half."""
    config = load_config(
        "sandbox",
        {"steps": steps, "evaluate_every": 0, "objective.rl_weight": ((0, 1.0),), "rollout.staleness": staleness},
    )
    with server(latency) as url, tempfile.TemporaryDirectory() as folder:
        with config.unlocked():
            config.data = str(records)
            config.judge.factory = "world_distill.judges:ServerJudge"
            config.judge.options = {"servers": (url,), "model": "judge", "concurrency": 256}
        train.train(config, pathlib.Path(folder))
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    lines = lines[len(lines) // 2 : -1]  # the last step rolls nothing ahead
    wait = "time/judge_wait" if staleness else "time/judge"
    return {
        "step": statistics.median(line["time/step"] for line in lines),
        "judge": statistics.median(line["time/judge"] for line in lines),
        "wait": statistics.median(line[wait] for line in lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds before an answer, in the training runs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    found = {
        "requests a second, frames of 28 px, 50 ms": requests_per_second(0.05, 28, 200, 64),
        "requests a second, frames of 448 px, 50 ms": requests_per_second(0.05, 448, 16, 64),
    }
    with tempfile.TemporaryDirectory() as folder:
        prepare.make_records(load_config("sandbox", {"scenes.train": 60, "scenes.test": 4}), pathlib.Path(folder))
        for latency in (0.0, args.latency):
            for staleness in (0, 1):
                seconds = step_seconds(latency, staleness, args.steps, pathlib.Path(folder))
                found |= {f"{name}, latency {latency:g} s, staleness {staleness}": s for name, s in seconds.items()}
    for name, value in found.items():
        sys.stdout.write(f"{name}: {value:.3g}\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
