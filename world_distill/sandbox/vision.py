"""Seeing the sandbox: what things are in an image, and where each is in every frame of a clip, from pixels alone.

Every thing has a colour of its own. A pixel's difference from the floor points along the line from the floor's colour
to its thing's colour; the best-fitting line names the thing and the length along it says how much of the pixel it
covers. This survives anti-aliasing and the soft edges of generated clips.
"""

import dataclasses
import functools

import numpy as np

from world_distill.sandbox.world import AGENT_COLOURS, COLOURS, SHAPES, Scene, Thing, World, floor, render

# Share of a pixel below which a colour is taken for noise.
NOISE = 0.12


@dataclasses.dataclass(frozen=True)
class Sight:
    """Where the things of a scene are seen.

    Attributes:
      mass: [F n] covered area in pixels.
      centre: [F n 2] centre of it in cells; the last seen place where a thing is not seen.
      seen: [F n] whether at least a third of the first frame's area is there.
    """

    mass: np.ndarray
    centre: np.ndarray
    seen: np.ndarray


def coverage(world: World, frames: np.ndarray, colours: list[str]) -> np.ndarray:
    """How much of each pixel each colour covers: [... k H W] in 0..1 for frames [... H W 3] uint8."""
    base = floor(world)
    lines = np.stack([np.array(COLOURS[c], np.float32) for c in colours]) - base.mean((0, 1))  # [k 3]
    lengths = np.square(lines).sum(-1)
    dots = np.moveaxis((frames - base) @ lines.T, -1, -3)  # [... k H W]
    share = np.clip(dots / lengths[:, None, None], 0.0, 1.0)
    # |difference - share * line|^2 without the difference's own square, which is the same for every colour.
    residual = share * (share * lengths[:, None, None] - 2 * dots)
    best = residual == residual.min(axis=-3, keepdims=True)
    return np.where(best & (share > NOISE), share, np.float32(0.0))


def read_scene(world: World, image: np.ndarray) -> Scene:
    """The things in a scene image [H W 3] uint8, in drawing order.

    Raises:
      ValueError: the image has not this world's size, or shows no things.
    """
    if image.shape != (world.size, world.size, 3):
        raise ValueError(
            f"scene image has shape {image.shape}, this world's is {(world.size, world.size, 3)}: the sandbox reads the"
            " scenes that it draws; other pictures take a config that names a VLM (--config)"
        )
    colours = list(COLOURS)
    cover = coverage(world, image, colours)
    things = []
    for colour, area in zip(colours, cover, strict=True):
        if area.sum() < 0.15 * (world.size / world.cells) ** 2:
            continue
        x, y = _centre(world, area)
        place = (
            int(np.clip(np.floor(x), 0, world.cells - 1)),
            int(np.clip(np.floor(y), 0, world.cells - 1)),
        )
        shapes = SHAPES if colour in AGENT_COLOURS else ("crate",)
        fits = {s: np.square(area - _template(world, Thing(s, colour, place))).sum() for s in shapes}
        things.append(Thing(min(fits, key=fits.__getitem__), colour, place))
    if not things:
        raise ValueError("the scene image shows no things")
    order = {"ring": 0, "crate": 1}
    return Scene(tuple(sorted(things, key=lambda t: order.get(t.shape, 2))))


@functools.lru_cache(maxsize=4096)
def _template(world: World, thing: Thing) -> np.ndarray:
    """How much of each pixel the thing would cover at its place, seen by `coverage`."""
    track = np.array([[thing.place]], float) + 0.5
    image = render(world, [(thing,)], [track])[0, 0]
    return coverage(world, image, list(COLOURS))[list(COLOURS).index(thing.colour)]


def _centre(world: World, area: np.ndarray) -> np.ndarray:
    axis = (np.arange(world.size) + 0.5) * world.cells / world.size
    total = max(area.sum(), 1e-6)
    return np.array([(area.sum(0) * axis).sum(), (area.sum(1) * axis).sum()]) / total


def _box_sums(x: np.ndarray, side: int) -> np.ndarray:
    """Sums over `side` x `side` boxes around each pixel of [... H W], zero outside."""
    half = side // 2
    for axis in (-1, -2):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (half + 1, half)
        total = np.cumsum(np.pad(x, pad), axis=axis)
        high, low = [slice(None)] * x.ndim, [slice(None)] * x.ndim
        high[axis], low[axis] = slice(side, None), slice(None, -side)
        x = total[tuple(high)] - total[tuple(low)]
    return x


def _without_lines(cover: np.ndarray) -> np.ndarray:
    """[... H W] without what is thinner than two pixels; what is thicker stays, with the pixels around it."""
    kept = np.pad(cover > 0, [(0, 0)] * (cover.ndim - 2) + [(2, 2)] * 2)
    for axis in (-1, -2):
        kept = np.lib.stride_tricks.sliding_window_view(kept, 2, axis=axis).all(-1)
    for axis in (-1, -2):
        kept = np.lib.stride_tricks.sliding_window_view(kept, 4, axis=axis).any(-1)
    return np.where(kept, cover, np.float32(0.0))


def watch(world: World, scene: Scene, clip: np.ndarray) -> Sight:
    """Follows every thing of `scene` through a clip [F H W 3] uint8.

    A thing is where most of its colour is gathered; pixels of that colour that are scattered or lie in thin lines (the
    soft edge between two other things: brown upon cyan looks green) do not move it.
    """
    cover = coverage(world, clip, [t.colour for t in scene.things])  # [F n H W]
    solid = [n for n, thing in enumerate(scene.things) if thing.shape != "ring"]  # a ring is a thin line itself
    cover[:, solid] = _without_lines(cover[:, solid])
    cell = world.size / world.cells
    axis = (np.arange(world.size) + 0.5) / cell
    gathered = _box_sums(cover, int(cell) | 1)
    peak = gathered.reshape(*cover.shape[:2], -1).argmax(-1)
    near_y = np.abs(axis - axis[peak // world.size][..., None]) <= 0.9  # [F n H]
    near_x = np.abs(axis - axis[peak % world.size][..., None]) <= 0.9
    cover = cover * near_y[..., None] * near_x[..., None, :]
    mass = cover.sum((-1, -2))
    total = np.maximum(mass, 1e-6)
    centre = np.stack([cover.sum(-2) @ axis, cover.sum(-1) @ axis], axis=-1) / total[..., None]
    seen = mass > mass[:1] / 3
    centre[0] = np.array([t.place for t in scene.things]) + 0.5
    for f in range(1, len(clip)):
        centre[f] = np.where(seen[f, :, None], centre[f], centre[f - 1])
    return Sight(mass, centre, seen)
