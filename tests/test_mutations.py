"""The list of mutations fits the code, and the script that tries them tells killed ones from survivors."""

import collections
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


def script(*flags):
    return subprocess.run([sys.executable, FOLDER / "run.py", *flags], capture_output=True, text=True)


def test_the_script_lists_and_refuses_unknown_names():
    listed = script("--list", "--only", MUTATIONS[0].area)
    assert listed.returncode == 0 and MUTATIONS[0].breaks in listed.stdout
    assert "no mutation or area nonsense" in script("--only", "nonsense").stderr
