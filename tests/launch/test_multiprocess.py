"""Several processes on one host, for real, on the CPU."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.launchers import LAUNCH

GATHER = """
import os
import jax
jax.distributed.initialize(
    os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
)
import numpy as np
from jax.experimental.multihost_utils import process_allgather
print("gathered", process_allgather(np.array(10 + jax.process_index())).tolist(), "of", jax.process_count())
"""
CPU = ("--cpu", "--processes", "2")


def command(*words):
    return [sys.executable, str(LAUNCH / "multiprocess.py"), *words]


def launch(*words, **env):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES")}
    return subprocess.run(command(*words), env=kept | env, capture_output=True, text=True, timeout=120)


def dry(*words, **env):
    done = launch("--dry-run", *words, **env)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(line[0] == "env" for line in lines)
    return [(dict(w.split("=", 1) for w in line[1:5]), line[5:]) for line in lines]


def started(script, grace="60"):
    """The launcher with two processes of a shell script, each of which has said `ready`."""
    words = command("--grace", grace, *CPU, "sh", "-c", script)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert {process.stdout.readline().strip() for _ in range(2)} == {"[0] ready", "[1] ready"}
    return process


def test_two_processes_find_each_other_and_gather():
    done = launch(*CPU, sys.executable, "-c", GATHER)
    lines = [line for line in done.stdout.splitlines() if "gathered" in line]
    assert done.returncode == 0, done.stdout
    assert sorted(lines) == [f"[{index}] gathered [10, 11] of 2" for index in (0, 1)]


def test_gpus_are_shared_out_and_the_words_are_kept():
    first, second = dry("--devices", "4,5,6,7", "--processes", "2", "--port", "9", "train", "a b", "--processes", "3")
    assert first[1] == second[1] == ["train", "a b", "--processes", "3"]
    assert [one[0]["CUDA_VISIBLE_DEVICES"] for one in (first, second)] == ["4,5", "6,7"]
    assert [one[0]["JAX_PROCESS_ID"] for one in (first, second)] == ["0", "1"]
    assert first[0]["JAX_COORDINATOR_ADDRESS"] == second[0]["JAX_COORDINATOR_ADDRESS"] == "localhost:9"
    assert first[0]["JAX_NUM_PROCESSES"] == "2"
    assert len(dry("train", CUDA_VISIBLE_DEVICES="0,1,2")) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "which command"),
        (("--cpu", "true"), "--cpu needs --processes"),
        (("--devices", "0,1,2", "--processes", "2", "true"), "cannot be shared out"),
        ((*CPU, "no-such-command"), "there is no command no-such-command"),
        ((*CPU, "--devices", "0", "true"), "--cpu uses none"),
    ],
)
def test_a_wrong_call_is_refused(words, message):
    done = launch(*words)
    assert done.returncode == 2 and message in done.stderr


def test_when_one_process_fails_the_others_end_and_its_exit_code_is_returned():
    begin = time.monotonic()
    done = launch(*CPU, "sh", "-c", 'echo "from $JAX_PROCESS_ID"; [ $JAX_PROCESS_ID = 0 ] || exit 3; sleep 60')
    assert done.returncode == 3 and time.monotonic() - begin < 10
    assert sorted(done.stdout.splitlines()) == ["[0] from 0", "[1] from 1"]


def test_a_process_that_a_signal_ended_counts_as_failed():
    done = launch(*CPU, "sh", "-c", "[ $JAX_PROCESS_ID = 0 ] && kill -9 $$; sleep 60")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == "multiprocess.py: process 0 ended with SIGKILL; ending the others\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_on_so_that_the_processes_can_save(number):
    process = started('trap "echo saved; exit 75" TERM INT; echo ready; while :; do sleep 0.05; done')
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_process_that_is_still_saving_is_told_once(tmp_path):
    (tmp_path / "save.py").write_text("""
import os, signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another one ends at once
    time.sleep(0.5 * int(os.environ["JAX_PROCESS_ID"]))
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
""")
    process = started(f"exec {shlex.quote(sys.executable)} {tmp_path}/save.py")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and out == "[0] saved\n[1] saved\n"


@pytest.mark.parametrize("grace, signals", [("0.2", 1), ("60", 2)])
def test_what_does_not_end_is_killed_after_the_grace_or_by_a_second_signal(grace, signals):
    process = started('trap "" TERM; echo ready; while :; do sleep 0.05; done', grace)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL
