"""The doctor: every finding in words with what to do, whatever is broken."""

import json
import pathlib

import pytest

from world_distill import cli
from world_distill.programs import doctor

OLD = {"jax": "0.10.2", "jaxlib": "0.9.0"}
COLAB = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2"}
BOTH = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2"}


def found(check, *args, **kwargs):
    return [(f.state, f.says, f.remedy) for f in check(*args, **kwargs)]


@pytest.mark.parametrize(
    ("versions", "says", "remedy"),
    [
        ({}, "jax missing", "pip install -e ."),
        (OLD, "jax 0.10.2 beside jaxlib 0.9.0", "pip install -U jax==0.10.2 jaxlib==0.10.2"),
        (COLAB, "jax-cuda12-plugin 0.7.2 is of another JAX than 0.10.2", "'jax[cuda12]==0.10.2'"),
        (BOTH, "plugins for cuda12 and cuda13 are there together", "pip uninstall -y jax-cuda12-plugin"),
        ({"jax": "0.4.30", "jaxlib": "0.4.30"}, "older than 0.10", "pip install -U"),
    ],
)
def test_versions_of_jax_that_do_not_go_together_are_a_problem(versions, says, remedy):
    problems = [f for f in doctor.jax_versions(versions.get) if f.state == doctor.PROBLEM]
    assert any(says in f.says and remedy in f.remedy for f in problems), problems


def test_versions_that_go_together_are_none():
    fine = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
    assert {f.state for f in doctor.jax_versions(fine.get)} == {doctor.OK}


def test_an_accelerator_that_is_not_used_or_does_not_start_is_a_problem(monkeypatch):
    on = lambda platform, count=1: json.dumps({"platform": platform, "kind": "X", "count": count, "bytes": 2**34})  # noqa: E731
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_has_tpu", lambda: False)
    assert found(doctor.accelerators, lambda: (0, on("gpu", 8), ""))[0][:2] == ("ok", "8 x X (gpu), 16 GiB each")
    assert "enough for the sandbox" in found(doctor.accelerators, lambda: (0, on("cpu"), ""))[0][1]
    [held] = found(doctor.accelerators, lambda: (1, "", "Traceback\nRuntimeError: TPU is in use"))
    assert held[0] == "problem" and "RuntimeError: TPU is in use" in held[1] and "JAX_PLATFORMS=cpu" in held[2]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    [unused] = found(doctor.accelerators, lambda: (0, "a warning\n" + on("cpu"), ""))
    assert unused == ("problem", "the machine has an NVIDIA GPU, and JAX uses the CPU", "pip install -e '.[cuda12]'")


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    def refuses(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuses)
    here, cache = found(doctor.disk, tmp_path, tmp_path / "not" / "there")
    assert here[0] == "problem" and "cannot be written: Permission denied" in here[1]
    assert cache[2] == "set HF_HOME to a folder of yours"


def test_half_of_a_jobs_variables_is_a_problem():
    [job] = found(doctor.variables, {"JAX_NUM_PROCESSES": "2"})
    assert job[0] == "problem" and "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID" in job[1]
    assert found(doctor.variables, {}) == []


def test_a_hub_that_does_not_answer_is_a_note(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    [(state, says, remedy)] = found(doctor.hub, "http://127.0.0.1:9", seconds=2.0)
    assert state == "note" and "does not answer" in says and "HTTPS_PROXY" in remedy


def test_it_never_raises_and_names_what_it_could_not_check(monkeypatch, capsys, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("nothing works")

    for name in ("_version", "_ask_jax", "_hub_cache"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", broken)
    code = cli.main(["doctor", "--offline", "--json", str(tmp_path / "found.json")])
    out = capsys.readouterr().out
    assert code in (0, 1) and out.count("could not be checked (RuntimeError: nothing works)") == 5
    assert len(json.loads((tmp_path / "found.json").read_text())["findings"]) >= 7


def test_a_problem_is_an_exit_code_and_a_finding_has_its_remedy_below(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda **_: [doctor.Finding("problem", "disk", "full", "make room")])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"problem  {'disk':<18}full", f"{'':27}-> make room", "1 problem"
    ]  # fmt: skip


def test_the_extras_are_those_that_setup_installs():
    text = (pathlib.Path(__file__).parents[2] / "setup.py").read_text()
    assert all(f'"{name}": [' in text for name in doctor.EXTRAS)
    assert all(f'"{module.replace("_", "-")}>=' in text for modules, _ in doctor.EXTRAS.values() for module in modules)
