"""Clips of the sandbox as they should be, and as they should not."""

import dataclasses
import functools
import re

import numpy as np

from world_distill.interfaces import JudgeRequest
from world_distill.judges.rubric import load_rubric
from world_distill.sandbox import checker
from world_distill.sandbox.narration import NUMBERS
from world_distill.sandbox.oracle import Oracle
from world_distill.sandbox.tasks import Deed, deeds
from world_distill.sandbox.world import COLOURS, DIRECTIONS, Scene, Thing, World, render, sample_scene, trajectories

WORLD = World()
RUBRIC = load_rubric()
QUESTIONS = ("task", "agent", "consistency")


def image_of(scene: Scene, world: World = WORLD) -> np.ndarray:
    places = np.array([[t.place for t in scene.things]], float) + 0.5
    return render(world, [scene.things], [places])[0, 0]


def scenes(count: int, seed: int, world: World = WORLD) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(world, rng) for _ in range(count)]


def free_places(scene: Scene, world: World = WORLD) -> list[tuple[int, int]]:
    """Lattice places with nothing on them or around them."""
    every = [(i, j) for i in range(world.cells) for j in range(world.cells)]
    return [p for p in every if all(max(abs(p[0] - t.place[0]), abs(p[1] - t.place[1])) > 1 for t in scene.things)]


@dataclasses.dataclass
class Act:
    """A motion that is still to be drawn: things, where they are and how opaque, to be spoilt at will."""

    scene: Scene
    deed: Deed
    track: np.ndarray  # [F n 2]
    opacity: np.ndarray  # [F n]
    things: tuple[Thing, ...]

    @property
    def clip(self) -> np.ndarray:
        return render(WORLD, [self.things], [self.track], [self.opacity])[0]

    @property
    def goal(self) -> int:
        return self.scene.index(self.deed.goal[0])

    @property
    def agent(self) -> int:
        return self.scene.index(self.deed.agent)

    def add(self, thing: Thing, track: np.ndarray, start: int) -> None:
        """One more thing, to be seen from frame `start` on."""
        self.things = (*self.things, thing)
        self.track = np.concatenate([self.track, track[:, None]], axis=1)
        self.opacity = np.concatenate([self.opacity, np.ones((len(track), 1))], axis=1)
        self.opacity[:start, -1] = 0.0


def act(scene: Scene, deed: Deed, *, travel: float = 1.0) -> Act:
    track = trajectories(WORLD, scene, deed.motion, travel=travel)
    return Act(scene, deed, track, np.ones(track.shape[:2]), scene.things)


@functools.cache
def deeds_by_kind(count: int, seed: int) -> dict[str, list[tuple[Scene, Deed]]]:
    """`count` deeds of each kind, no more than two of a kind from one scene."""
    rng = np.random.default_rng(seed)
    found: dict[str, list] = {kind: [] for kind in ("go", "beside", "push", "sequence")}
    while min(map(len, found.values())) < count:
        scene = sample_scene(WORLD, rng)
        for kind, have in found.items():
            options = [d for d in deeds(WORLD, scene) if d.kind == kind]
            for i in rng.permutation(len(options))[:2]:
                if len(have) < count:
                    have.append((scene, options[i]))
    return found


def some_deeds(count: int, seed: int) -> list[tuple[Scene, Deed]]:
    """`count` deeds of each kind in one list."""
    return [pair for pairs in deeds_by_kind(count, seed).values() for pair in pairs]


def ask(oracle: Oracle, deed: Deed, clip: np.ndarray) -> dict[str, float]:
    """Log-odds of the package's own questions."""
    requests = [JudgeRequest(clip, RUBRIC.render(q, deed.task, deed.agent)) for q in QUESTIONS]
    answers = oracle.ask(requests)
    assert all(a.error is None for a in answers), answers
    return {q: a.log_odds for q, a in zip(QUESTIONS, answers, strict=True)}


def check(scene: Scene, deed: Deed, clip: np.ndarray) -> dict[str, bool]:
    return checker.check(WORLD, scene, deed.task, clip)


