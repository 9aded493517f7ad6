"""TPU slices by queued resources: the commands, and what they do on a worker, with a stand-in for gcloud."""

import shlex
import shutil
import subprocess
import time

import pytest

from tests.launch.launchers import AWKWARD, SETTINGS, call, dry, flag

# `describe` says the next of the states, `ssh` runs its command here, in another home.
GCLOUD = """#!/usr/bin/env bash
echo "$4" >> "$FAKE/calls"
for word in "$@"; do
  if [[ $word == --command=* ]]; then HOME=$FAKE/home exec bash -c "${word#--command=}"; fi
done
if [[ $4 == describe ]]; then
  head -n 1 "$FAKE/states"
  tail -n +2 "$FAKE/states" > "$FAKE/rest" && mv "$FAKE/rest" "$FAKE/states"
fi
"""


@pytest.fixture
def worker(tmp_path):
    """Calls tpu.sh with a worker that is this machine; the states of the request are in the file `states`."""
    if not (shutil.which("setsid") and shutil.which("pkill")):
        pytest.skip("a worker is a Linux machine")
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "home/world_distill").mkdir(parents=True)
    settings = SETTINGS | {"FAKE": str(tmp_path), "GRACE": "1", "POLL": "0"}
    return lambda *words: call("tpu.sh", *words, env=settings, path=str(tmp_path))


def eventually(path, text):
    for _ in range(100):
        if path.exists() and text in path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in {path}")


@pytest.mark.parametrize(
    "kind, runtime",
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-64", "v2-alpha-tpuv6e")],
)
def test_runtime_fits_the_generation(kind, runtime):
    (command,) = dry("tpu.sh", "create", TYPE=kind)
    assert (flag(command, "runtime-version"), flag(command, "accelerator-type")) == (runtime, kind)
    (command,) = dry("tpu.sh", "create", TYPE=kind, RUNTIME="own")
    assert flag(command, "runtime-version") == "own"


def test_an_unknown_generation_wants_a_runtime_before_anything_is_deleted():
    for words in (["create"], ["resume", "x"]):
        done = call("tpu.sh", "--dry-run", *words, env=SETTINGS | {"TYPE": "v99-8"})
        assert done.returncode == 2 and "RUNTIME" in done.stderr and not done.stdout


def test_several_slices_are_nodes_of_one_request():
    (one,), (two,) = dry("tpu.sh", "create"), dry("tpu.sh", "create", SLICES="2")
    assert flag(one, "node-id") == "run-1"
    assert (flag(two, "node-count"), flag(two, "node-prefix")) == ("2", "run-1")


def test_commands_go_to_all_workers_and_logs_come_from_one():
    (run,), (logs,) = dry("tpu.sh", "run", "x"), dry("tpu.sh", "logs", SLICE="1", WORKER="3")
    assert (flag(run, "node"), flag(run, "worker")) == ("all", "all")
    assert (flag(logs, "node"), flag(logs, "worker")) == ("1", "3")


def test_what_is_installed_is_the_last_commit_with_the_extras():
    archive, copied, install = dry("tpu.sh", "install", EXTRAS="tpu")
    assert archive[0] == "git" and archive[-1] == "HEAD" and flag(archive, "output") in copied
    assert "'.[tpu]'" in flag(install, "command")


def test_resume_deletes_creates_waits_installs_and_runs():
    verbs = [command[4] if command[0] == "gcloud" else command[0] for command in dry("tpu.sh", "resume", *AWKWARD)]
    assert verbs == ["delete", "create", "describe", "git", "scp", "ssh", "ssh"]


def test_a_worker_gets_the_words_as_they_were_and_logs_them_with_the_exit_code(worker, tmp_path):
    done = worker("run", "bash", "-c", 'printf "<%s>" "$@"; exit 3', *AWKWARD)
    assert done.returncode == 0, done.stderr
    log = eventually(tmp_path / "home/world_distill.log", "exit code 3")
    assert "".join(f"<{word}>" for word in AWKWARD[1:]) in log, shlex.join(AWKWARD)


def test_stop_lets_the_command_save_and_only_one_runs_at_a_time(worker, tmp_path):
    log = tmp_path / "home/world_distill.log"
    worker("run", "bash", "-c", 'trap "echo saved; exit 75" TERM; echo started; while :; do sleep .1; done')
    eventually(log, "started")
    second = worker("run", "echo", "again")
    assert second.returncode == 1 and "stop it first" in second.stderr
    assert worker("stop").returncode == 0
    assert "saved\nended with exit code 75" in eventually(log, "exit code")
    assert worker("stop").returncode == 0  # nothing runs
    assert worker("run", "echo", "again").returncode == 0
    assert "started" in eventually(log, "again")  # the log goes on


def test_workers_say_what_runs_and_how_it_ended(worker, tmp_path):
    assert worker("workers").stdout.endswith(": not running: \n")
    worker("run", "bash", "-c", "echo started; until [ -e go ]; do sleep .05; done; exit 3")
    eventually(tmp_path / "home/world_distill.log", "started")
    assert worker("workers").stdout.endswith(": running: started\n")
    (tmp_path / "home/world_distill/go").touch()
    eventually(tmp_path / "home/world_distill.log", "exit code")
    for _ in range(100):  # the last line is there just before the end
        if "not running" in (said := worker("workers").stdout):
            break
    assert said.endswith(": not running: ended with exit code 3\n")


def test_stop_kills_what_does_not_end(worker, tmp_path):
    worker("run", "bash", "-c", 'trap "" TERM; echo $$; echo started; while :; do sleep .1; done')
    number = eventually(tmp_path / "home/world_distill.log", "started").split()[0]
    worker("stop")
    states = subprocess.run(["ps", "-o", "stat=", "-p", number], capture_output=True, text=True).stdout
    assert states.strip()[:1] in ("", "Z")  # gone, or about to be


def test_waiting_ends_when_active_and_fails_when_it_cannot_be(worker, tmp_path):
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    assert worker("wait").returncode == 0
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nFAILED\n")
    done = worker("wait")
    assert done.returncode == 2 and "FAILED" in done.stderr


def test_resume_leaves_a_running_slice_alone(worker, tmp_path):
    (tmp_path / "states").write_text("ACTIVE\n")
    done = worker("resume", "echo")
    assert done.returncode == 2 and "ACTIVE" in done.stderr
    assert (tmp_path / "calls").read_text().split() == ["describe"]
