"""The layers of the package, read from the source: imports go down only.

L0 words      structs  interfaces  config  old_configs
L1 maths      core/
L2 parts      models/  judges/  data/  (both on vlm/)  sandbox/  sharding  checkpoints  converted  hosts  optim
              video_io
L3 programs   every other module
"""

import ast
import dataclasses
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "world_distill"

WORDS = {"", "structs", "interfaces", "config", "old_configs"}
PARTS = {
    "vlm",
    "models",
    "judges",
    "data",
    "sandbox",
    "sharding",
    "hosts",
    "checkpoints",
    "converted",
    "optim",
    "video_io",
}

# What families share; the other folders of models/ know nothing of each other.
SHARED_BY_MODELS = {
    "models", "models.attention", "models.functional", "models.layers", "models.lora", "models.params", "models.words",
}  # fmt: skip

# Pairs of parts of which the second lies below the first.
MAY_LIE_ON = {("judges", "vlm"), ("data", "vlm"), ("models", "sharding")}

TORCH = {"torch", "torchvision", "diffusers", "peft", "accelerate"}
# And every models/**/params.py and models/**/text.py; inside functions. `verify` runs diffusers beside our networks.
MAY_USE_TORCH = {"vlm.local", "verify"}

NOT_IN_CORE = {
    "flax.nnx", "os", "io", "pathlib", "shutil", "tempfile", "json", "pickle", "socket", "subprocess",
    "urllib", "http", "PIL", "av", "grain", "orbax", "array_record", "tensorboardX", "tqdm", "safetensors",
    "transformers", "openai",
}  # fmt: skip

# The sandbox is a world and an oracle among others: the maths and the programs do not know its name, but
# build it from what a config says. A program that is about the sandbox itself is listed here.
MAY_NAME_SANDBOX: set[str] = set()

MAX_LINES = 550


@dataclasses.dataclass(frozen=True)
class Import:
    name: str  # dotted; `from a import b` gives a.b
    line: int
    in_function: bool


def layer(module: str) -> int:
    top = module.split(".")[0]
    return 0 if top in WORDS else 1 if top == "core" else 2 if top in PARTS else 3


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
    return problems + cycles(graph)


def internal(module: str, target: str) -> str | None:
    if target in ("", module):
        return None  # the version
    mine, theirs = layer(module), layer(target)
    top, other = module.split(".")[0], target.split(".")[0]
    if theirs > mine:
        return f"imports {target}, which lies above it (L{mine} -> L{theirs})"
    if mine == theirs == 2 and top != other and (top, other) not in MAY_LIE_ON:
        return f"imports {target}, a sibling"
    if top == other == "models" and not under(target, SHARED_BY_MODELS - {"models"}) and target != "models":
        family, theirs_family = module.split(".")[1:2], target.split(".")[1:2]
        if family and family != theirs_family:
            return f"imports {target}, another model family"
    if other == "sandbox" and mine in (1, 3) and module not in MAY_NAME_SANDBOX:
        return f"imports {target}: programs do not know the sandbox's name"
    return None


def external(module: str, item: Import) -> str | None:
    of_a_family = module.startswith("models.") and module.split(".")[-1] in ("params", "text")
    if under(item.name, TORCH):
        if not (of_a_family or module in MAY_USE_TORCH):
            return f"imports {item.name}; torch is for converters, text encoders, verify and vlm.local"
        if not item.in_function:
            return f"imports {item.name} outside a function; the base install has no torch"
    if under(item.name, {"ml_collections"}) and layer(module) != 3 and module != "config":
        return f"imports {item.name}; a ConfigDict is unpacked before it comes here"
    if layer(module) == 1 and under(item.name, NOT_IN_CORE):
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
    "config": "import ml_collections",
    "core.__init__": "",
    "core.flow": "import numpy as np\nfrom flax import struct\nfrom world_distill.structs import PyTree",
    "core.losses": "from world_distill.core import flow",
    "models.__init__": "",
    "models.layers": "from flax import nnx",
    "models.lora": "",
    "models.wan.__init__": "from world_distill.models.wan.modeling import Wan",
    "models.wan.modeling": "from world_distill.models import layers\nfrom world_distill.models.lora import x",
    "models.wan.params": "def convert():\n    import torch",
    "data.__init__": "",
    "models.wan.text": "def encode():\n    import torch\n    from world_distill.models import words",
    "models.words": "",
    "data.encode": "",
    "judges.__init__": "",
    "judges.rubric": "",
    "judges.local": "from world_distill.judges.rubric import questions",
    "verify": "def compare():\n    import diffusers",
    "sharding": "from world_distill.structs import PyTree",
    "train": "import ml_collections\nfrom world_distill import sharding\nfrom world_distill.core.losses import x",
    "cli": "from world_distill import __version__\nfrom world_distill.train import run",
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
        ("structs", "from world_distill.core import flow", "structs:2: imports core.flow, which lies above"),
        ("structs", "import world_distill.train", "lies above it (L0 -> L3)"),
        ("core.flow", "from world_distill.models.layers import x", "L1 -> L2"),
        ("core.flow", "from ..models import layers", "imports models.layers, which lies above"),
        ("core.__init__", "from ..models import layers", "imports models.layers, which lies above"),
        ("core.flow", "def f():\n    from world_distill import train", "core.flow:3: imports train"),
        ("core.flow", "from flax import nnx", "imports flax.nnx; core has neither"),
        ("core.flow", "import pathlib", "imports pathlib; core has neither"),
        ("core.flow", "from world_distill import sandbox", "L1 -> L2"),
        ("core.flow", "import ml_collections.config_dict", "a ConfigDict is unpacked"),
        ("sharding", "import ml_collections", "a ConfigDict is unpacked"),
        ("sharding", "from world_distill.models import layers", "imports models.layers, a sibling"),
        ("judges.local", "from world_distill.data import encode", "imports data.encode, a sibling"),
        ("models.layers", "from world_distill.models import wan", "imports models.wan, another model family"),
        ("models.ltx2", "from world_distill.models.wan import modeling", "imports models.wan.modeling, another"),
        ("models.wan.modeling", "def f():\n    import torch", "torch is for converters"),
        ("models.wan.params", "import torch", "imports torch outside a function"),
        ("models.wan.text", "import torch", "imports torch outside a function"),
        ("data.encode", "def f():\n    import torch", "torch is for converters"),
        ("train", "def f():\n    from diffusers.models import x", "torch is for converters"),
        ("train", "from world_distill.sandbox import world", "do not know the sandbox's name"),
        ("train", "import world_distill.cli", "import cycle among cli, train"),
        ("train", "print('x')", "train:2: calls print"),
        ("train", "x = 1\n" * 600, "has more than 550 lines"),
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
    (package / "train.py").write_text("import jax\n")
    assert violations(package) == ["world_distill.train:1: has no docstring"]
