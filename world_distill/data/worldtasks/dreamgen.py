"""The folders of DreamGen Bench: a folder a split, a picture a case, its instruction in its name and beside it.

A picture is `INDEX_instruction.png` or `.jpg`. The text beside it bears the same name and ends in `.txt`. Most
instructions end with a full stop, which some names lost, so `NAME..txt` and a name without the stop count as well.
Where there is no text, the name tells the instruction.
"""

import re
from collections.abc import Sequence

from world_distill.data.images import kinds
from world_distill.data.images.files import File
from world_distill.data.images.rows import Row
from world_distill.data.images.sources import image_file
from world_distill.data.images.unused import Unused

AGENT = "robot"  # of instructions, which name none
KINDS = {"gr1_object": "object", "gr1_behavior": "behaviour", "gr1_env": "environment"}  # of the folders' names
_NAME = re.compile(r"(\d+)_(.+)", re.DOTALL)


def dreamgen_rows(files: Sequence[File], unused: Unused, agent: str = AGENT) -> list[Row]:
    """A row a case, in the order of split and index, with task, kind, id (SPLIT-INDEX) and picture.

    `agent` is whom tasks name. Pictures of other names are counted in `unused`.

    Raises:
      OSError: a text cannot be read.
    """
    texts = {file.name: file for file in files if file.name.lower().endswith(".txt")}
    cases, ids = [], set()
    for file in (file for file in files if kinds.is_image(file.name)):
        stem = file.name.rpartition(".")[0]
        match = _NAME.fullmatch(stem.rpartition("/")[2])
        if match is None:
            unused.add(file.name, "not of the form INDEX_instruction")
            continue
        split = file.folder.rstrip("/").rpartition("/")[2] or "bench"
        cases.append((split, int(match[1]), file, _instruction(stem, texts) or match[2].replace("_", " ")))
    rows = []
    for split, index, file, instruction in sorted(cases, key=lambda case: (*case[:2], case[2].name)):
        name, again = f"{split}-{index}", 1
        while name in ids:
            again += 1
            name = f"{split}-{index}.{again}"
        ids.add(name)
        fields = {"task": instruction, "kind": KINDS.get(split, split), "id": name, "agent": agent}
        rows.append(Row(file, 1, fields, image=image_file(file)))
    return rows


def _instruction(stem: str, texts: dict[str, File]) -> str:
    """The text beside a picture; "" if there is none, or it is empty."""
    for name in (f"{stem}.txt", f"{stem}..txt", f"{stem.removesuffix('.')}.txt"):
        if name in texts:
            with texts[name].open() as file:
                return " ".join(file.read().decode("utf-8", "replace").lstrip("\ufeff").split())
    return ""
