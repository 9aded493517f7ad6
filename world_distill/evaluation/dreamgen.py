"""DreamGen Bench: does a video of a robot follow its instruction, and is it physically sound.

The judge sees the frames that upstream's evaluators show: 49 evenly over the clip, at 0.3 of their size. A shorter clip
ends with its last frame again and again. Frames are shrunk with antialiasing, upstream's without. A verdict is hard
(log-odds above 0), and the probability of yes stands beside it. The wording and the judge are ours, so rates need not
be upstream's: `ClipFolder` writes the clips for its scripts.

Upstream's scripts (NVIDIA/GR00T-Dreams, dreamgenbench) take what they are not told from a clip's path:

    the clips           all `*.mp4` below a folder, whose path is a pattern: no `[`, `*` or `?` may be in it
    the instruction     the file's name behind the first `_`, with `_` as spaces
    another rule        wherever the path holds `cogvideo` or `hunyuan`
    no rule at all      in one of the scripts, unless the path holds one of those, `wan` or `cosmos`
    their CSV           lines without quotes: no comma may be in a path, and so in the file name of an instruction
"""

import collections
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
_BREAKS = {
    **dict.fromkeys(',"\n\r', "write paths into a CSV without quotes"),
    **dict.fromkeys("[*?", "search by patterns"),
}
_UNFIT = r"[\s/,\"\[\]*?\0]"  # for the name of a folder
_LONGEST = 255  # bytes of a file's name
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
        _refuse_misread(whole)
        if wrong := [sign for sign in whole if sign in _BREAKS]:
            raise UserError(
                f"{whole}: DreamGen Bench's scripts {_BREAKS[wrong[0]]}: take a folder without {wrong[0]!r} in its path"
            )
        self._entries: dict[str, dict[str, dict[str, Any]]] = {}  # by role and record
        self._left_out: dict[str, str] = {}  # why, by record
        self._names: collections.Counter[pathlib.Path] = collections.Counter()

    def write(self, role: str, record: str, task: str, agent: str, kind: str, clip: np.ndarray) -> None:
        """Writes the clip [F H W 3] uint8 of a record; one whose file name cannot tell its instruction is left out."""
        entries = self._entries.setdefault(role, {})
        instruction = task.removeprefix(f"[{agent}]:").strip()
        split, _, index = record.rpartition("-")
        index = index.partition(".")[0]
        if not (split and index.isdecimal()):  # not of an import of DreamGen Bench
            split, index = kind, str(len(entries))
        folder = self._folder / role / f"{_PLAIN}_{re.sub(_UNFIT, '_', split)}"
        self._names[folder / index] += 1
        again = self._names[folder / index]  # two pictures may bear one number
        try:
            name = file_name(index if again == 1 else f"{index}-{again}", instruction)
            _refuse_misread(f"{folder.name}/{name}")
        except UserError as error:
            self._left_out[record] = str(error)
            return
        video_files.save_mp4(folder / name, clip, self._fps)
        entries[record] = {
            "file": f"{folder.name}/{name}", "id": record, "split": split, "index": int(index),
            "instruction": instruction, "read_back": instruction_of(name),
        }  # fmt: skip

    def finish(self, result: Mapping[str, Any], questions: Sequence[str]) -> list[pathlib.Path]:
        """Writes manifests and CSVs of an evaluation's results; returns the paths of the manifests.

        Warns of clips that were left out, and of others in the folders, which upstream's scripts would read as well.
        """
        if self._left_out:
            some = "; ".join(f"{record}: {why}" for record, why in list(self._left_out.items())[:3])
            console.warn(f"clips of {len(self._left_out)} cases are not exported: {some}")
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
            known = {entry["file"] for entry in entries.values()}
            others = [p for p in sorted(folder.rglob("*.mp4")) if p.relative_to(folder).as_posix() not in known]
            if others := [path for path in others if not path.name.startswith(".")]:
                console.warn(
                    f"{folder} holds {len(others)} clips that are not of this evaluation, such as {others[0].name}:"
                    " DreamGen Bench's scripts read them, too; delete them, or take another folder"
                )
            paths.append(folder / "manifest.json")
        return paths


def file_name(index: str, instruction: str) -> str:
    """The name of a clip's file, which tells its instruction: commas and slashes become spaces, `"` becomes `'`.

    Raises:
      UserError: it is too long for the name of a file, or is no text.
    """
    words = " ".join(re.sub(r"[,/\0]", " ", instruction.replace('"', "'")).split())
    name = f"{index}_{words.replace(' ', '_')}.mp4"
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"its instruction is no text that a file name can hold ({error})") from error
    if size > _LONGEST:
        raise UserError(f"its instruction is too long for the name of a file: {size} bytes, at most {_LONGEST}")
    return name


def instruction_of(name: str) -> str:
    """What upstream's scripts take for the instruction of a clip with this file name."""
    return pathlib.PurePath(name).stem.partition("_")[2].replace("_", " ")


def _refuse_misread(path: str) -> None:
    """Raises UserError for a path from which upstream's scripts tell the instruction by another rule."""
    if wrong := [word for word in _MISREAD if word in path.lower()]:
        raise UserError(
            f"{path}: DreamGen Bench's scripts read instructions otherwise from a path with {wrong[0]!r}: take another"
            " folder"
        )
