"""Runs of different methods at equal compute, counted in forward passes (`training.forwards`)."""

import itertools
from collections.abc import Iterator

import numpy as np

from world_distill.settings.check import uses_demonstrator
from world_distill.settings.loading import section
from world_distill.settings.objective import Objective, Phase
from world_distill.settings.rollout import RolloutSettings
from world_distill.training.forwards import per_step


def without_idle_guidance(config):
    """The config; if it trains without the Demonstrator, no guidance of the Demonstrator, which would be refused."""
    objective, settings = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    if not uses_demonstrator(objective, settings):
        config.demonstrator.guidance = 1.0
        if settings.guidance == 1:
            config.demonstrator.negative = ""
    return config


def run_forwards(config, first: int = 0) -> float:
    """Forward passes of a run, from step `first` to its end."""
    return sum(itertools.islice(_by_step(config), first, config.steps))


def equal_steps(config, reference) -> int:
    """Steps that cost as many forward passes as the reference's whole run."""
    budget = run_forwards(reference)
    steps, costs = 0, _by_step(config)
    while budget >= 0.5 * (cost := next(costs)):
        budget -= cost
        steps += 1
    return max(1, steps)


def _by_step(config) -> Iterator[float]:
    """Forward passes of each step, without end."""
    objective, settings = section(config.objective, Objective), RolloutSettings(**config.rollout.to_dict())
    # A step costs what its losses cost, and those only depend on which of them has a weight in it.
    costs: dict[Phase, float] = {}
    for step in itertools.count():
        phase = objective.phase(step)
        if phase not in costs:
            costs[phase] = per_step(objective, settings, config.sampler.steps, phase, config.demonstrator.guidance)
        yield costs[phase]


def until(rates, steps: int):
    """A schedule of learning rates whose last point lies at the run's end: each run cools down in its own time."""
    if np.ndim(rates) == 0 or len(rates) < 2 or rates[-2][0] >= steps:
        return rates
    return (*rates[:-1], (steps, rates[-1][1]))
