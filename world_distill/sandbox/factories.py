"""What a config names to get the sandbox: `world_distill.sandbox:make_oracle` and the like."""

from collections.abc import Mapping

import numpy as np

from world_distill.interfaces import Cases
from world_distill.sandbox import checker
from world_distill.sandbox.captions import STYLE_SHARES, TWO_LEGS, Faults, sample_clips
from world_distill.sandbox.oracle import Oracle, Tolerance
from world_distill.sandbox.scenes import true_scene
from world_distill.sandbox.tasks import KINDS
from world_distill.sandbox.world import World
from world_distill.settings.explained import explained_by


@explained_by(world=World, tolerance=Tolerance)
def make_oracle(*, world: dict, kinds: tuple[str, ...] = KINDS, tolerance: Mapping[str, float] | None = None) -> Oracle:
    """Annotator and judge.

    Args:
      world: sizes and difficulty of the world (`World`).
      kinds: kinds of task that are written.
      tolerance: changes to the thresholds (`oracle.Tolerance`), which make another judge, such as one held out.
    """
    return Oracle(World(**world), kinds=tuple(kinds), tolerance=Tolerance(**(tolerance or {})))


class Benchmark:
    """`interfaces.Benchmark`: the checker's verdicts, from the layout in each record's PNG."""

    name = "sandbox-checker-2"
    questions = checker.QUESTIONS

    def __init__(self, world: World):
        if world.size < 6 * world.cells:
            raise ValueError(f"the checker needs 6 pixels a place, this world has {world.size}/{world.cells}")
        self.world = world

    def check(self, clips: np.ndarray, cases: Cases) -> dict[str, np.ndarray]:
        verdicts = [
            checker.check(self.world, true_scene(image), task, clip)
            for clip, task, image in zip(clips, cases.tasks, cases.images, strict=True)
        ]
        return {q: np.array([v[q] for v in verdicts], np.float64) for q in self.questions}


@explained_by(world=World)
def make_benchmark(*, world: dict) -> Benchmark:
    """The benchmark.

    Args:
      world: sizes and difficulty of the world (`World`).
    """
    return Benchmark(World(**world))


class RandomClips:
    """Captioned clips of random motions, for pretraining: a pure function of (seed, step)."""

    def __init__(self, world: World, faults: Faults, styles: tuple[float, ...], two_legs: float):
        self.world, self.faults, self.styles, self.two_legs = world, faults, styles, two_legs

    def batch(self, seed: int, step: int, count: int) -> tuple[np.ndarray, list[str]]:
        """Clips [count F H W 3] uint8 and their captions."""
        rng = np.random.default_rng([seed, 3, step])
        made = sample_clips(self.world, self.faults, count, rng, self.styles, self.two_legs)
        return made.clips, made.captions


@explained_by(world=World, faults=Faults)
def make_clips(
    *, world: dict, faults: dict, styles: tuple[float, ...] = STYLE_SHARES, two_legs: float = TWO_LEGS
) -> RandomClips:
    """The source of pretraining clips.

    Args:
      world: sizes and difficulty of the world (`World`).
      faults: what clips show that their captions do not say (`Faults`).
      styles: shares of captions in steps, by landmark, and with both.
      two_legs: share of the motions without a push that turn once.
    """
    return RandomClips(World(**world), Faults(**faults), tuple(styles), two_legs)
