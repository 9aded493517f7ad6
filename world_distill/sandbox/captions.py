"""Pretraining clips of the sandbox: random motions with their narration, and the faults of a base model.

A video model that was trained on clips from the wild renders a detailed caption well, yet not always: it stops short,
moves somebody else, lets things vanish and jump. The faults below put just that into the clips, unmentioned in the
caption and decided per clip, so that the base model learns a *mixture* of clean and faulty clips. Averaging cannot
undo that (the Demonstrator's own mean is faulty), while a reward can choose the clean ones.

Captions are written in several styles, as they are in the wild: some count steps, some name the place where a motion
ends. So the base learns what a "blue ring" is and where it lies, as a pretrained model has, though no caption ever asks
for anything.
"""

import dataclasses

import numpy as np

from world_distill.sandbox.narration import STYLES, narrate
from world_distill.sandbox.world import Motion, Scene, World, leg_is_clear, render, sample_scene, trajectories

STYLE_SHARES = (0.3, 0.4, 0.3)  # of captions in each of `narration.STYLES`
TWO_LEGS = 0.25  # share of the motions without a push that turn once


@dataclasses.dataclass(frozen=True)
class Faults:
    """Probabilities, per clip, of what the caption does not say.

    Attributes:
      short: the agent covers only a share of its (last) way.
      short_travel: least and greatest share of its way that such an agent covers.
      other: another agent makes the motion.
      blink: a thing is invisible for one or two frames.
      jump: the agent waits at its start, then is at its end.
      vanish: a thing fades away and stays away.
    """

    short: float = 0.45
    short_travel: tuple[float, float] = (0.45, 0.95)
    other: float = 0.08
    blink: float = 0.08
    jump: float = 0.07
    vanish: float = 0.05


@dataclasses.dataclass(frozen=True)
class CaptionedClips:
    """Clips with what is said about them."""

    clips: np.ndarray  # [b F H W 3] uint8
    captions: list[str]


def sample_motion(world: World, scene: Scene, rng: np.random.Generator, two_legs: float = TWO_LEGS) -> Motion | None:
    """A random feasible motion; None if the drawn agent has no way out (rare).

    `two_legs` is the share of the motions that turn once, of those that push nothing.
    """
    crate = scene.crate
    if crate is not None and rng.random() < 0.7:
        options = [m for agent in scene.agents for m in _pushes(world, scene, agent)]
        if options:
            return options[rng.integers(len(options))]
    agent = scene.agents[rng.integers(len(scene.agents))]
    legs = 2 if rng.random() < two_legs else 1
    way = [agent.place]
    for _ in range(legs):
        ends = [
            (i, j)
            for i in range(world.cells)
            for j in range(world.cells)
            if (i, j) != way[-1] and leg_is_clear(scene, way[-1], (i, j), ignore=(agent.name,))
        ]
        if not ends:
            return None
        marked = [end for end in ends if any(_steps_between(end, ring.place) <= 1 for ring in scene.rings)]
        if marked and rng.random() < 0.5:  # motions mostly lead somewhere
            ends = marked
        way.append(ends[rng.integers(len(ends))])
    return Motion(agent.name, tuple(way))


def _steps_between(a: tuple[int, int], b: tuple[int, int]) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _pushes(world: World, scene: Scene, agent) -> list[Motion]:
    """All ways in which the agent can push the crate straight on, at least one step."""
    crate = scene.crate
    assert crate is not None
    dx, dy = crate.place[0] - agent.place[0], crate.place[1] - agent.place[1]
    if (dx == 0) == (dy == 0):
        return []
    heading = (int(np.sign(dx)), int(np.sign(dy)))
    ways = []
    for k in range(1, world.cells):
        crate_end = (crate.place[0] + k * heading[0], crate.place[1] + k * heading[1])
        if not (0 <= crate_end[0] < world.cells and 0 <= crate_end[1] < world.cells):
            break
        ignore = (agent.name, crate.name)
        if not (
            leg_is_clear(scene, agent.place, crate.place, ignore)
            and leg_is_clear(scene, crate.place, crate_end, ignore)
        ):
            break
        end = (crate_end[0] - heading[0], crate_end[1] - heading[1])
        ways.append(Motion(agent.name, (agent.place, end), pushes=True))
    return ways


def sample_clips(
    world: World,
    faults: Faults,
    count: int,
    rng: np.random.Generator,
    styles: tuple[float, ...] = STYLE_SHARES,
    two_legs: float = TWO_LEGS,
) -> CaptionedClips:
    """`count` random captioned clips, with faults; `styles` are the shares of `narration.STYLES`.

    `two_legs` is as in `sample_motion`.
    """
    things, tracks, opacities, captions = [], [], [], []
    while len(captions) < count:
        scene = sample_scene(world, rng)
        motion = sample_motion(world, scene, rng, two_legs)
        if motion is None:
            continue
        captions.append(narrate(scene, motion, style=STYLES[rng.choice(len(STYLES), p=styles)]))
        track, opacity = _act_with_faults(world, scene, motion, faults, rng)
        things.append(scene.things)
        tracks.append(track)
        opacities.append(opacity)
    return CaptionedClips(render(world, things, tracks, opacities), captions)


def _act_with_faults(world, scene, motion, faults, rng) -> tuple[np.ndarray, np.ndarray]:
    frames, count = world.frames, len(scene.things)
    opacity = np.ones((frames, count))
    travel = rng.uniform(*faults.short_travel) if rng.random() < faults.short else 1.0
    if not motion.pushes and rng.random() < faults.other and len(scene.agents) > 1:
        motion = _other_agent(world, scene, motion, rng) or motion
    track = trajectories(world, scene, motion, travel=travel)
    moving = scene.index(motion.agent)
    if rng.random() < faults.jump:
        when = rng.integers(2, frames - 2)
        track[:when] = track[0]
        track[when:] = track[-1]
    if rng.random() < faults.blink:
        thing = moving if rng.random() < 0.5 else rng.integers(count)
        when = rng.integers(2, frames - 1)
        opacity[when : when + rng.integers(1, 3), thing] = 0.0
    if rng.random() < faults.vanish:
        thing = moving if rng.random() < 0.5 else rng.integers(count)
        when = rng.integers(2, frames - 2)
        opacity[when:, thing] = np.maximum(0.0, 1 - 0.5 * np.arange(1, frames - when + 1))
    return track, opacity


def _other_agent(world, scene, motion, rng) -> Motion | None:
    """The same displacement made by another agent, where the lattice allows it."""
    others = [a for a in scene.agents if a.name != motion.agent]
    other = others[rng.integers(len(others))]
    shift = (other.place[0] - motion.way[0][0], other.place[1] - motion.way[0][1])
    way = tuple((x + shift[0], y + shift[1]) for x, y in motion.way)
    inside = all(0 <= x < world.cells and 0 <= y < world.cells for x, y in way)
    return Motion(other.name, way) if inside else None
