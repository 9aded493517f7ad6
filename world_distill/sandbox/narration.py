"""The language of the sandbox: how motions are narrated and tasks are phrased.

A narration says what is seen, in steps of the lattice: "The red disc moves three steps right and one step up, then
stops." Pretraining captions and solutions are narrations; a task never is one, and no task phrase is ever a caption.
"""

import re

import numpy as np

from world_distill.sandbox.world import DIRECTIONS, Motion, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GO = "Go to the {ring}."
BESIDE = "Stop just {side} the {ring}."
PUSH = "Push the {crate} onto the {ring}."
TWO = "Go to the {ring}, then to the {second}."
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _steps(count: int, direction: str) -> str:
    return f"{NUMBERS[count]} step{'' if count == 1 else 's'} {direction}"


def _displacement(start: tuple[int, int], end: tuple[int, int]) -> str:
    dx, dy = end[0] - start[0], end[1] - start[1]
    parts = []
    if dx:
        parts.append(_steps(abs(dx), "right" if dx > 0 else "left"))
    if dy:
        parts.append(_steps(abs(dy), "down" if dy > 0 else "up"))
    return " and ".join(parts)


STYLES = ("steps", "landmarks", "both")


def narrate(scene: Scene, motion: Motion, style: str = "both") -> str:
    """One present-tense sentence that tells the whole motion, agent first.

    Args:
      scene: what is there.
      motion: what happens.
      style: how ways are told: in "steps", by the ring where they end ("landmarks"), or "both". A way that ends at no
        ring, and a push, are told in steps whatever the style.
    """
    legs = []
    for start, end in zip(motion.way, motion.way[1:], strict=False):
        steps, landmark = _displacement(start, end), _landmark(scene, end)
        if landmark is None or style == "steps" or motion.pushes:
            legs.append(steps)
        else:
            legs.append(landmark if style == "landmarks" else f"{steps} {landmark}")
    if motion.pushes:
        crate = scene.crate
        assert crate is not None  # that is pushed
        heading = next(d for d in DIRECTIONS if d in legs[0])
        axis = 0 if DIRECTIONS[heading][0] else 1
        gap = abs(crate.place[axis] - motion.way[0][axis]) - 1
        pushed = abs(motion.way[-1][axis] - motion.way[0][axis]) - gap
        legs[0] += f", pushing the {crate.name} {_steps(pushed, heading)}"
        end = tuple(np.add(motion.way[-1], DIRECTIONS[heading]))
        ring = next((r for r in scene.rings if r.place == end), None)
        if ring is not None and style != "steps":
            legs[0] += f" onto the {ring.name}"
    return f"The {motion.agent} moves " + ", then moves ".join(legs) + ", then stops."


def _landmark(scene: Scene, place: tuple[int, int]) -> str | None:
    """The place by the ring that is there or next to it; None if there is none, or more than one."""
    found = [f"to the {ring.name}" for ring in scene.rings if ring.place == place]
    if not found:
        for side, offset in SIDES.items():
            found += [
                f"to just {side} the {ring.name}"
                for ring in scene.rings
                if (ring.place[0] + offset[0], ring.place[1] + offset[1]) == tuple(place)
            ]
    return found[0] if len(found) == 1 else None


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, punctuation dropped."""
    return re.findall(r"[a-z0-9]+", text.lower())
