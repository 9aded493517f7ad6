"""What an installed package would hold, and that the README's commands and the verbs are real."""

import argparse
import ast
import importlib
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from world_distill import cli
from world_distill.cli import command

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP_LEVEL = {"world_distill", "configs", "launch", "tests", "colab", ".ci", ".github"}


@pytest.fixture(scope="module")
def metadata():
    """The keyword arguments that setup.py hands to setuptools."""
    setuptools = pytest.importorskip("setuptools")  # of the extra `test`
    taken = {}
    real, setuptools.setup = setuptools.setup, lambda **keywords: taken.update(keywords)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            source = (ROOT / "setup.py").read_text()
            exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    finally:
        setuptools.setup = real
    return taken


def files(pattern):
    return {p.relative_to(ROOT / "world_distill").as_posix() for p in (ROOT / "world_distill").glob(pattern)}


def test_every_folder_of_code_is_packaged(metadata):
    folders = {p.parent for p in (ROOT / "world_distill").rglob("*.py")}
    names = {".".join(p.relative_to(ROOT).parts) for p in folders}
    assert set(metadata["packages"]) == names | {"world_distill.configs"}
    assert metadata["package_dir"] == {"world_distill.configs": "configs"}
    assert (ROOT / "configs/__init__.py").is_file()


def test_every_data_file_is_packaged(metadata):
    listed = set().union(*(files(pattern) for pattern in metadata["package_data"]["world_distill"]))
    assert "py.typed" in listed
    found = {f for f in files("**/*") if (ROOT / "world_distill" / f).is_file()}
    assert {f for f in found if not f.endswith((".py", ".pyc"))} <= listed


def test_package_data_exists_where_its_folder_does(metadata):
    for pattern in metadata["package_data"]["world_distill"]:
        if (ROOT / "world_distill" / pattern).parent.is_dir():
            assert files(pattern), pattern


def test_base_install_is_without_torch_and_has_what_is_imported(metadata):
    def names(requirements):
        return {re.match(r"[\w-]+", r)[0].lower().replace("-", "_") for r in requirements}

    required, extras = names(metadata["install_requires"]), metadata["extras_require"]
    assert not required & {"torch", "diffusers", "peft", "accelerate", "torchvision"}
    assert set(extras) == {"tpu", "cuda12", "cuda13", "vlm", "data", "torch", "colab", "completion", "types", "test"}
    modules = {"PIL": "pillow", "orbax": "orbax_checkpoint", "absl": "absl_py", "tensorboardX": "tensorboardx"}
    for path in (ROOT / "world_distill").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # what is imported inside functions may be an extra's
            tops = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            tops += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in tops} - set(sys.stdlib_module_names):
                assert top == "world_distill" or modules.get(top, top) in required, (
                    f"{path} imports {top}, which setup.py lacks"
                )


def test_command_line_is_installed(metadata):
    (script,) = metadata["entry_points"]["console_scripts"]
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "world-distill" and getattr(importlib.import_module(module), function) is cli.main


def test_license_is_apache(metadata):
    assert metadata["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", command.VERBS)
def test_verb_has_its_help_flags_and_program(name):
    help_text, add_arguments, run = command.members(name)
    assert len(help_text.strip().splitlines()) > 1 and f"world-distill {name}" in help_text, "HELP has an example"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert callable(run)
    assert all(action.help for action in parser._actions), "every flag says what it does"


def test_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    for mark, end in (("setup", "world-distill quickstart"), ("test", "pytest")):
        (command,) = re.findall(rf"<!-- {mark} -->\n```\w*\n(.+)\n```\n", readme)
        assert command.startswith("python3 -m venv") and command.endswith(end)


def test_no_other_folder_at_the_top():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = {path.split("/")[0] for path in git.stdout.splitlines() if "/" in path}
    present = {p.name for p in ROOT.iterdir() if p.is_dir() and p.suffix != ".egg-info" and p.name[0] not in "._"}
    assert (tracked or present) <= TOP_LEVEL


def test_shape_types_are_checked_in_tests():
    from world_distill.core import flow

    x = jnp.zeros((2, 3, 4, 4, 5))
    with pytest.raises(jaxtyping.TypeCheckError):
        flow.interpolate(x, x, jnp.ones(3))
