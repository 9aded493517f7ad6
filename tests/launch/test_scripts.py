"""What holds for every script of launch/: syntax, help, missing settings, dry runs."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch.launchers import AWKWARD, LAUNCH, SETTINGS, call, dry, flag

CALLS = [
    ("tpu.sh", "create"), ("tpu.sh", "status"), ("tpu.sh", "wait"), ("tpu.sh", "install"), ("tpu.sh", "logs"),
    ("tpu.sh", "workers"), ("tpu.sh", "stop"), ("tpu.sh", "delete"), ("tpu.sh", "run", *AWKWARD),
    ("tpu.sh", "resume", *AWKWARD),
    ("gke_xpk.sh", "cluster"), ("gke_xpk.sh", "image"), ("gke_xpk.sh", "create", *AWKWARD), ("gke_xpk.sh", "list"),
    ("gke_xpk.sh", "logs"), ("gke_xpk.sh", "delete"), ("gke_xpk.sh", "cluster-delete"), ("slurm.sh", *AWKWARD),
]  # fmt: skip
each_call = pytest.mark.parametrize("words", CALLS, ids=lambda words: "-".join(words[:2]))
NEEDED = {"tpu.sh": {"NAME", "PROJECT", "ZONE"}, "gke_xpk.sh": {"PROJECT", "ZONE", "CLUSTER"}, "slurm.sh": {"GPUS"}}
ALL = {
    "TYPE": "v6e-16", "SLICES": "2", "SPOT": "1", "NETWORK": "n", "SUBNETWORK": "s", "SERVICE_ACCOUNT": "a@b.c",
    "LABELS": "team=x,run=y", "INTERNAL": "1",
}  # fmt: skip
RESERVED = {"TYPE": "v5litepod-8", "RESERVED": "1"}


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_bash_reads_the_script_and_a_failing_command_ends_it(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert script == "lib.sh" or re.search(r"^set -eu?o pipefail", (LAUNCH / script).read_text(), re.M)


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (extra `test`)")
    done = subprocess.run(["shellcheck", "-x", *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@each_call
def test_a_dry_run_prints_commands_and_runs_none(words, tmp_path):
    for name in ("gcloud", "xpk", "kubectl", "docker", "sbatch", "git", "mkdir"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} was called\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    done = call(words[0], "--dry-run", *words[1:], path=str(tmp_path))
    assert done.returncode == 0 and not done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    known = {"gcloud", "xpk", "kubectl", "docker", "sbatch", "git", "mkdir"}
    assert commands and {command[0] for command in commands} <= known


@each_call
def test_a_setting_that_is_missing_is_named(words):
    needed = {"IMAGE"} if words[:2] == ("gke_xpk.sh", "image") else NEEDED[words[0]]
    for name in needed:
        done = call(*words[:1], "--dry-run", *words[1:], env={k: v for k, v in SETTINGS.items() if k != name})
        assert done.returncode == 2 and f"set {name} in the environment" in done.stderr and not done.stdout


@pytest.mark.parametrize("script", ["tpu.sh", "gke_xpk.sh", "slurm.sh"])
def test_help_names_every_setting_and_is_all_that_a_bare_call_prints(script):
    source = (LAUNCH / script).read_text()
    text = call(script, "--help", env={}).stdout
    used = set(re.findall(r"\$\{?([A-Z]+)\b", source)) - {"BASH", "TMPDIR", "HOME", "PATH"}
    assert used and all(re.search(rf"\b{name}\b", text) for name in used)
    assert call(script, env={}).stdout == text and "shellcheck" not in text


@pytest.mark.parametrize("words", [("tpu.sh", "start"), ("tpu.sh", "create", "--dry-run"), ("tpu.sh", "run")])
def test_a_wrong_call_is_refused(words):
    done = call(*words)
    assert done.returncode == 2 and words[0] in done.stderr and not done.stdout


def test_no_script_holds_a_name_of_somebody():
    literal = r"\b(us|europe|asia)-[a-z]+\d|--(project|zone|cluster)=[^\"$]"
    for path in LAUNCH.iterdir():
        assert not re.search(literal, path.read_text()), path


def test_gcloud_takes_every_command(tmp_path):
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed")
    runs = [dry(*words, **settings) for words in CALLS for settings in ({}, ALL, RESERVED) if words[0] != "slurm.sh"]
    lines = [shlex.join(command) for commands in runs for command in commands if command[0] == "gcloud"]
    wrong = "gcloud compute tpus queued-resources create x --zone=z --project=p --no-such-flag=1"
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": line} for line in [*sorted(set(lines)), wrong]]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    if "Invalid choice" in done.stderr:
        pytest.skip("this gcloud cannot check commands without running them")
    *found, last = json.loads(done.stdout)
    assert not last["success"], "it takes flags that do not exist"
    assert found and not [one for one in found if not one["success"]]


def test_xpk_takes_every_command():
    core = pytest.importorskip("xpk.parser.core", reason="xpk is not installed")
    parser = argparse.ArgumentParser()
    core.set_parser(parser)
    runs = [dry(*words, **settings) for words in CALLS for settings in ({}, ALL) if words[0] == "gke_xpk.sh"]
    commands = [command[1:] for commands in runs for command in commands if command[0] == "xpk"]
    assert len(commands) == 10
    for command in commands:
        assert parser.parse_args(command).cluster == SETTINGS["CLUSTER"]
        with pytest.raises(SystemExit):
            parser.parse_args([*command, "--no-such-flag"])


def test_the_image_holds_what_setup_needs():
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.M)
    paths = [path for line in copied for path in line.split()]
    assert {"setup.py", "README.md", "LICENSE", "configs", "world_distill"} <= set(paths)
    assert all((LAUNCH.parent / path).exists() for path in paths)


def test_gke_gets_the_command_as_one_line_for_the_shell():
    (command,) = dry("gke_xpk.sh", "create", *AWKWARD, SLICES="2")
    assert command[:3] == ["xpk", "workload", "create"]
    assert shlex.split(flag(command, "command")) == AWKWARD
    assert (flag(command, "workload"), flag(command, "num-slices"), flag(command, "tpu-type")) == (
        "run-1",
        "2",
        "v5p-16",
    )


def test_gke_cluster_says_which_capacity():
    ((*_, plain),) = dry("gke_xpk.sh", "cluster")
    ((*_, spot),) = dry("gke_xpk.sh", "cluster", SPOT="1")
    ((*_, reserved),) = dry("gke_xpk.sh", "cluster", RESERVATION="r")
    assert (plain, spot, reserved) == ("--on-demand", "--spot", "--reservation=r")


def test_slurm_runs_one_process_per_gpu_and_warns_it_before_the_limit():
    _, command = dry("slurm.sh", *AWKWARD, NODES="4", PARTITION="p")
    assert flag(command, "ntasks-per-node") == flag(command, "gpus-per-node") == "8"
    assert flag(command, "signal") == "TERM@300" and "--requeue" in command and "--partition=p" in command
    assert command[command.index(str(LAUNCH / "slurm_job.sh")) + 1 :] == AWKWARD


@pytest.mark.parametrize("code, queued", [(0, False), (3, False), (75, True), (143, True)])
def test_a_slurm_job_goes_back_into_the_queue_only_after_a_preemption(code, queued, tmp_path):
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "srun $GREETING"\nexit {code}\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "scontrol $*"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    settings = {"SETUP": "export GREETING=hello", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    done = call("slurm_job.sh", "train", env=settings, path=str(tmp_path))
    assert "srun hello" in done.stdout and ("scontrol requeue 7" in done.stdout) == queued
    assert done.returncode == (0 if queued else code)


def test_the_readme_calls_scripts_and_subcommands_that_exist():
    text = (LAUNCH / "README.md").read_text()
    calls = set(re.findall(r"launch/(\w+\.(?:sh|py))(?: ([a-z-]+))?", text))
    for script, word in calls:
        source = (LAUNCH / script).read_text()
        assert script not in ("tpu.sh", "gke_xpk.sh") or not word or re.search(rf"^#   {word} ", source, re.M), word
    assert {script for script, _ in calls} >= {"tpu.sh", "gke_xpk.sh", "slurm.sh", "multiprocess.py", "serve_judge.sh"}