# ---- Words


def read_narration(text, scene):
    """(agent, displacement of each leg, displacement of what is pushed or None) from the words and the scene."""
    agent, rest = re.fullmatch(r"The ([a-z]+ [a-z]+) moves (.*), then stops\.", text).groups()
    pushed = None
    if ", pushing the " in rest:
        rest, what = rest.split(", pushing the ")
        thing, steps, ring = re.fullmatch(r"([a-z]+ crate) (.+?)(?: onto the ([a-z]+ ring))?", what).groups()
        pushed = thing, steps_of(steps)
        if ring:
            assert np.add(place_of(scene, thing), pushed[1]).tolist() == place_of(scene, ring)
    at, legs = place_of(scene, agent), []
    for leg in rest.split(", then moves "):
        steps, side, ring = re.fullmatch(r"(.*?) ?(?:to (?:just (.+?) )?the ([a-z]+ ring))?", leg).groups()
        ways = [steps_of(steps)] if steps else []
        if ring:
            end = np.add(place_of(scene, ring), BESIDE[side] if side else 0)
            ways.append(np.subtract(end, at).tolist())
        assert ways and all(way == ways[0] for way in ways), leg  # steps and landmark say the same
        legs.append(ways[0])
        at = np.add(at, ways[0]).tolist()
    return agent, legs, pushed


BESIDE = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def place_of(scene, name):
    return list(scene.things[scene.index(name)].place)


def steps_of(text):
    total = np.zeros(2, int)
    for part in text.split(" and "):
        number, unit, direction = part.split(" ")
        assert unit == ("step" if number == "one" else "steps")
        total += NUMBERS.index(number) * np.array(DIRECTIONS[direction])
    return total.tolist()


# ---- Faults: each takes (act, rng), spoils the act and says whether the scene allows it


def stop_short(it: Act, rng) -> bool:
    it.track = trajectories(WORLD, it.scene, it.deed.motion, travel=0.5)
    return True


def another_agent(it: Act, rng) -> bool:
    others = [d for d in deeds(WORLD, it.scene) if d.agent != it.deed.agent and d.kind == "go"]
    if others:
        it.track = trajectories(WORLD, it.scene, others[rng.integers(len(others))].motion)
    return bool(others)


def both_move(it: Act, rng) -> bool:
    """The named agent does what it should, and another one goes somewhere too."""
    others = [d for d in deeds(WORLD, it.scene) if d.agent != it.deed.agent and d.kind in ("go", "beside")]
    if others:
        other = others[rng.integers(len(others))]
        track = trajectories(WORLD, it.scene, other.motion)
        moving = it.scene.index(other.agent)
        it.track[:, moving] = track[:, moving]
    # Not through one another: that would be a fault of its own.
    solid = [n for n, t in enumerate(it.scene.things) if t.shape != "ring"]
    gaps = [np.linalg.norm(it.track[:, i] - it.track[:, j], axis=-1).min() for i in solid for j in solid if i < j]
    return bool(others) and min(gaps) > 0.95


def frozen(it: Act, rng) -> bool:
    it.track = trajectories(WORLD, it.scene, None)
    return True


def blink(it: Act, rng) -> bool:
    seen = _not_covered(it)
    thing = seen[rng.integers(len(seen))]
    when = rng.integers(2, WORLD.frames - 1)
    it.opacity[when : when + rng.integers(1, 3), thing] = 0.0
    return True


def vanish(it: Act, rng) -> bool:
    seen = _not_covered(it)
    it.opacity[rng.integers(3, 7) :, seen[rng.integers(len(seen))]] = 0.0
    return True


def goal_thing_vanishes(it: Act, rng) -> bool:
    it.opacity[-2:, it.goal] = 0.0
    return True


def jump(it: Act, rng) -> bool:
    when = rng.integers(2, 7)
    it.track[:when], it.track[when:] = it.track[0].copy(), it.track[-1].copy()
    return True


