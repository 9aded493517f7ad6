"""The sandbox's VLM: writes tasks and solutions for a scene image and answers yes/no questions about a clip.

It has what a VLM has and no more: the image that it is given to annotate, or the frames of the clip and the text of
the question. Its answers are graded log-odds, certain when a clip is clearly right or clearly wrong and near 0 in
between; they are the *reward*. The benchmark's verdicts come from `checker.py`, which shares neither code nor
thresholds with this file.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from world_distill.interfaces import JudgeAnswer, JudgeRequest, TaskPair
from world_distill.sandbox.narration import narrate
from world_distill.sandbox.tasks import KINDS, Deed, deeds
from world_distill.sandbox.vision import Sight, coverage, read_scene, watch
from world_distill.sandbox.world import COLOURS, Scene, World, floor, render

TASK = re.compile(r"\[(?P<agent>[^\]\n]+)\]:\s*(?P<instruction>[^\n\"]*?\.)")
CERTAIN = 6.0  # log-odds are kept within +-CERTAIN, as a real model's are


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Where the oracle changes its mind, and how softly (distances in cells).

    Attributes:
      reach: greatest distance to the goal in the last frame.
      reach_softness: width of the transition at `reach`.
      moved: least way of the named agent.
      still: greatest way of any other agent.
      movement_softness: width of the transition at `moved` and `still`.
      residual: greatest difference between a frame and the same things drawn cleanly, in units of one thing.
      residual_softness: width of the transition at `residual`.
      tint: greatest distance (0 to 255) of a thing's mean colour from the mixes of its own colour with the floor; the
        palette's colours are at least 80 apart in this sense.
      tint_softness: width of the transition at `tint`.
      leap: largest share of its whole way that a thing may make between two frames.
      leap_softness: width of the transition at `leap`.
    """

    reach: float = 0.42
    reach_softness: float = 0.09
    moved: float = 0.5
    still: float = 0.4
    movement_softness: float = 0.08
    residual: float = 0.40
    residual_softness: float = 0.08
    tint: float = 45.0
    tint_softness: float = 8.0
    leap: float = 0.42
    leap_softness: float = 0.06


