#!/usr/bin/env python3
"""Runs one command as several JAX processes on this host: one per GPU, or on the CPU for tests.

  launch/multiprocess.py world-distill train --config wan22_5b --workdir runs/wan     # one process per GPU
  launch/multiprocess.py --devices 0,1 world-distill train ...                        # on these two
  launch/multiprocess.py --processes 2 --cpu world-distill train ...                  # two processes, no GPU
  launch/multiprocess.py --dry-run ...                                                # prints the commands

Each process finds its place in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and sees its own GPUs
only. Lines of output begin with the number of the process. When one process fails, the others get SIGTERM, after GRACE
seconds SIGKILL, and the launcher ends with the exit code of the one that failed first (128 + n where signal n ended
it). Ctrl-C and SIGTERM are handed on, so that training saves; a second one kills.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the commands instead of running them")
    parser.add_argument("--processes", type=int, help="how many (default: one per GPU)")
    parser.add_argument("--devices", help="GPUs to share out, comma-separated (CUDA_VISIBLE_DEVICES, or all)")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator, which is process 0 (a free one)")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds between SIGTERM and SIGKILL (120)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run")
    args = parser.parse_args(argv)
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        parser.error("which command?")
    if not args.dry_run and not shutil.which(args.command[0]):
        parser.error(f"there is no command {args.command[0]}")
    if args.cpu and not args.processes:
        parser.error("--cpu needs --processes")
    if args.cpu and args.devices:
        parser.error("--cpu uses none of --devices")
    args.devices = [] if args.cpu else gpus(args.devices)
    if not args.cpu and not args.devices:
        parser.error("no GPU found: name them with --devices, or use --cpu --processes N")
    args.processes = args.processes or len(args.devices)
    if args.processes < 1 or len(args.devices) % args.processes:
        parser.error(f"--processes {args.processes}: {len(args.devices)} GPUs cannot be shared out evenly")
    return args


def gpus(names: str | None) -> list[str]:
    """GPUs to use, as CUDA names them."""
    names = names or os.environ.get("CUDA_VISIBLE_DEVICES")
    if names:
        return names.split(",")
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(index) for index, _ in enumerate(listing.splitlines())]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def settings(args: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    """What process `index` gets beside the launcher's own environment."""
    mine = len(args.devices) // args.processes
    places = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(index),
        "CUDA_VISIBLE_DEVICES": ",".join(args.devices[index * mine : (index + 1) * mine]),
    }
    return places | ({"JAX_PLATFORMS": "cpu"} if args.cpu else {})


def copy(index: int, source: TextIO) -> None:
    """Writes the lines of a process, whole and with its number."""
    for line in source:
        sys.stdout.write(f"[{index}] {line.rstrip()}\n")
        sys.stdout.flush()


def send(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def kill(processes: Sequence[subprocess.Popen]) -> None:
    """Ends them and whatever they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)


def supervise(processes: Sequence[subprocess.Popen], signals: list[int], grace: float) -> int:
    """Waits for all, ends all once one fails or a signal comes, and returns the exit code of the first that failed.

    Args:
      processes: Each the leader of its own process group.
      signals: Those that the launcher has been sent; grows while this runs.
      grace: Seconds between SIGTERM and SIGKILL.
    """
    handed_on, code, kill_at = 0, 0, float("inf")
    while running := [process for process in processes if process.poll() is None]:
        failed = [index for index, process in enumerate(processes) if process.returncode]
        if failed and not code:
            code = processes[failed[0]].returncode
            if not handed_on:  # else they know and may be saving, which a second SIGTERM would cut short
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                sys.stderr.write(f"multiprocess.py: process {failed[0]} ended with {how}; ending the others\n")
                send(running, signal.SIGTERM)
            kill_at = min(kill_at, time.monotonic() + grace)
        if len(signals) > handed_on:
            kill_at = time.monotonic() + (grace if handed_on == 0 else 0)
            send(running, signal.SIGTERM)  # for Ctrl-C, too: it is what a job of several processes saves at
            handed_on = len(signals)
        if time.monotonic() >= kill_at:
            kill(running)
        time.sleep(0.05)
    kill(processes)  # what they left behind
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - code if code < 0 else code


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    port = args.port or free_port()
    extra = [settings(args, index, port) for index in range(args.processes)]
    if args.dry_run:
        for one in extra:
            sys.stdout.write(shlex.join(["env", *(f"{k}={v}" for k, v in one.items()), *args.command]) + "\n")
        return 0
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    processes, threads = [], []
    for index, one in enumerate(extra):
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which hands it on.
        process = subprocess.Popen(
            args.command, env=os.environ | one, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        threads.append(threading.Thread(target=copy, args=(index, process.stdout), daemon=True))
        threads[-1].start()
    code = supervise(processes, signals, args.grace)
    for thread in threads:
        thread.join()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
