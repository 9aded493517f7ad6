"""What a training step costs and which gradient it takes, beside the simpler way of doing the same.

python tests/benchmarks/training_figures.py [--run WORKDIR]

forwards     forward passes that a rollout costs in the last phase of each config (`forwards`), and what it would
             cost with the Demonstrator computed at every state of the sampler
states       how often each state of the sampler is drawn by the tied rows of an update, and how often it would be
             if the strata were cut at whole states
advantages   of four rewards that differ by the judge's noise, next to a group that differs by much
--run        medians of what a run logged: both gradients, their ratio, the share of rows that RL used
"""

import argparse
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from world_distill.core import times
from world_distill.core.advantages import group_advantages
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.settings.rollout import RolloutSettings
from world_distill.training.forwards import demonstrates_all, per_rollout

CONFIGS = ("sandbox:on_policy", "sandbox:wmsd", "sandbox:wmsd_guided", "wan22_5b:distill", "wan22_5b:wmsd")
LOGGED = ("train/anchor_gradient_norm", "train/rl_gradient_norm", "train/anchor_to_rl", "judge/used")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, metavar="WORKDIR")
    args = parser.parse_args()
    say("forwards a rollout: as it is, and with the Demonstrator at every state")
    for name in CONFIGS:
        now, everywhere = forwards(name)
        say(f"  {name:22}{now:6.1f}{everywhere:6.1f}")
    for rows, states in ((16, 6), (16, 5), (10, 14)):
        even, whole = drawn(rows, states)
        say(f"share of each of {states} states in draws of {rows} rows: {figures(even)}")
        say(f"    with strata cut at states: {figures(whole)}")
    rewards = np.array([2.00, 2.01, 1.99, 2.00, 6.0, -2.0, 2.0, 2.0])
    say(f"advantages of {rewards.tolist()}, two groups of four")
    for std, floor in (("group", 0.0), ("group", 0.5), ("batch", 0.0)):
        found, _ = group_advantages(rewards, np.repeat([0, 1], 4), np.ones(8, bool), std=std, std_floor=floor)
        say(f"  std {std}, floor {floor}: {figures(found)}")
    if args.run:
        lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
        for name in LOGGED:
            values = [line[name] for line in lines if line.get("train/rl_weight") and line.get(name) is not None]
            say(f"{name}: median {statistics.median(values):.3g} of {len(values)} steps with RL")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def figures(values: np.ndarray) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def forwards(name: str) -> tuple[float, float]:
    config = load_config(name)
    objective, settings = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    phase, steps = objective.phase(config.steps - 1), config.sampler.steps
    scale = config.demonstrator.guidance
    now = per_rollout(objective, settings, steps, phase, scale)
    reads = objective.in_phase(phase).reads
    saved = 0 if demonstrates_all(objective.in_phase(phase), settings, steps, phase) else steps - reads
    return now, now + saved * (2 if scale > 1 else 1)


def drawn(rows: int, states: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the states in many draws: of `core.times`, and of strata that begin and end at a state."""
    draw = jax.vmap(
        lambda k: times.stratified_times(k, jnp.ones(states + 1), rows, skip_first=False, keep_fraction=1.0)
    )
    even = np.bincount(np.ravel(draw(jax.random.split(jax.random.key(0), 20_000))), minlength=states)
    edges = np.floor(np.arange(rows + 1) * states / rows).astype(int)
    whole = np.zeros(states)
    for low, high in zip(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1), strict=True):
        whole[low:high] += 1 / (high - low)
    return even / even.sum(), whole / whole.sum()


if __name__ == "__main__":
    main()
