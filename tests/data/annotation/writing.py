"""An annotator that counts its questions, and pictures to ask it about."""

import numpy as np
from PIL import Image

from world_distill.data.annotation.annotate import annotate_images
from world_distill.interfaces import TaskPair


class Writer:
    """An annotator that answers by the mean of the image, and counts the questions."""

    name = "writer-1"

    def __init__(self, pairs=None, stop_after=None):
        self.asked, self.pairs, self.stop_after = [], pairs, stop_after

    def annotate(self, image, *, max_pairs, seed):
        if len(self.asked) == self.stop_after:
            raise ConnectionError("the server is gone")
        self.asked.append((image.shape, seed))
        if self.pairs is not None:
            return self.pairs
        n = int(image.mean())
        return [
            TaskPair(f"[Fox {n}]: Do {k}.", f"Fox {n} does {k} ({seed}) ü.", f"fox {n}", "k") for k in range(max_pairs)
        ]


def image_file(folder, name, value=10, size=(20, 24), **options):
    path = folder / name
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path, **options)
    return path


def run(images, annotator, folder, **changes):
    return annotate_images(images, annotator, folder, **dict(name="set", max_pairs=2, seed=3) | changes)


def five_images(folder):
    """Paths of five pictures, each of one grey."""
    (folder / "images").mkdir()
    return [image_file(folder / "images", f"{i}.png", value=10 * i) for i in range(1, 6)]