class Oracle:
    """Annotator and judge of the sandbox (`interfaces.Annotator`, `interfaces.Judge`).

    Args:
      world: sizes of the world whose images it will be shown.
      kinds: kinds of task that it writes.
      tolerance: thresholds of its judgments.
    """

    def __init__(self, world: World, *, kinds: tuple[str, ...] = KINDS, tolerance: Tolerance | None = None):
        unknown = set(kinds) - set(KINDS)
        if unknown or not kinds:
            raise ValueError(f"unknown kinds of task {sorted(unknown)}; there are {', '.join(KINDS)}")
        self.world, self.kinds, self.tolerance = world, tuple(kinds), tolerance or Tolerance()
        sizes = f"{world.cells}x{world.size}x{world.frames}"
        limits = "-".join(f"{v:g}" for v in dataclasses.astuple(self.tolerance))
        self.name = f"sandbox-oracle-2/{sizes}/{limits}"
        self._read = functools.lru_cache(maxsize=256)(self._read_bytes)

    # Annotator -------------------------------------------------------------------------------------------------------

    def annotate(self, image: np.ndarray, *, max_pairs: int, seed: int) -> list[TaskPair]:
        """Up to `max_pairs` tasks, kinds taken in turn, drawn by `seed`."""
        scene = read_scene(self.world, image)
        found = deeds(self.world, scene, self.kinds)
        rng = np.random.default_rng(seed)
        by_kind = {k: [found[i] for i in rng.permutation(len(found)) if found[i].kind == k] for k in self.kinds}
        order = list(rng.permutation(self.kinds))
        chosen: list[Deed] = []
        while len(chosen) < max_pairs and any(by_kind.values()):
            chosen += [by_kind[k].pop() for k in order if by_kind[k]]
        return [TaskPair(d.task, narrate(scene, d.motion), d.agent, d.kind) for d in chosen[:max_pairs]]

    # Judge -----------------------------------------------------------------------------------------------------------

    def ask(self, requests: Sequence[JudgeRequest]) -> list[JudgeAnswer]:
        watched: dict[int, tuple[Scene | None, Sight | None]] = {}
        answers = []
        for request in requests:
            if id(request.clip) not in watched:
                scene = self._read(np.ascontiguousarray(request.clip[0]).tobytes())
                watched[id(request.clip)] = (scene, None if scene is None else watch(self.world, scene, request.clip))
            scene, sight = watched[id(request.clip)]
            answers.append(self._answer(request, scene, sight))
        return answers

    def _read_bytes(self, image: bytes) -> Scene | None:
        size = self.world.size
        try:
            return read_scene(self.world, np.frombuffer(image, np.uint8).reshape(size, size, 3))
        except ValueError:
            return None

    def _answer(self, request: JudgeRequest, scene: Scene | None, sight: Sight | None) -> JudgeAnswer:
        if scene is None or sight is None:
            return JudgeAnswer(None, "the first frame shows no scene of this world")
        question = request.question.lower()
        if re.search(r"\bconsistent\b", question):
            return JudgeAnswer(self._consistent(scene, sight, request.clip))
        match = TASK.search(request.question)
        deed = None
        if match:
            task = f"[{match['agent'].strip()}]: {match['instruction'].strip()}"
            deed = next((d for d in deeds(self.world, scene) if d.task == task), None)
        if deed is None:
            return JudgeAnswer(None, "the question names no task that this scene allows")
        if "task completed" in question:
            return JudgeAnswer(self._done(scene, sight, deed))
        if re.search(r"\bdid\b.*\bact\b", question):
            return JudgeAnswer(self._agent(scene, sight, deed))
        return JudgeAnswer(None, "the question is none that this oracle understands")

    def _done(self, scene: Scene, sight: Sight, deed: Deed) -> float:
        """Is the named thing at its goal in the end, and was the way point visited before?"""
        limit = self.tolerance
        thing = scene.index(deed.goal[0])
        if not sight.seen[-1, thing]:
            return -CERTAIN
        distance = np.linalg.norm(sight.centre[-1, thing] - np.add(deed.goal[1], 0.5))
        if deed.via is not None:
            agent = scene.index(deed.agent)
            near = np.linalg.norm(sight.centre[:, agent] - np.add(deed.via, 0.5), axis=-1)
            distance = max(distance, near.min())
        return _certainty((limit.reach - distance) / limit.reach_softness)

    def _agent(self, scene: Scene, sight: Sight, deed: Deed) -> float:
        """Did the named agent move, and no other agent?"""
        limit = self.tolerance
        way = np.linalg.norm(sight.centre - sight.centre[:1], axis=-1).max(0)  # [n]
        others = [way[scene.index(a.name)] for a in scene.agents if a.name != deed.agent]
        margin = min(way[scene.index(deed.agent)] - limit.moved, limit.still - max(others, default=0.0))
        return _certainty(margin / limit.movement_softness)

    def _consistent(self, scene: Scene, sight: Sight, clip: np.ndarray) -> float:
        """Does every frame look like the same things, drawn where they are seen, and do they move without leaps?"""
        limit = self.tolerance
        drawn = self._draw(scene, sight)
        margins = [
            (limit.residual - self._residual(scene, clip, drawn).max()) / limit.residual_softness,
            (limit.tint - self._tint(scene, clip, drawn).max()) / limit.tint_softness,
        ]
        steps = np.linalg.norm(np.diff(sight.centre, axis=0), axis=-1)  # [F-1 n]
        way = steps.sum(0)
        share = np.where(steps.max(0) > 0.55, steps.max(0) / np.maximum(way, 1e-6), 0.0).max()
        margins.append((limit.leap - share) / limit.leap_softness)
        if scene.crate is not None:
            margins.append(self._crate_margin(scene, sight))
        return _certainty(min(margins))

    def _draw(self, scene: Scene, sight: Sight) -> np.ndarray:
        """[F H W 3] uint8: the scene's things drawn cleanly where they are seen, rings where they belong."""
        track = sight.centre.copy()
        for n, thing in enumerate(scene.things):
            if thing.shape == "ring":
                track[:, n] = np.array(thing.place) + 0.5
        return render(self.world, [scene.things], [track])[0]

    def _residual(self, scene: Scene, clip: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """[F] squared difference from a clean drawing, in units of the faintest thing's own."""
        area = (self.world.size / self.world.cells) ** 2 / 2
        faintest = min(
            np.square(np.array(COLOURS[t.colour], np.float32) - floor(self.world).mean((0, 1))).sum()
            for t in scene.things
        )
        return np.square(clip - drawn.astype(np.float32)).sum((1, 2, 3)) / (area * faintest)

    def _tint(self, scene: Scene, clip: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """[F n] how far each thing's mean colour is from the mixes of its own colour with the floor."""
        cover = coverage(self.world, drawn, [t.colour for t in scene.things])
        cover = np.where(cover > 0.5, cover, np.float32(0.0))
        mass = cover.sum((-1, -2))
        # What shows of a thing under another may be too little to have a colour.
        shows = mass > mass[:1] / 3
        change = np.einsum("fnhw,fhwc->fnc", np.float32(cover > 0), clip - drawn.astype(np.float32))
        change /= np.maximum(mass, 1.0)[..., None]
        line = np.array([COLOURS[t.colour] for t in scene.things], np.float32) - floor(self.world).mean((0, 1))
        along = (change * line).sum(-1) / np.square(line).sum(-1)
        return np.where(shows, np.linalg.norm(change - along[..., None] * line, axis=-1), 0.0)

    def _crate_margin(self, scene: Scene, sight: Sight) -> float:
        """A crate moves only while an agent touches it."""
        limit = self.tolerance
        assert scene.crate is not None
        crate = scene.index(scene.crate.name)
        agents = [scene.index(a.name) for a in scene.agents]
        moved = np.linalg.norm(np.diff(sight.centre[:, crate], axis=0), axis=-1)
        gap = np.linalg.norm(sight.centre[1:, agents] - sight.centre[1:, None, crate], axis=-1).min(-1)
        alone = moved[gap > 1.45].sum()
        return (limit.still - alone) / limit.movement_softness


def _certainty(x: float | np.floating) -> float:
    return float(np.clip(x, -CERTAIN, CERTAIN))
