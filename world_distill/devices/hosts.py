"""Several processes that make up one job: how they start, what they agree on, and arrays of which each holds a part.

The same functions work in a single process, where they do nothing or little.
"""

import atexit
import contextlib
import glob
import hashlib
import itertools
import math
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src import distributed  # its client has no public name
from jax.experimental import multihost_utils

from world_distill import console, errors
from world_distill.errors import UserError

# What a launcher sets where the platform does not say it (launch/README.md); otherwise JAX finds out by itself.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_VM_HOSTS = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
SILENCE_SECONDS = 45  # a process that is silent for so long ends the job, with a message of ours
_HEARTBEAT_SECONDS = 60  # and for so long, with JAX's own: where process 0 has died, or Python does not get to run
_BEATS_IN_SILENCE = 9  # that others would have heard in that time
_BEATS = "world_distill/beats/"
_ENDED = "ended"  # the last beat of a process whose work is done
_gave_up = threading.Event()
LOST = 69  # exit code of a process that has lost another one (EX_UNAVAILABLE)


def start(environment: Mapping[str, str] = os.environ) -> int:
    """Joins the job's other processes, if there are any; to be called before anything else touches JAX.

    Returns:
      How many processes there are, if the launcher has said it, else 1.

    Raises:
      UserError: some of `VARIABLES` are set and others not, or they are no numbers.
    """
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if given and len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{' and '.join(given)} set, but not {missing}: a job of several processes needs all three")
    count = 1
    if given:
        address, processes, index = given.values()
        if not (processes.isdecimal() and index.isdecimal() and int(index) < int(processes)):
            raise UserError(f"JAX_PROCESS_ID = {index} of JAX_NUM_PROCESSES = {processes}: numbers from 0, below it")
        count = int(processes)
        if count > 1 and not jax.distributed.is_initialized():
            logging.info("process %s of %s", index, processes)
            jax.distributed.initialize(address, count, int(index), heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
            _watch_others()
    elif _has_peers(environment) and not jax.distributed.is_initialized():
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
        _watch_others()
    return count


def give_up() -> None:
    """Says that this process ends with its work undone: others that wait for it notice in `SILENCE_SECONDS`."""
    _gave_up.set()


def _watch_others() -> None:
    """Ends this process within `SILENCE_SECONDS` of another one's death, and says so: it would wait for that for ever.

    Every process counts up under its number in the memory that JAX's service has for all, and reads the others' counts.
    """
    state, ended = distributed.global_state, threading.Event()
    watch = threading.Thread(target=_watch, args=(state.client, state.process_id, ended), name="watch", daemon=True)
    watch.start()

    def end() -> None:
        if _gave_up.is_set():  # perhaps since another process is gone, in which case this waits for it, watching
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.distributed.shutdown()
        ended.set()
        watch.join(SILENCE_SECONDS)

    # An interpreter that ends while one of its threads is within JAX's client is aborted, whatever it did before.
    atexit.register(end)


def _watch(client, own: int, ended: threading.Event) -> None:
    counts: dict[str, str] = {}
    heard: dict[str, float] = {}
    for beat in itertools.count():
        try:
            if not _gave_up.is_set():
                client.key_value_set(f"{_BEATS}{own}", str(beat), allow_overwrite=True)
            found, answered = dict(client.key_value_dir_get(_BEATS)), True
        except jax.errors.JaxRuntimeError:  # the job is ending, or process 0 has died, to which JAX sees itself
            found, answered = counts, False
        now = time.monotonic()
        heard |= {name: now for name, count in found.items() if counts.get(name) != count or count == _ENDED}
        counts = found
        silent = [name.removeprefix(_BEATS) for name, when in heard.items() if now - when > SILENCE_SECONDS]
        silent = [name for name in silent if name != str(own)]
        if silent and answered:
            sys.stderr.write(
                f"error: process {', '.join(sorted(silent))} of this job has died or hangs (nothing heard for"
                f" {SILENCE_SECONDS} s): look at what it said last. Process {own} ends, too; the same command, on all,"
                " goes on from the newest checkpoint\n"
            )
            sys.stderr.flush()
            os._exit(LOST)  # an ordinary end would wait for the others
        if ended.wait(SILENCE_SECONDS / _BEATS_IN_SILENCE):
            break
    if not _gave_up.is_set():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_BEATS}{own}", _ENDED, allow_overwrite=True)


