"""What there is to do in a scene: every feasible task with the one motion that does it.

A motion is determined by scene and task (one canonical straight way, a fixed duration), so that a video model given
image and task alone *can* know what to show; what makes it hard is to read the scene, not to guess.
"""

import dataclasses
import functools

import numpy as np

from world_distill.sandbox import narration
from world_distill.sandbox.world import Motion, Scene, Thing, World, distance_to_leg, leg_is_clear

KINDS = ("go", "beside", "push", "sequence")


@dataclasses.dataclass(frozen=True)
class Deed:
    """A task of the sandbox.

    Attributes:
      kind: one of `KINDS`.
      agent: name of the agent.
      instruction: the imperative part of the task.
      motion: what does it.
      goal: name of the thing that has to be somewhere in the end, and the place where.
      via: place that the agent has to visit on the way, if any.
    """

    kind: str
    agent: str
    instruction: str
    motion: Motion
    goal: tuple[str, tuple[int, int]]
    via: tuple[int, int] | None = None

    @property
    def task(self) -> str:
        return f"[{self.agent}]: {self.instruction}"


@functools.lru_cache(maxsize=1024)
def deeds(world: World, scene: Scene, kinds: tuple[str, ...] = KINDS) -> tuple[Deed, ...]:
    """All feasible tasks of the given kinds."""
    found: list[Deed] = []
    for agent in scene.agents:
        for ring in scene.rings:
            if "go" in kinds and _clear(scene, agent, agent.place, ring.place):
                text = narration.GO.format(ring=ring.name)
                motion = Motion(agent.name, (agent.place, ring.place))
                found.append(Deed("go", agent.name, text, motion, (agent.name, ring.place)))
            if "beside" in kinds:
                found += _beside(world, scene, agent, ring)
            if "push" in kinds and scene.crate is not None:
                found += _push(scene, agent, ring)
            if "sequence" in kinds and _clear(scene, agent, agent.place, ring.place):
                for second in scene.rings:
                    if second != ring and _clear(scene, agent, ring.place, second.place):
                        text = narration.TWO.format(ring=ring.name, second=second.name)
                        motion = Motion(agent.name, (agent.place, ring.place, second.place))
                        goal = (agent.name, second.place)
                        found.append(Deed("sequence", agent.name, text, motion, goal, via=ring.place))
    return tuple(found)


def _clear(scene: Scene, agent: Thing, start, end) -> bool:
    return leg_is_clear(scene, start, end, ignore=(agent.name,))


def _beside(world: World, scene: Scene, agent: Thing, ring: Thing) -> list[Deed]:
    found = []
    for side, (dx, dy) in narration.SIDES.items():
        place = (ring.place[0] + dx, ring.place[1] + dy)
        inside = 0 <= place[0] < world.cells and 0 <= place[1] < world.cells
        if inside and place != agent.place and _beside_is_free(scene, agent, ring, place):
            text = narration.BESIDE.format(side=side, ring=ring.name)
            motion = Motion(agent.name, (agent.place, place))
            found.append(Deed("beside", agent.name, text, motion, (agent.name, place)))
    return found


def _beside_is_free(scene: Scene, agent: Thing, ring: Thing, place) -> bool:
    """The place is empty, and the way to it clear (the ring itself is a floor marking, its edge may be touched)."""
    if any(t.place == place for t in scene.things):
        return False
    clear = leg_is_clear(scene, agent.place, place, ignore=(agent.name, ring.name))
    return clear and distance_to_leg(agent.place, place, ring.place) >= 0.6


def _push(scene: Scene, agent: Thing, ring: Thing) -> list[Deed]:
    crate = scene.crate
    assert crate is not None
    to_crate = np.subtract(crate.place, agent.place)
    to_ring = np.subtract(ring.place, crate.place)
    heading = np.sign(to_crate)
    in_line = (heading == 0).sum() == 1 and tuple(np.sign(to_ring)) == tuple(heading)
    if not in_line:
        return []
    ignore = (agent.name, crate.name)
    legs = ((agent.place, crate.place), (crate.place, ring.place))
    if not all(leg_is_clear(scene, start, end, ignore) for start, end in legs):
        return []
    end = (int(ring.place[0] - heading[0]), int(ring.place[1] - heading[1]))
    text = narration.PUSH.format(crate=crate.name, ring=ring.name)
    motion = Motion(agent.name, (agent.place, end), pushes=True)
    return [Deed("push", agent.name, text, motion, (crate.name, ring.place))]
