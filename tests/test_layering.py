"""The order of the packages, read from the source: imports go down this list only."""

import ast
import dataclasses
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "world_distill"

# From the top to the bottom. A package imports itself and what stands below it.
ORDER = (
    "cli", "programs", "training", "evaluation", "weights", "reports", "build", "models", "judges", "data", "sandbox",
    "vlm", "devices", "storage", "config", "settings", "core", "words",
)  # fmt: skip
WORDS = {"", "structs", "interfaces", "errors", "console"}  # modules at the top level that everything may import

MOST_TOP_LEVEL = 8  # modules directly in world_distill/

# What families share; the other folders of models/ know nothing of each other.
SHARED_BY_MODELS = {
    "models", "models.attention", "models.autoencoders", "models.blocks", "models.clip_family", "models.encoders",
    "models.flash", "models.functional", "models.hashed_words", "models.int8", "models.layers", "models.lora",
    "models.parity", "models.products", "models.rope", "models.stream_attention", "models.tensor_map",
    "models.text_encoders",
}  # fmt: skip

TORCH = {"torch", "torchvision", "diffusers", "peft", "accelerate"}
# And published.py, text.py and verify.py of every family; inside functions. `verify` runs diffusers beside ours.
MAY_USE_TORCH = {"vlm.local", "vlm.picture_text", "weights.verify", "models.parity", "models.text_encoders"}

NOT_IN_CORE = {
    "flax.nnx", "os", "io", "pathlib", "shutil", "tempfile", "json", "pickle", "socket", "subprocess",
    "urllib", "http", "PIL", "av", "grain", "orbax", "array_record", "tensorboardX", "tqdm", "safetensors",
    "transformers", "openai",
}  # fmt: skip

# Only these unpack a ConfigDict.
MAY_READ_CONFIGS = {"cli", "programs", "training", "evaluation", "weights", "build", "settings", "config"}

MAX_LINES = 500


@dataclasses.dataclass(frozen=True)
class Import:
    name: str  # dotted; `from a import b` gives a.b
    line: int
    in_function: bool


def package(module: str) -> str:
    return "words" if module in WORDS else module.split(".")[0]