def _has_peers(environment: Mapping[str, str]) -> bool:
    """Whether the platform says that this is one of several processes: TPU pods, multi-slice jobs, SLURM."""
    return (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "," in environment.get("TPU_PROCESS_ADDRESSES", "")
        or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
        # Only what srun has started has a step; the script of a job has not, whatever its number of tasks.
        or ("SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS") or 1) > 1)
        or (environment.get("JAX_PLATFORMS") != "cpu" and "," in _tpu_vm_hosts())
    )


def _tpu_vm_hosts() -> str:
    """The hosts of a TPU VM's slice, with commas, as Google Cloud's metadata server says; "" anywhere else."""
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return ""
    request = urllib.request.Request(_TPU_VM_HOSTS, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def place_in_job() -> tuple[int, int]:
    """(number of this process, how many the job has), after `start` and without starting JAX's devices."""
    state = distributed.global_state
    return (state.process_id, state.num_processes) if jax.distributed.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this process does what only one should: logs, progress."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agree(what: str, text: str) -> None:
    """Raises UserError on every process if `text` is not the same on all of them."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.uint32)
    found = multihost_utils.process_allgather(digest)
    others = [i for i, row in enumerate(found) if not np.array_equal(row, found[0])]
    if others:
        raise UserError(
            f"process {', '.join(map(str, others))} has another {what} than process 0: start all with the same"
        )


def place(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, laid out over the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])


def rows_held(count: int, sharding: jax.sharding.Sharding) -> np.ndarray:
    """Numbers of the rows of an array [count ...] that this process's devices hold, rising."""
    places = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[place] for place in places if place is not None]))


def place_rows(x: np.ndarray, rows: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array [b ...] over the devices of all processes, of which each process has the rows that its devices hold.

    Args:
      x: this process's own rows [n ...].
      rows: [b] for each row of the result, its place in `x`; of rows that are not held here (`rows_held`), anything.
      sharding: of the result.
    """

    def part(index: Any) -> np.ndarray:
        return x[rows[index[0]]][(slice(None), *index[1:])]

    return jax.make_array_from_callback((len(rows), *x.shape[1:]), sharding, part)


def whole(x: jax.Array) -> np.ndarray:
    """All of an array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def own_rows(x: jax.Array, axes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the rows that this process is to look after, these rows of `x`): each row has one such process.

    Args:
      x: [b ...], or with two `axes` the turns [t r ...] of `sharding.map_turns`.
      axes: along which rows lie.

    Raises:
      ValueError: a row lies in parts on several devices.
    """
    shape = x.shape[axes:]
    of_rows = np.arange(math.prod(x.shape[:axes])).reshape(x.shape[:axes][::-1]).T
    if jax.process_count() == 1:
        return of_rows.ravel(), np.asarray(x).reshape(-1, *shape)
    numbers, parts = [], []
    for shard in x.addressable_shards:
        if shard.data.shape[axes:] != shape:
            raise ValueError(f"rows of {x.shape} lie in parts of {shard.data.shape} on the devices")
        if shard.replica_id == 0:
            numbers.append(of_rows[shard.index[:axes]].ravel())
            parts.append(np.asarray(shard.data).reshape(-1, *shape))
    if not numbers:
        return np.arange(0), np.empty((0, *shape), x.dtype)
    order = np.argsort(np.concatenate(numbers))
    return np.concatenate(numbers)[order], np.concatenate(parts)[order]


def join_rows(numbers: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """[count ...] float64 on every process, from each one's rows [n ...]; exact."""
    full = np.zeros((count, *values.shape[1:]))
    full[numbers] = values
    if jax.process_count() == 1:
        return full
    owned = np.zeros(count, np.uint32)
    owned[numbers] = 1
    # As bits: JAX would make single precision of it.
    bits = multihost_utils.process_allgather(np.ascontiguousarray(full).view(np.uint32))
    owners = np.argmax(multihost_utils.process_allgather(owned), axis=0)
    return bits[owners, np.arange(count)].view(np.float64)


console.speak_if(is_main)
errors.on_failure(give_up)
