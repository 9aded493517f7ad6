"""Writes goldens/tiny.npz: velocities of the small video model by the plain re-implementation, in float64.

    python -m tests.models.make_goldens

The numbers are committed, so that a change which goes into the model and into its re-implementation is seen too.
"""

import pathlib
import sys

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # for `from small import redraw`, as pytest finds it

from tests.models import plain_tiny  # noqa: E402
from tests.models.tiny_inputs import CONFIG, base_weights, inputs, random_lora  # noqa: E402

PATH = pathlib.Path(__file__).parent / "goldens" / "tiny.npz"
SCALE = 0.5  # of LoRA's product


def velocities() -> dict[str, np.ndarray]:
    """Of the base (`v`) and of an Executor (`v_lora`), [b f h w c] at `tiny_inputs.inputs()`."""
    x_t, t, condition = (np.asarray(x) if hasattr(x, "shape") else x for x in inputs())
    told = np.asarray(condition.text["text"].states), np.asarray(condition.text["text"].mask)
    noisy = np.concatenate([condition.scene["video"], x_t[:, 1:]], axis=1)  # the scene's frame is clean
    times = np.stack([np.zeros(len(t)), *[t] * (CONFIG.grid[0] - 1)], axis=1)
    found = {}
    for name, lora in (("v", None), ("v_lora", random_lora())):
        clean = plain_tiny.predict_clean(base_weights(), CONFIG, noisy, times, *told, lora, SCALE)
        found[name] = (np.float64(x_t) - clean) / np.float64(t)[:, None, None, None, None]
        found[name][:, 0] = 0.0  # and never moves
    return found


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **{name: v.astype(np.float32) for name, v in velocities().items()})
