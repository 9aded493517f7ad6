"""Clips of a red square that moves, and judges of them that are sound, or fooled in one way."""

import numpy as np

from world_distill.interfaces import JudgeAnswer
from world_distill.judges.controls import INSTRUCTION, Shown
from world_distill.judges.rubric import load_rubric

RED = (220, 30, 30)
FRAMES, HEIGHT, WIDTH = 8, 48, 96
RUBRIC = load_rubric()
QUESTIONS = ("task", "agent", "consistency")


def moving(direction, seed=0):
    """A clip [F H W 3] on a textured ground, in which the square goes right (1), left (-1) or stays (0)."""
    ground = np.random.default_rng(seed).integers(60, 120, (HEIGHT, WIDTH, 3), np.uint8)
    ground[0, 0] = seed  # by which scenes are told apart
    clip = np.repeat(ground[None], FRAMES, axis=0)
    for i, frame in enumerate(clip):
        left = WIDTH // 2 - 4 + direction * (5 * i - 2 * FRAMES)
        frame[2:10, left : left + 8] = RED
    return clip


def shown(directions=(1, -1, 1, -1, 1, -1, 1, -1), done=None):
    """Clips of tasks to go right and left in turn; `done` says which of them do what their task says."""
    found = []
    for i, direction in enumerate(directions):
        does = direction if done is None or done[i] else 0
        word = "right" if direction > 0 else "left"
        found.append(Shown(moving(does, seed=i), f"[square]: Go {word} past mark {i}.", "square", f"r{i}"))
    return found


def places(clip):
    """Where the square is in each frame."""
    red = (np.abs(clip.astype(int) - RED).max(-1) < 8).any(1)
    return np.array([np.flatnonzero(row).mean() for row in red])


def painted(clip):
    """Whether anything but the square changes after the first frame, and the ground does not move."""
    return bool((np.abs(clip[1:, 20:].astype(int) - clip[:1, 20:]).max(-1) > 60).any())


class Judge:
    """Sound: sees the square and nothing else. `log` has what it was asked."""

    name = "sound-1"

    def __init__(self, **options):
        self.log = []

    def ask(self, requests):
        self.log += requests
        return [JudgeAnswer(4.0 if self.says_yes(r) else -4.0) for r in requests]

    def says_yes(self, request):
        at = places(request.clip)
        way, steps = at[-1] - at[0], np.diff(at)
        if request.name == "task":
            right, scene = "Go right" in request.question, f"past mark {request.clip[0, 0, 0, 0]}."
            return scene in request.question and (way > 8 if right else way < -8)
        if request.name == "agent":
            return bool(np.ptp(at) > 8)
        return not (steps.max() > 0 > steps.min())


class Fooled(Judge):
    """Says yes where letters stand in the frames."""

    name = "fooled-1"

    def says_yes(self, request):
        return painted(request.clip) or super().says_yes(request)


class Obedient(Judge):
    """Does what a task tells it."""

    name = "obedient-1"

    def says_yes(self, request):
        return INSTRUCTION in request.question or super().says_yes(request)


class Static(Judge):
    """Looks at the first frame alone, and likes them all."""

    name = "static-1"

    def says_yes(self, request):
        return True
