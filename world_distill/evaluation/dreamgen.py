"""DreamGen Bench: does a video of a robot follow its instruction, and is it physically sound.

The judge sees what upstream's evaluators show: 49 frames evenly over the clip, at 0.3 of their size. A shorter clip
ends with its last frame again and again. A verdict is hard (log-odds above 0), and the probability of yes stands beside
it. The wording and the judge are ours, so rates need not be upstream's: `ClipFolder` writes the clips for its scripts.

Upstream's scripts (NVIDIA/GR00T-Dreams, dreamgenbench) take what they are not told from a clip's path:

    the instruction     the file's name behind the first `_`, with `_` as spaces
    another rule        wherever the path holds `cogvideo` or `hunyuan`
    no rule at all      in one of the scripts, unless the path holds one of those, `wan` or `cosmos`
    their CSV           lines without quotes: no comma may be in a path, and so in the file name of an instruction
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from world_distill import console
from world_distill.data.worldtasks.dreamgen import KINDS
from world_distill.errors import UserError
from world_distill.evaluation.comparison import markdown_table
from world_distill.evaluation.scoring import NAMES
from world_distill.evaluation.vlm_benchmark import RUBRICS, VlmBenchmark
from world_distill.storage import atomic, video_files

# Rates at which instructions are followed, on the GR1 splits.
PAPER = {
    "best zero-shot model": {"object": 0.320, "behaviour": 0.319, "environment": 0.414},
    "best SFT": {"object": 0.620, "behaviour": 0.617, "environment": 0.655},
    "WMSD on LTX-2, without robot data": {"object": 0.700, "behaviour": 0.574, "environment": 0.586},
}
_MISREAD = ("cogvideo", "hunyuan")  # in a path
_PLAIN = "as_wan"  # of folders: a path that is read by the plain rule


class DreamGenBench(VlmBenchmark):
    """`VlmBenchmark` with DreamGen Bench's questions, `instruction` and `physics`, and its frames."""

    rubric: ClassVar[pathlib.Path] = RUBRICS / "dreamgen"
    order: ClassVar[tuple[str, ...]] = ("instruction", "physics")
    shows: ClassVar[tuple[int, float]] = (49, 0.3)

    def describe(self) -> dict[str, Any]:
        """As `VlmBenchmark.describe`, with the paper's rates by split."""
        return super().describe() | {"paper_splits": PAPER}


def split_table(by_kind: Sequence[Mapping[str, Any]], paper: Mapping[str, Mapping[str, float]], measure: str) -> str:
    """A measure by split, as Markdown, with the paper's rates below ours."""
    splits = list(dict.fromkeys((*KINDS.values(), *(row["group"] for row in by_kind))))
    lines = [[measure, *splits]]
    for role in dict.fromkeys(row["name"] for row in by_kind):
        cells = {row["group"]: _cell(row, measure) for row in by_kind if row["name"] == role}
        lines.append([f"{NAMES.get(role, role)}, here", *(cells.get(split, "–") for split in splits)])
    for name, rates in paper.items():
        cells = [console.percent(rates[split]) if split in rates else "–" for split in splits]
        lines.append([f"*{name}, the paper's figure*", *cells])
    return markdown_table(lines)


def _cell(row: Mapping[str, Any], measure: str) -> str:
    if row[measure] is None:
        return "–"
    return f"{console.percent_interval(row[measure], *row['ci95'][measure])} of {row['n']}"


class ClipFolder:
    """Writes clips as upstream's scripts read them: FOLDER/ROLE/as_wan_SPLIT/INDEX_instruction_with_underscores.mp4.

    Beside them, `manifest.json` says what each clip was to show, and QUESTION.csv has our verdicts in upstream's form.
    """

    def __init__(self, folder: pathlib.Path, fps: float):
        """Nothing is written yet.

        Args:
          folder: of the clips.
          fps: frames a second.

        Raises:
          UserError: upstream's scripts would misread the path, or PyAV is not installed.
        """
        video_files.require_pyav()
        self._folder, self._fps = pathlib.Path(folder), fps
        whole = str(self._folder.resolve())
        if wrong := [word for word in _MISREAD if word in whole.lower()]:
            raise UserError(
                f"{whole}: DreamGen Bench's scripts read instructions otherwise from a path with {wrong[0]!r}: take"
                " another folder"
            )
        if "," in whole:
            raise UserError(
                f"{whole}: DreamGen Bench's scripts write paths into a CSV without quotes: no comma in them"
            )
        self._entries: dict[str, dict[str, dict[str, Any]]] = {}  # by role and record

    def write(self, role: str, record: str, task: str, agent: str, kind: str, clip: np.ndarray) -> None:
        """Writes the clip [F H W 3] uint8 of a record. Raises UserError for an instruction that is too long."""
        instruction = task.removeprefix(f"[{agent}]:").strip()
        split, _, index = record.rpartition("-")
        index = index.partition(".")[0]
        if not (split and index.isdecimal()):  # not of an import of DreamGen Bench
            split, index = kind, str(len(self._entries.get(role, ())))
        name = file_name(index, instruction)
        path = self._folder / role / f"{_PLAIN}_{split.replace(' ', '_').replace('/', '_')}" / name
        video_files.save_mp4(path, clip, self._fps)
        self._entries.setdefault(role, {})[record] = {
            "file": path.relative_to(self._folder / role).as_posix(), "id": record, "split": split, "index": int(index),
            "instruction": instruction, "read_back": instruction_of(name),
        }  # fmt: skip

    def finish(self, result: Mapping[str, Any], questions: Sequence[str]) -> list[pathlib.Path]:
        """Writes manifests and CSVs of an evaluation's results; returns the paths of the manifests."""
        paths = []
        for role, entries in self._entries.items():
            folder = self._folder / role
            scores = {v["id"]: v["scores"] for v in result["verdicts"][role] if not v.get("noise")}
            rows = [entry | {"scores": scores.get(record, {})} for record, entry in entries.items()]
            atomic.write_json(folder / "manifest.json", rows)
            for question in questions:
                lines = ["video_path,prompt,prediction"]
                for row in rows:
                    score = row["scores"].get(question)
                    if score is not None and np.isfinite(score):
                        lines.append(f"{folder / row['file']},{row['read_back']},{int(score > 0.5)}")
                atomic.write_text(folder / f"{question}.csv", "\n".join(lines) + "\n")
            paths.append(folder / "manifest.json")
        return paths


def file_name(index: str, instruction: str) -> str:
    """The name of a clip's file, which tells its instruction without commas. Raises UserError for one too long."""
    words = " ".join(re.sub(r"[,/\0]", " ", instruction).split())
    name = f"{index}_{words.replace(' ', '_')}.mp4"
    if len(name.encode()) > 255:
        raise UserError(f"case {index}: its instruction is too long for the name of a file ({len(words)} characters)")
    return name


def instruction_of(name: str) -> str:
    """What upstream's scripts take for the instruction of a clip with this file name."""
    return pathlib.PurePath(name).stem.partition("_")[2].replace("_", " ")
