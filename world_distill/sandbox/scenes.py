"""Scene images of the sandbox as PNG files, and the true layout that each of them carries.

The layout is stored in the PNG's text chunk `scene`. Pixels are all that annotator and judge are given; the benchmark
reads the chunk.
"""

import io
import json
import pathlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from world_distill.sandbox.tasks import deeds
from world_distill.sandbox.world import Scene, Thing, World, render, sample_scene
from world_distill.settings.explained import explained_by

STREAMS = {"train": 0, "validation": 1, "test": 2}


def draw_scenes(world: World, count: int, *, split: str, seed: int) -> list[Scene]:
    """`count` different scenes in which something can be done.

    Splits are drawn from separate random streams, and no scene of one is drawn again in another.

    Raises:
      ValueError: unknown split, or the world is too small for so many different scenes.
    """
    if split not in STREAMS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(STREAMS)}")
    scenes: dict[str, Scene] = {}
    rng = np.random.default_rng([seed, STREAMS[split]])
    for _ in range(50 * count):
        scene = sample_scene(world, rng)
        text = _to_json(scene)
        # A scene's split follows from the scene: the same layout can never be in two of them.
        if _owner(text) == split and text not in scenes and deeds(world, scene):
            scenes[text] = scene
        if len(scenes) == count:
            return list(scenes.values())
    raise ValueError(f"found only {len(scenes)} of {count} different scenes; make the world larger or ask for fewer")


def _owner(text: str) -> str:
    """Half of all layouts are for training, a quarter each for validation and test."""
    digit = sum(text.encode()) % 4
    return ("train", "train", "validation", "test")[digit]


@explained_by(world=World)
def write_scenes(folder: str, count: int, *, split: str, seed: int, world: dict | World) -> list[pathlib.Path]:
    """Draws scenes and writes them as `scene-00000.png` ... into `folder`; files that hold them already are kept.

    Args:
      folder: of the images.
      count: scenes.
      split: stream of scenes: train, validation or test.
      seed: of the stream.
      world: sizes and difficulty of the world (`World`).

    Raises:
      ValueError: as `draw_scenes`; or a file of that name holds another scene (another seed or world).
    """
    world = world if isinstance(world, World) else World(**world)
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, scene in enumerate(draw_scenes(world, count, split=split, seed=seed)):
        path = target / f"scene-{index:05d}.png"
        if path.exists():
            if true_scene(path.read_bytes()) != scene:
                raise ValueError(f"{path} holds another scene: of another seed or world? Take another folder")
        else:
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(to_png(world, scene))
            temporary.replace(path)
        paths.append(path)
    return paths


def to_png(world: World, scene: Scene) -> bytes:
    """The scene's image, with its layout in the text chunk `scene`."""
    places = np.array([[t.place for t in scene.things]], float) + 0.5
    image = render(world, [scene.things], [places])[0, 0]
    info = PngInfo()
    info.add_text("scene", _to_json(scene))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def true_scene(png: bytes) -> Scene:
    """The layout that a scene's PNG carries.

    Raises:
      ValueError: it carries none.
    """
    with Image.open(io.BytesIO(png)) as image:
        text = getattr(image, "text", {}).get("scene")
    if text is None:
        raise ValueError(
            "this PNG carries no sandbox layout (text chunk `scene`); draw scenes with `scenes`, or score other"
            " pictures with --config.benchmark.factory=world_distill.evaluation:WorldTasksBench, which asks a VLM"
        )
    return Scene(tuple(Thing(t["shape"], t["colour"], tuple(t["place"])) for t in json.loads(text)))


def _to_json(scene: Scene) -> str:
    return json.dumps([{"shape": t.shape, "colour": t.colour, "place": t.place} for t in scene.things])
