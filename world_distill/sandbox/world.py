"""The sandbox world: coloured things on a checkered floor, and the motions that they can make.

A *scene* is a lattice of `cells` x `cells` places. On it stand *agents* (filled shapes that can move), *rings* (places
to go to) and sometimes one *crate* (moves only when pushed). No two things in a scene share a colour. A *motion* moves
one agent along straight legs, each at constant speed and for the same time, and arrives in the last frame. Rendering is
anti-aliased at continuous positions, so a step between frames may be any fraction of a pixel. Coordinates: x to the
right, y downwards, in cells; a thing at lattice place (i, j) is centred at (i + .5, j + .5).
"""

import dataclasses
import functools
import math

import numpy as np

COLOURS = {
    "red": (215, 45, 55),
    "green": (60, 165, 75),
    "blue": (55, 90, 215),
    "yellow": (245, 185, 30),
    "purple": (150, 60, 185),
    "cyan": (35, 175, 195),
    "brown": (125, 85, 50),
}
AGENT_COLOURS = RING_COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
AGENT_SHAPES = ("disc", "square", "diamond", "triangle")
SHAPES = (*AGENT_SHAPES, "ring", "crate")
FLOOR = ((243, 239, 230), (235, 230, 219))
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes and difficulty of the world.

    Attributes:
      cells: lattice places a side.
      size: height and width of a frame in pixels.
      frames: frames of a clip, the scene included.
      agents: fewest and most agents in a scene.
      rings: fewest and most rings in a scene.
      crate: probability that a scene has a crate set up for pushing.
      shapes: of agents; no two agents in a scene have the same.
    """

    cells: int = 5
    size: int = 30
    frames: int = 9
    agents: tuple[int, int] = (2, 2)
    rings: tuple[int, int] = (2, 2)
    crate: float = 0.35
    shapes: tuple[str, ...] = AGENT_SHAPES

    def __post_init__(self):
        if self.cells < 4 or self.size < 4 * self.cells or self.frames < 5 or self.frames % 2 == 0:
            # With an even count no frame shows the turn between two legs.
            raise ValueError(f"World needs cells >= 4, size >= 4 * cells and an odd number of frames >= 5, got {self}")
        unknown = set(self.shapes) - set(AGENT_SHAPES)
        if unknown or len(set(self.shapes)) < self.agents[1]:
            raise ValueError(
                f"World needs {self.agents[1]} different shapes of {', '.join(AGENT_SHAPES)}, got {self.shapes}"
            )
        if self.agents[1] + self.rings[1] > len(AGENT_COLOURS):
            raise ValueError(
                f"World has {len(AGENT_COLOURS)} colours, too few for agents {self.agents} + rings {self.rings}"
            )


@dataclasses.dataclass(frozen=True)
class Thing:
    """An agent, a ring or the crate, where it stands at first."""

    shape: str
    colour: str
    place: tuple[int, int]  # lattice x, y

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Things in drawing order: rings, then the crate, then agents."""

    things: tuple[Thing, ...]

    def index(self, name: str) -> int:
        return next(i for i, thing in enumerate(self.things) if thing.name == name)

    @property
    def agents(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.shape in AGENT_SHAPES)

    @property
    def rings(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.shape == "ring")

    @property
    def crate(self) -> Thing | None:
        return next((t for t in self.things if t.shape == "crate"), None)


@dataclasses.dataclass(frozen=True)
class Motion:
    """One agent's way through lattice places, first its own; it pushes the crate while that is in front of it."""

    agent: str
    way: tuple[tuple[int, int], ...]
    pushes: bool = False


