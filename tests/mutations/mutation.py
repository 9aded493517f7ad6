"""Small wrong versions of the code, as the files NAME.toml beside this one list them.

    [[mutation]]
    name = "cache-key-without-question"
    breaks = "Every question about a clip gets the answer to the first."       one line: the harm that is done
    file = "world_distill/judges/memory/cache.py"
    old = 'parts = [clip_digest, question.encode(), judge_name.encode()]'      exactly once in the file
    new = 'parts = [clip_digest, judge_name.encode()]'
    tests = ["tests/judges/memory/test_cache.py::test_key_depends_on_everything_that_was_judged"]

`tests` have to fail when `old` is replaced by `new`: as few and as fast ones as possible, by pytest's node ids.
"""

import ast
import dataclasses
import pathlib
import tomllib

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    area: str  # name of the TOML file

    def apply(self, root: pathlib.Path) -> None:
        """Changes the file under `root`. Raises ValueError if the old text is not there exactly once."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name} is stale: its old text is {text.count(self.old)} times in {self.file}")
        path.write_text(text.replace(self.old, self.new))


def load(folder: pathlib.Path = FOLDER) -> list[Mutation]:
    """All mutations, area by area."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutation"]:
            found.append(Mutation(**entry | {"tests": tuple(entry["tests"])}, area=path.stem))
    return found


def problem(mutation: Mutation, root: pathlib.Path = ROOT) -> str | None:
    """Why a mutation cannot be applied to the tree at `root`, or tests nothing; None if it can."""
    path = root / mutation.file
    if not path.is_file():
        return f"there is no {mutation.file}"
    text = path.read_text()
    if (times := text.count(mutation.old)) != 1:
        return f"its old text is {times} times in {mutation.file}"
    if mutation.new == mutation.old:
        return "its new text is the old one"
    try:
        ast.parse(text.replace(mutation.old, mutation.new))
    except SyntaxError as error:
        return f"{mutation.file} is no Python any more: {error}"
    missing = [test for test in mutation.tests if not _exists(test, root)]
    if missing or not mutation.tests:
        return f"there is no test {', '.join(missing) or 'named'}"
    return None


def _exists(test: str, root: pathlib.Path) -> bool:
    file, _, name = test.partition("::")
    path = root / file
    if not path.is_file():
        return False
    functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return name.partition("[")[0] in functions