def ghost(it: Act, rng) -> bool:
    """A second copy of some thing, away from all others, from the fifth frame on."""
    places = [p for p in free_places(it.scene) if np.linalg.norm(it.track - np.add(p, 0.5), axis=-1).min() > 1]
    if places:
        place = np.add(places[rng.integers(len(places))], 0.5)
        thing = it.scene.things[rng.integers(len(it.scene.things))]
        it.add(thing, np.repeat(place[None], WORLD.frames, axis=0), 4)
    return bool(places)


def recolour(it: Act, rng) -> bool:
    """A thing that is not covered turns into another colour, one that the scene has not."""
    seen = _not_covered(it)
    thing = seen[rng.integers(len(seen))]
    free = sorted(COLOURS.keys() - {t.colour for t in it.scene.things})
    changed = dataclasses.replace(it.scene.things[thing], colour=free[rng.integers(len(free))])
    it.opacity[4:, thing] = 0.0
    it.add(changed, it.track[:, thing], 4)
    return True


def move_ring(it: Act, rng) -> bool:
    places = free_places(it.scene)
    if places:
        ring = it.scene.index(it.scene.rings[rng.integers(len(it.scene.rings))].name)
        end = np.add(places[rng.integers(len(places))], 0.5)
        share = (
            np.linspace(0, 1, WORLD.frames)[:, None] if rng.random() < 0.5 else np.arange(WORLD.frames)[:, None] >= 4
        )
        it.track[:, ring] += share * (end - it.track[0, ring])
    return bool(places)


def crate_moves_alone(it: Act, rng) -> bool:
    """The crate glides one place on, while every agent is far."""
    if it.scene.crate is None or it.deed.kind == "push":
        return False
    crate = it.scene.index(it.scene.crate.name)
    agents = [it.scene.index(a.name) for a in it.scene.agents]
    for step in rng.permutation(np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])):
        track = it.track.copy()
        track[:, crate] += np.linspace(0, 1, WORLD.frames)[:, None] * step
        far = np.linalg.norm(track[:, agents] - track[:, [crate]], axis=-1).min() > 1.8
        if far and np.all((track[-1, crate] > 0) & (track[-1, crate] < WORLD.cells)):
            it.track = track
            return True
    return False


# Fault -> (questions that have to be answered no, questions that have to be answered yes).
FAULTS = {
    stop_short: (("task",), ("consistency",)),
    another_agent: (("task", "agent"), ("consistency",)),
    both_move: (("agent",), ("task", "consistency")),
    frozen: (("task", "agent"), ("consistency",)),
    blink: (("consistency",), ()),
    vanish: (("consistency",), ()),
    goal_thing_vanishes: (("task", "consistency"), ()),
    jump: (("consistency",), ("agent",)),
    ghost: (("consistency",), ()),
    recolour: (("consistency",), ()),
    move_ring: (("consistency",), ()),
    crate_moves_alone: (("consistency",), ("task", "agent")),
}


def _not_covered(it: Act) -> list[int]:
    """Things that no other ever stands on or comes close to."""
    free = []
    for n in range(len(it.scene.things)):
        others = [i for i in range(len(it.scene.things)) if i != n]
        if np.linalg.norm(it.track[:, others] - it.track[:, [n]], axis=-1).min() > 1.2:
            free.append(n)
    return free or [it.agent]


@functools.cache
def spoilt(fault, count: int, seed: int) -> list[Act]:
    """`count` clips with one fault each, of all kinds of deed that allow it."""
    rng = np.random.default_rng(seed)
    made: list[Act] = []
    for attempt in range(50 * count):
        scene = sample_scene(WORLD, rng)
        options = deeds(WORLD, scene)
        kinds = sorted({d.kind for d in options})
        if not kinds:
            continue
        options = [d for d in options if d.kind == kinds[attempt % len(kinds)]]
        it = act(scene, options[rng.integers(len(options))])
        if fault(it, rng):
            made.append(it)
        if len(made) == count:
            return made
    raise AssertionError(f"no scene allows {fault.__name__}")
