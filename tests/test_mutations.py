"""The list of mutations fits the code, and the script that tries them tells killed ones from survivors."""

import collections
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.mutations.mutation import FOLDER, load, problem

MUTATIONS = load()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_fits_the_code_and_its_tests_exist(mutation):
    assert problem(mutation) is None


def test_names_are_unique_and_every_mutation_says_what_it_breaks():
    assert max(collections.Counter(m.name for m in MUTATIONS).values()) == 1
    assert all(m.breaks.endswith(".") and "\n" not in m.breaks for m in MUTATIONS)


def test_what_does_not_fit_is_said(tmp_path):
    one = MUTATIONS[0]
    assert "there is no" in problem(one, tmp_path)
    for change, why in (
        ({"old": "no such text"}, "0 times"), ({"new": one.old}, "the old one"), ({"new": "("}, "no Python"),
        ({"tests": ("tests/test_mutations.py::test_nothing",)}, "test_nothing"), ({"tests": ()}, "no test"),
    ):  # fmt: skip
        assert why in problem(type(one)(**vars(one) | change))


def script(*flags, folder=FOLDER):
    return subprocess.run([sys.executable, folder / "run.py", *flags], capture_output=True, text=True)


def test_the_script_lists_and_refuses_unknown_names():
    listed = script("--list", "--only", MUTATIONS[0].area)
    assert listed.returncode == 0 and MUTATIONS[0].breaks in listed.stdout
    assert "no mutation or area nonsense" in script("--only", "nonsense").stderr


CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
import pytest
from code_ import double, half

def test_double():
    assert double(3) == 6

def test_half():
    assert half(0) == 0

@pytest.mark.skip
def test_never():
    pass
"""


@pytest.fixture
def project(tmp_path):
    """A function that lists mutations of a project of two functions: no repository, with the script in it."""
    folder = tmp_path / "project/tests/mutations"
    folder.mkdir(parents=True)
    for name in ("run.py", "mutation.py", "warm.py"):
        shutil.copy(FOLDER / name, folder)
    (tmp_path / "project/code_.py").write_text(CODE)
    (tmp_path / "project/tests/test_code.py").write_text(TESTS)

    def listed(**changes):
        entries = []
        for name, (old, new, test) in changes.items():
            fields = {"name": name, "breaks": "It.", "file": "code_.py", "old": old, "new": new}
            text = "\n".join(f"{key} = {value!r}" for key, value in fields.items())
            entries.append(f"[[mutation]]\n{text}\ntests = ['tests/test_code.py::{test}']\n")
        (folder / "all.toml").write_text("\n".join(entries))
        return folder

    return listed


def test_killed_ones_are_told_from_survivors_and_results_are_kept(project, tmp_path):
    folder = project(wrong=("2 * x", "3 * x", "test_double"), unseen=("x / 2", "x / 3", "test_half"))
    subprocess.run(["git", "init", "-q"], cwd=folder.parents[1], check=True)
    kept = tmp_path / "results"
    done = script("--resume", str(kept), "--jobs", "2", folder=folder)
    assert done.returncode == 1 and "2 mutations: 1 killed, 1 SURVIVED, 0 ERROR" in done.stdout, done
    assert [line.split()[0] for line in done.stdout.splitlines() if "all/" in line][-2:] == ["killed", "SURVIVED"]
    assert (folder.parents[1] / "code_.py").read_text() == CODE  # all that happened in a copy
    again = script("--resume", str(kept), folder=folder)
    assert again.returncode == 1 and "2 of 2 are known" in again.stdout and "unchanged code" not in again.stdout
    assert script("--only", "wrong", folder=folder).returncode == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (("4 * x", "3 * x", "test_double"), "stale: all/it: its old text is 0 times in code_.py"),
        (("2 * x", "3 * x", "test_never"), "test_never is skipped"),
        (("def double", "def treble", "test_double"), "1 ERROR"),  # the test's file cannot even be imported
    ],
)
def test_mutations_that_show_nothing_are_errors(project, change, message):
    done = script(folder=project(it=change))
    assert done.returncode == 2 and message in done.stdout, done


def test_an_interrupted_call_leaves_nothing(project, tmp_path):
    command = [sys.executable, "-u", project(wrong=("2 * x", "3 * x", "test_double")) / "run.py"]
    work = tmp_path / "work"
    work.mkdir()
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(work)}, stdout=subprocess.PIPE) as process:
        assert b"tests on the unchanged code" in process.stdout.readline() and any(work.iterdir())
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143 and not any(work.iterdir())