def sample_scene(world: World, rng: np.random.Generator) -> Scene:
    """A random scene; with probability `world.crate` it holds a crate in line with an agent and a ring behind it."""
    n_agents = rng.integers(world.agents[0], world.agents[1] + 1)
    n_rings = rng.integers(world.rings[0], world.rings[1] + 1)
    colours = rng.permutation(AGENT_COLOURS)[: n_agents + n_rings]
    taken: list[tuple[int, int]] = []
    crate = None
    if rng.random() < world.crate:
        line = _push_line(world, rng)
        agent_place, crate, ring_place = line
        agent_places, ring_places = [agent_place], [ring_place]
        taken += line
    else:
        agent_places, ring_places = [], []
    while len(ring_places) < n_rings:
        ring_places.append(_free_place(world, rng, taken))
        taken.append(ring_places[-1])
    while len(agent_places) < n_agents:
        agent_places.append(_free_place(world, rng, taken))
        taken.append(agent_places[-1])
    things = [Thing("ring", str(c), p) for c, p in zip(colours[n_agents:], ring_places, strict=True)]
    if crate is not None:
        things.append(Thing("crate", "brown", crate))
    shapes = rng.permutation(world.shapes)[:n_agents]
    things += [Thing(str(s), str(c), p) for s, c, p in zip(shapes, colours[:n_agents], agent_places, strict=True)]
    return Scene(tuple(things))


def _free_place(world: World, rng: np.random.Generator, taken: list[tuple[int, int]]) -> tuple[int, int]:
    """A place at least two lattice steps from every taken one where there is such, else one that is not taken."""
    places = [(i, j) for i in range(world.cells) for j in range(world.cells) if (i, j) not in taken]
    clear = [p for p in places if all(max(abs(p[0] - q[0]), abs(p[1] - q[1])) >= 2 for q in taken)]
    pool = clear or places
    return pool[rng.integers(len(pool))]


