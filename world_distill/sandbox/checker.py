"""The sandbox's benchmark: hard verdicts on a clip, from the true layout of its scene.

Written apart from `oracle.py` on purpose. The oracle unmixes colours, follows centres of mass and answers in graded
log-odds; this file gives every pixel to its nearest palette colour, follows connected blobs by their bounding boxes,
knows the true scene (stored in the PNG by `scenes.py`), and answers yes or no by thresholds of its own. A policy that
learns to please the oracle rather than to do the task shows as a gap between the two.
"""

import dataclasses
import re

import numpy as np
from scipy import ndimage

from world_distill.sandbox.world import COLOURS, FLOOR, Scene, Thing, World

QUESTIONS = ("task", "agent", "consistency")
_SIDE = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a task asks for."""

    agent: str
    thing: str  # what has to arrive
    place: tuple[int, int]
    via: tuple[int, int] | None = None


def parse_task(scene: Scene, task: str) -> Goal:
    """What a task text asks for in a scene.

    Raises:
      ValueError: it is no task of this world, or names a thing that is not in the scene.
    """
    match = re.fullmatch(r"\[(?P<agent>[a-z ]+)\]: (?P<what>.+)\.", task)
    if match is None:
        raise ValueError(f"not a sandbox task: {task!r}")
    agent, what = match["agent"], match["what"]
    places = {t.name: t.place for t in scene.things}

    def place(name: str) -> tuple[int, int]:
        if name not in places:
            raise ValueError(f"task {task!r} names {name!r}; the scene has {', '.join(places)}")
        return places[name]

    place(agent)
    if m := re.fullmatch(r"Go to the ([a-z ]+), then to the ([a-z ]+)", what):
        return Goal(agent, agent, place(m[2]), via=place(m[1]))
    if m := re.fullmatch(r"Go to the ([a-z ]+)", what):
        return Goal(agent, agent, place(m[1]))
    if m := re.fullmatch(r"Push the ([a-z ]+) onto the ([a-z ]+)", what):
        place(m[1])
        return Goal(agent, m[1], place(m[2]))
    if m := re.fullmatch(r"Stop just (left of|right of|above|below) the ([a-z ]+)", what):
        x, y = place(m[2])
        dx, dy = _SIDE[m[1]]
        return Goal(agent, agent, (x + dx, y + dy))
    raise ValueError(f"not a sandbox task: {task!r}")


def check(world: World, scene: Scene, task: str, clip: np.ndarray) -> dict[str, bool]:
    """Verdicts on one clip [F H W 3] uint8: task completed, by the named agent, consistent throughout."""
    goal = parse_task(scene, task)
    owners = _owners(scene, clip)
    blobs = [Blob.follow(world, scene, n, owners) for n in range(len(scene.things))]
    by_name = {t.name: b for t, b in zip(scene.things, blobs, strict=True)}
    actor, target = by_name[goal.agent], by_name[goal.thing]

    arrived = bool(target.there[-1]) and _near(target.centre[-1], goal.place)
    if goal.via is not None:
        arrived &= any(_near(c, goal.via) for c in actor.centre)
    others = [by_name[a.name].reach for a in scene.agents if a.name != goal.agent]
    acted = actor.reach >= 0.6 and all(r < 0.5 for r in others)
    consistent = all(b.steady(world) for b in blobs) and _crate_is_pushed(scene, by_name)
    return {"task": arrived, "agent": acted, "consistency": consistent}


def _owners(scene: Scene, clip: np.ndarray) -> np.ndarray:
    """[F H W] index of the thing that each pixel belongs to, -1 for the floor.

    A thing's colour and its even mix with the floor (its soft edge) both count as the thing. A pixel that is far from
    all of these is nothing's.
    """
    things = np.array([COLOURS[t.colour] for t in scene.things], np.float32)
    ground = np.array(FLOOR, np.float32)
    palette = np.concatenate([ground, things, (things + ground.mean(0)) / 2])
    pixels = clip.astype(np.float32)
    distance = np.square(pixels).sum(-1)[..., None] + np.square(palette).sum(-1) - 2 * pixels @ palette.T
    nearest = distance.argmin(-1) - len(FLOOR)
    return np.where((nearest < 0) | (distance.min(-1) > 75.0**2), -1, nearest % len(things))


def _solid(mask: np.ndarray) -> np.ndarray:
    """[H W] without single pixels and lines: where two things meet, their mix may have the colour of a third."""
    thick = ndimage.binary_opening(mask, np.ones((2, 2)))
    return mask & ndimage.binary_dilation(thick, np.ones((3, 3)))


def _near(centre: np.ndarray, place: tuple[int, int]) -> bool:
    return bool(np.abs(centre - np.array(place) - 0.5).max() <= 0.4)


@dataclasses.dataclass(frozen=True)
class Blob:
    """One thing followed through a clip.

    Attributes:
      thing: what it is.
      area: [F] pixels of its largest blob.
      spare: [F] pixels of its colour's second largest blob.
      centre: [F 2] middle of the blob's bounding box in cells; the last one known where there is none.
      there: [F] whether a blob of reasonable size is there.
      hidden: [F] whether another thing may be standing on its first place.
      buried: [F] whether the crate is.
      stayed, strayed: [F] pixels of its colour at its first place, and elsewhere.
    """

    thing: Thing
    area: np.ndarray
    spare: np.ndarray
    centre: np.ndarray
    there: np.ndarray
    hidden: np.ndarray
    buried: np.ndarray
    stayed: np.ndarray
    strayed: np.ndarray

    @classmethod
    def follow(cls, world: World, scene: Scene, own: int, owners: np.ndarray) -> "Blob":
        thing = scene.things[own]
        cell = world.size / world.cells
        frames = len(owners)
        area, spare, stayed, strayed = np.zeros((4, frames))
        centre = np.repeat(np.array([thing.place], float) + 0.5, frames, axis=0)
        hidden, buried = np.zeros((2, frames), bool)
        crate = scene.things.index(scene.crate) if scene.crate else None
        x0, y0 = (int(round((p - 0.1) * cell)) for p in thing.place)
        span = int(round(1.2 * cell))
        for f in range(frames):
            mine = owners[f] == own
            if thing.shape != "ring":
                mine = _solid(mine)
            found = ndimage.label(mine, structure=np.ones((3, 3)))
            labels, count = found  # pyright: ignore[reportGeneralTypeIssues]  # a pair, as no output is given
            sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
            around = owners[f, max(0, y0) : y0 + span, max(0, x0) : x0 + span]
            hidden[f] = _solid((around >= 0) & (around != own)).sum() >= 0.1 * cell**2
            buried[f] = crate is not None and _solid(around == crate).sum() >= 0.1 * cell**2
            stayed[f] = (around == own).sum()
            strayed[f] = (owners[f] == own).sum() - stayed[f]
            if count:
                order = np.argsort(sizes)
                area[f] = sizes[order[-1]]
                spare[f] = sizes[order[-2]] if count > 1 else 0
                ys, xs = np.nonzero(labels == order[-1] + 1)
                centre[f] = (xs.min() + xs.max() + 1) / 2 / cell, (ys.min() + ys.max() + 1) / 2 / cell
            elif f:
                centre[f] = centre[f - 1]
        there = area >= 0.45 * area[0]
        return cls(thing, area, spare, centre, there, hidden, buried, stayed, strayed)

    @property
    def reach(self) -> float:
        """Furthest distance from the start, in cells."""
        return float(np.linalg.norm(self.centre - self.centre[0], axis=-1).max())

    def steady(self, world: World) -> bool:
        """It never vanishes, swells, doubles or leaps; rings stay where they are."""
        if self.thing.shape == "ring":
            # An agent on the ring hides up to half of it and may cut it into pieces, the crate may leave nothing.
            fine = self.hidden | ((self.area >= 0.6 * self.area[0]) & (self.area <= 1.5 * self.area[0]))
            fine &= self.hidden | (np.abs(self.centre - self.centre[0]).max(-1) <= 0.3)
            fine &= self.buried | (self.stayed >= 0.25 * self.stayed[0])
            return bool(fine.all() and (self.strayed <= 0.85 * self.area[0]).all())
        whole = self.there & (self.area <= 1.7 * self.area[0])
        single = self.spare <= 0.45 * self.area[0]
        steps = np.linalg.norm(np.diff(self.centre, axis=0), axis=-1)
        leaps = (steps > 0.75) & (steps > 0.5 * steps.sum())
        return bool(whole.all() and single.all() and not leaps.any())


def _crate_is_pushed(scene: Scene, blobs: dict[str, Blob]) -> bool:
    """The crate never moves without an agent at its side."""
    if scene.crate is None:
        return True
    crate = blobs[scene.crate.name]
    left = crate.centre[0]  # where it was when an agent was last at its side
    for f in range(1, len(crate.centre)):
        if min(np.linalg.norm(blobs[a.name].centre[f] - crate.centre[f]) for a in scene.agents) <= 1.6:
            left = crate.centre[f]
        elif np.linalg.norm(crate.centre[f] - left) > 0.4:
            return False
    return True
