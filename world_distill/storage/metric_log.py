"""Where figures go while a run is under way: a JSONL file and TensorBoard event files."""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np


class MetricLog:
    """Appends one line of figures a step to `NAME.jsonl` and to `tensorboard/NAME`.

    A resumed run drops what was logged behind its checkpoint: the file reads like that of an uninterrupted run.
    """

    def __init__(self, folder: pathlib.Path, step: int, *, name: str = "metrics"):
        """Continues the log of `folder` after `step` finished steps.

        Raises:
          OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        lines = [line for line in read_log(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        self._board = _summary_writer()(str(folder / "tensorboard" / name), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs figures of a finished step. Figures that are not finite are null in the file and gaps in TensorBoard."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step} | {n: v if np.isfinite(v) else None for n, v in numbers.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            if np.isfinite(value):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _summary_writer() -> Any:
    """The class of tensorboardX, imported without torch: that takes seconds, and only its tensors would need it."""
    hides = "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hides:
            del sys.modules["torch"]
    return SummaryWriter


def read_log(path: pathlib.Path) -> list[dict]:
    """The lines of a log, without a last one that a killed process left half-written; [] if there is no file."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