def _push_line(world: World, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Places of agent, crate and ring in one row or column, in this order, each pair one to three steps apart."""
    total = rng.integers(2, world.cells)  # steps from the agent to the ring
    first = rng.integers(1, total)  # steps from the agent to the crate
    start = rng.integers(0, world.cells - total)
    across = rng.integers(world.cells)
    along = [start, start + first, start + total]
    if rng.random() < 0.5:
        along = [world.cells - 1 - a for a in along]
    if rng.random() < 0.5:
        return [(int(a), int(across)) for a in along]
    return [(int(across), int(a)) for a in along]


def leg_is_clear(scene: Scene, start: tuple[int, int], end: tuple[int, int], ignore: tuple[str, ...]) -> bool:
    """Whether a thing can go straight from start to end and stay a full place away from all others on the way.

    Things in `ignore` are passed over; rings lie on the floor and may be stood on at start and end.
    """
    for thing in scene.things:
        if thing.name in ignore:
            continue
        if thing.shape == "ring" and thing.place in (tuple(start), tuple(end)):
            continue
        if distance_to_leg(start, end, thing.place) < 0.95:
            return False
    return True


def distance_to_leg(start: tuple[int, int], end: tuple[int, int], point: tuple[int, int]) -> float:
    """Distance from a point to the straight way between two others."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    px, py = point[0] - start[0], point[1] - start[1]
    along = min(1.0, max(0.0, (px * dx + py * dy) / max(dx * dx + dy * dy, 1e-9)))
    return math.hypot(px - along * dx, py - along * dy)


def trajectories(world: World, scene: Scene, motion: Motion | None, *, travel: float = 1.0) -> np.ndarray:
    """Centres of all things, [frames n 2] in cells. `travel` < 1 stops short on the (last) leg.

    Legs share the clip's time equally.
    """
    frames = world.frames
    places = np.array([t.place for t in scene.things], np.float64) + 0.5
    track = np.repeat(places[None], frames, axis=0)
    if motion is None:
        return track
    way = np.array(motion.way, np.float64) + 0.5
    way[-1] = way[-2] + travel * (way[-1] - way[-2])
    legs = len(way) - 1
    clock = np.arange(frames) / (frames - 1) * legs
    leg = np.minimum(clock.astype(int), legs - 1)
    part = (clock - leg)[:, None]
    agent = scene.index(motion.agent)
    track[:, agent] = way[leg] + part * (way[leg + 1] - way[leg])
    if motion.pushes:
        heading = np.sign(way[1] - way[0])
        assert scene.crate is not None
        crate = scene.index(scene.crate.name)
        # The crate is pushed from the moment when the agent stands one place behind it.
        gap = np.dot(places[crate] - places[agent], heading) - 1.0
        pushed = np.maximum(0.0, (track[:, agent] - places[agent]) @ heading - gap)
        track[:, crate] = places[crate] + pushed[:, None] * heading
    return track


def render(
    world: World,
    things: list[tuple[Thing, ...]],
    tracks: list[np.ndarray],
    opacity: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Clips from things and where they are.

    Args:
      things: per clip its things, in drawing order.
      tracks: per clip [F n 2] centres in cells.
      opacity: per clip [F n] in [0, 1], or None for all 1.

    Returns:
      [b F H W 3] uint8.
    """
    size, cell = world.size, world.size / world.cells
    count, frames = len(things), tracks[0].shape[0]
    axis = (np.arange(size, dtype=np.float32) + 0.5) / cell
    canvas = np.broadcast_to(floor(world), (count, frames, size, size, 3)).copy()
    for b in range(count):
        for n, thing in enumerate(things[b]):
            colour = np.array(COLOURS[thing.colour], np.float32)
            track = tracks[b][:, n]
            strength = np.ones(frames) if opacity is None else opacity[b][:, n]
            still = np.ptp(track, axis=0).max() == 0 and np.ptp(strength) == 0
            for f in [0] if still else range(frames):
                if strength[f] <= 0:
                    continue
                cx, cy = track[f]
                # Only the pixels of its place and a half change.
                x0, x1 = max(0, int((cx - 0.75) * cell)), min(size, int((cx + 0.75) * cell) + 1)
                y0, y1 = max(0, int((cy - 0.75) * cell)), min(size, int((cy + 0.75) * cell) + 1)
                if x0 >= x1 or y0 >= y1:
                    continue
                distance = _signed_distance(
                    thing.shape, axis[None, x0:x1] - np.float32(cx), axis[y0:y1, None] - np.float32(cy)
                )
                cover = np.float32(strength[f]) * np.clip(0.5 - distance * cell, 0, 1)[..., None]
                patch = canvas[b, :, y0:y1, x0:x1] if still else canvas[b, f, y0:y1, x0:x1]
                patch += cover * (colour - patch)
    return np.round(canvas).astype(np.uint8)


@functools.lru_cache
def floor(world: World) -> np.ndarray:
    """The empty floor, [H W 3] float32 in 0..255: a checkerboard with one tile a lattice place."""
    edges = np.arange(world.size + 1) * world.cells / world.size
    # Integral of the odd tiles up to each pixel edge; differences are each pixel's share of an odd tile.
    odd_up_to = edges // 2 + np.clip(edges % 2 - 1, 0, 1)
    odd = np.diff(odd_up_to) * world.size / world.cells
    share = odd[:, None] * (1 - odd[None]) + (1 - odd[:, None]) * odd[None]
    even, odds = np.array(FLOOR, np.float32)
    tiles = even + share[..., None] * (odds - even)
    tiles = tiles.astype(np.float32)
    tiles.flags.writeable = False  # it is shared by all callers
    return tiles


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance in cells to the outline of a thing centred at the origin, negative inside."""
    if shape == "disc":
        return np.hypot(x, y) - 0.40
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.34
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 0.56) * 0.70711
    if shape == "triangle":
        return np.maximum(np.abs(x) * 0.87 - (y - 0.30) * 0.5 - 0.365, y - 0.32)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.46) - 0.10
    if shape == "crate":
        return np.maximum(np.abs(x), np.abs(y)) - 0.42
    raise ValueError(f"unknown shape {shape!r}; shapes are {', '.join(SHAPES)}")