def under(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def read(package: pathlib.Path) -> dict[str, ast.Module]:
    """Syntax tree of every module, by its dotted name inside the package."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(), str(path))
    return trees


def imports(module: str, tree: ast.Module, is_package: bool) -> list[Import]:
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                parents = ["world_distill", *filter(None, module.split("."))]
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            found.extend(Import(f"{base}.{alias.name}", node.lineno, in_function) for alias in node.names)
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def violations(package: pathlib.Path) -> list[str]:
    """One line for each breach of the rules."""
    trees = read(package)
    packages = {name for name in trees if any(other.startswith(f"{name}.") for other in trees)} | {""}
    problems = []
    graph: dict[str, set[str]] = {}

    for module, tree in trees.items():
        where = f"world_distill.{module}".rstrip(".")

        def report(line: int, what: str, where=where) -> None:
            problems.append(f"{where}:{line}: {what}")

        if not ast.get_docstring(tree):
            report(1, "has no docstring")
        if module.split(".")[-1] == "utils":
            report(1, "is called utils, which says nothing")
        if (last := max((getattr(n, "end_lineno", 0) or 0 for n in ast.walk(tree)), default=0)) > MAX_LINES:
            report(last, f"has more than {MAX_LINES} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                report(node.lineno, "calls print")

        graph[module] = set()
        for item in imports(module, tree, module in packages):
            if item.name.split(".")[0] == "world_distill":
                target = item.name.removeprefix("world_distill").lstrip(".")
                while target and target not in trees:  # the name of a thing inside a module
                    target = target.rpartition(".")[0]
                graph[module].add(target)
                if problem := internal(module, target):
                    report(item.line, problem)
            elif problem := external(module, item):
                report(item.line, problem)
    top = [name for name in trees if "." not in name and name not in packages - {""}]
    if len(top) > MOST_TOP_LEVEL:
        problems.append(f"world_distill/ holds {len(top)} modules, more than {MOST_TOP_LEVEL}: {', '.join(top)}")
    return problems + cycles(graph)


def internal(module: str, target: str) -> str | None:
    if target in ("", module) or module in ("", "__main__"):  # the package exports names of all its parts
        return None
    mine, theirs = package(module), package(target)
    if unknown := {mine, theirs} - set(ORDER):
        return f"names {', '.join(sorted(unknown))}, which stands nowhere in the order of the packages"
    if ORDER.index(theirs) < ORDER.index(mine):
        return f"imports {target}, which stands above {mine}"
    if mine == theirs == "models" and not under(target, SHARED_BY_MODELS - {"models"}) and target != "models":
        family, other = module.split(".")[1:2], target.split(".")[1:2]
        if family and family != other:
            return f"imports {target}, another model family"
    # The sandbox is a world and an oracle among others: a config names it, and `build` makes what the config names.
    if theirs == "sandbox" and mine != "sandbox":
        return f"imports {target}: nothing but a config knows the sandbox's name"
    return None


def external(module: str, item: Import) -> str | None:
    of_a_family = module.startswith("models.") and module.split(".")[-1] in ("published", "text", "verify")
    if under(item.name, TORCH):
        if not (of_a_family or module in MAY_USE_TORCH):
            return f"imports {item.name}; torch is for converters, text encoders, verify and models in vlm"
        if not item.in_function:
            return f"imports {item.name} outside a function; the base install has no torch"
    if under(item.name, {"ml_collections"}) and package(module) not in MAY_READ_CONFIGS:
        return f"imports {item.name}; a ConfigDict is unpacked before it comes here"
    if package(module) == "core" and under(item.name, NOT_IN_CORE):
        return f"imports {item.name}; core has neither NNX nor I/O"
    return None


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves; what only comes after others can be taken away until nothing is left."""
    graph = {module: targets - {module, ""} for module, targets in graph.items() if module}
    while free := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in free:
            del graph[module]
    return [f"import cycle among {', '.join(sorted(graph))}"] if graph else []


def test_the_package_keeps_its_layers():
    assert len(read(PACKAGE)) > 5
    found = violations(PACKAGE)
    assert not found, "\n".join(["", *found])


# ---- The check itself


GOOD = {
    "__init__": "",
    "structs": "import jax",
    "interfaces": "from world_distill.structs import PyTree",
    "settings.__init__": "",
    "settings.loading": "import ml_collections",
    "core.__init__": "",
    "core.flow": "import numpy as np\nfrom flax import struct\nfrom world_distill.structs import PyTree",
    "core.losses": "from world_distill.core import flow",
    "devices.__init__": "",
    "devices.sharding": "from world_distill.structs import PyTree",
    "models.__init__": "",
    "models.layers": "from flax import nnx",
    "models.lora": "",
    "models.wan.__init__": "from world_distill.models.wan.modeling import Wan",
    "models.wan.modeling": "from world_distill.models import layers\nfrom world_distill.models.lora import x",
    "models.wan.published": "def convert():\n    import torch",
    "models.wan.text": "def encode():\n    import torch\n    from world_distill.models import hashed_words",
    "models.hashed_words": "",
    "data.__init__": "",
    "data.encode": "",
    "judges.__init__": "",
    "judges.rubric": "",
    "judges.local": "from world_distill.judges.rubric import questions",
    "weights.__init__": "",
    "models.wan.verify": "def load():\n    import diffusers",
    "weights.verify": "def compare():\n    import diffusers",
    "programs.__init__": "",
    "programs.train": "import ml_collections\nfrom world_distill.devices import sharding",
    "cli.__init__": "",
    "cli.train": "from world_distill import __version__\nfrom world_distill.programs.train import run",
}


def write(folder: pathlib.Path, modules: dict[str, str]) -> pathlib.Path:
    package = folder / "world_distill"
    for name, source in modules.items():
        path = package / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Docs."""\n{source}\n')
    return package


def test_good_tree_passes(tmp_path):
    assert violations(write(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    "module, source, message",
    [
        ("structs", "from world_distill.core import flow", "structs:2: imports core.flow, which stands above words"),
        ("structs", "import world_distill.programs.train", "imports programs.train, which stands above words"),
        ("core.flow", "from world_distill.models.layers import x", "imports models.layers, which stands above core"),
        ("core.flow", "from ..models import layers", "imports models.layers, which stands above"),
        ("core.__init__", "from ..models import layers", "imports models.layers, which stands above"),
        ("core.flow", "def f():\n    from world_distill.programs import train", "core.flow:3: imports programs.train"),
        ("core.flow", "from flax import nnx", "imports flax.nnx; core has neither"),
        ("core.flow", "import pathlib", "imports pathlib; core has neither"),
        ("core.flow", "from world_distill import sandbox", "imports sandbox, which stands above core"),
        ("core.flow", "import ml_collections.config_dict", "a ConfigDict is unpacked"),
        ("devices.sharding", "import ml_collections", "a ConfigDict is unpacked"),
        ("devices.sharding", "from world_distill.models import layers", "imports models.layers, which stands above"),
        ("data.encode", "from world_distill.judges import local", "imports judges.local, which stands above data"),
        ("models.layers", "from world_distill.models import wan", "imports models.wan, another model family"),
        ("models.ltx2", "from world_distill.models.wan import modeling", "imports models.wan.modeling, another"),
        ("models.wan.modeling", "def f():\n    import torch", "torch is for converters"),
        ("models.wan.published", "import torch", "imports torch outside a function"),
        ("models.wan.text", "import torch", "imports torch outside a function"),
        ("data.encode", "def f():\n    import torch", "torch is for converters"),
        ("programs.train", "def f():\n    from diffusers.models import x", "torch is for converters"),
        ("programs.train", "from world_distill.sandbox import world", "nothing but a config knows the sandbox"),
        ("programs.train", "import world_distill.cli.train", "imports cli.train, which stands above programs"),
        ("programs.train", "print('x')", "programs.train:2: calls print"),
        ("programs.train", "x = 1\n" * 600, "has more than 500 lines"),
        ("attic.train", "from world_distill.core import flow", "names attic, which stands nowhere"),
        ("models.utils", "", "is called utils"),
    ],
)
def test_each_breach_is_found(tmp_path, module, source, message):
    extra = {"sandbox.__init__": "", "sandbox.world": ""}
    found = violations(write(tmp_path, GOOD | extra | {module: source}))
    others = [line for line in found if message not in line]
    assert len(found) - len(others) == 1, found
    assert all("import cycle" in line for line in others), found  # going up may also go round


def test_module_without_a_docstring_is_found(tmp_path):
    package = write(tmp_path, GOOD)
    (package / "programs/train.py").write_text("import jax\n")
    assert violations(package) == ["world_distill.programs.train:1: has no docstring"]


def test_a_crowd_at_the_top_level_is_found(tmp_path):
    assert "more than 8" in "".join(violations(write(tmp_path, GOOD | {f"word{i}": "" for i in range(9)})))


def test_modules_that_import_each_other_are_found(tmp_path):
    extra = {"core.losses": "from world_distill.core import flow", "core.flow": "from world_distill.core import losses"}
    assert violations(write(tmp_path, GOOD | extra)) == ["import cycle among core.flow, core.losses"]
