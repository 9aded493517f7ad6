"""Checkpoints of a run, to go on from, and weight files, to give away.

A checkpoint has three items: the train state (arrays by path), the state of the data iterator (JSON text), and metadata
(JSON: config, fingerprint, versions). Orbax writes into a temporary folder and renames it when all is there, so a run
that is killed leaves no half checkpoint under a step's name. `Checkpointer` checks that again, that every array has the
bits that were saved (by check sums in the metadata), and that the run which reads is the run that wrote.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from world_distill.config import UserError
from world_distill.core.check_sum import check_sum
from world_distill.structs import PyTree

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "world-distill")
_DTYPES = {"bool", "bfloat16", "float16", "float32", "float64"}
_DTYPES |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class CheckpointError(UserError):
    """A checkpoint cannot be written or read, or is of another run. The message names the folder and what to do."""


def make_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its run: config (plain values, may be nested), its fingerprint, and versions.

    Put into `config` what must be the same for a run to go on, and leave out what may change (logging, last step).
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    config = json.loads(json.dumps(config))  # so that it compares equal to what comes back from the disk
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return {"config": config, "fingerprint": hashlib.sha256(text.encode()).hexdigest(), "versions": versions}


class Checkpointer:
    """Saves and restores the train state of one run.

    Every process of a job makes one, and all call `save` and `restore_latest` alike. Reading processes of other jobs
    may use the folder at the same time.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = 3, save_every: int = 1, async_: bool = True):
        """Opens the folder, making it if need be.

        Args:
          directory: local path or bucket (`gs://`).
          keep: newest checkpoints that stay; None keeps all.
          save_every: steps between checkpoints.
          async_: write in the background. The state may be donated as soon as `save` returns.

        Raises:
          CheckpointError: the folder cannot be made or read.
          ValueError: `keep` or `save_every` is below 1.
        """
        if save_every < 1 or (keep is not None and keep < 1):
            raise ValueError(f"keep {keep} and save_every {save_every} are at least 1")
        path = os.fspath(directory)
        self.directory = epath.Path(path if "://" in path else os.path.abspath(path))
        self.save_every = save_every
        self._tidied = False
        self._damaged: set[int] = set()  # steps that look whole, but could not be read
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=async_,
            # Where folders are made in the background, a save that fails at once leaves threads that wait for them,
            # and the program does not end for 20 minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        # With names alone, a manager that has not saved yet cannot tell what an item holds.
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "iterator": ocp.JsonCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: no checkpoints can be kept there ({error})") from error

    def save(
        self, step: int, state: PyTree, iterator_state: bytes, metadata: Mapping[str, Any], *, force: bool = False
    ) -> bool:
        """Saves if `step` is a multiple of `save_every`, or the machine is about to be taken away, or `force`.

        Args:
          step: finished steps.
          state: pytree of arrays and typed PRNG keys.
          iterator_state: UTF-8 text, from `TaskBatches.get_state`.
          metadata: from `make_metadata`.
          force: save whatever the step.

        Returns:
          Whether a checkpoint was begun. False too where a whole one of this step is there already.

        Raises:
          CheckpointError: this or (in the background) the previous checkpoint could not be written: no space, no
            permission; it names the last good step. Or the folder has a later step, of another run.
          ValueError: an array of size 0, or two leaves with one path.
        """
        if not (force or step % self.save_every == 0 or self._manager.reached_preemption(step)):
            return False
        arrays, keys = _flatten(state)
        sums = {"sums": _sums(arrays), "iterator_sum": zlib.crc32(iterator_state)}
        saved = dict(metadata) | {"step": step, "keys": keys} | sums
        saved["sum"] = _text_sum(saved)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            iterator=ocp.args.JsonSave({"state": iterator_state.decode()}),
            metadata=ocp.args.JsonSave(saved),
        )
        try:
            self._tidy()
            newest = max(self._manager.all_steps(), default=-1)
            if step <= newest:
                if step in self._manager.all_steps():
                    return False
                # Orbax would skip it without a word, and a restart would take the newer one.
                raise CheckpointError(
                    f"{self.directory}: there is a checkpoint of step {newest} already, and this is step {step}: start"
                    " from that one, or use another folder"
                )
            return self._manager.save(step, args=items, force=True)  # whether to save was decided above
        except CheckpointError:
            raise
        except Exception as error:  # the file system, TensorStore and Orbax each have their own
            raise self._failed(f"checkpoint of step {step}", error) from error

    def latest_step(self) -> int | None:
        """The newest step whose checkpoint is whole; None without one."""
        self._manager.reload()
        for step in sorted(self._manager.all_steps(), reverse=True):
            if self._is_whole(step):
                return step
            logging.warning("%s: the checkpoint of step %d is not whole, and passed over", self.directory, step)
        return None

    def restore_latest(
        self, abstract_state: PyTree, *, expect: Mapping[str, Any] | None = None
    ) -> tuple[PyTree, bytes, dict[str, Any]] | None:
        """The newest undamaged checkpoint as (state, iterator_state, metadata), or None in an empty folder.

        One that is not whole, cannot be read or holds other bits than were saved is passed over with a warning, and
        put aside (`torn-STEP-…`) at the first `save`.

        Args:
          abstract_state: the state's structure: `ShapeDtypeStruct`s (or arrays) with the shardings to restore to, which
            need not be those of saving. Without a sharding, the default device of a single process.
          expect: this run's `make_metadata`, to be sure that the checkpoint is of the same run.

        Raises:
          CheckpointError: another config (every differing key is listed), another structure, shape or dtype (every path
            is listed), or there are checkpoints, but none that is undamaged.
        """
        self.wait()
        self._manager.reload()
        steps, wanted, damage = self._manager.all_steps(), _abstract_arrays(abstract_state), {}
        for step in sorted(steps, reverse=True):
            if not self._is_whole(step):
                damage[step] = "not whole"
            else:
                metadata, where = self._json(step, "metadata"), f"{self.directory / str(step)}"
                if expect is not None:
                    _check_same_run(metadata, expect, where)
                found = self._manager.item_metadata(step)["state"]
                _check_same_arrays(getattr(found, "tree", found), wanted, where)
                arrays, iterator, problem = self._read(step, wanted, metadata)
                if not problem:
                    return _unflatten(abstract_state, arrays, metadata["keys"], where), iterator, metadata
                damage[step] = problem
                self._damaged.add(step)
            logging.warning("%s: the checkpoint of step %d is passed over: %s", self.directory, step, damage[step])
        if steps:
            # Not the same as an empty folder: to begin anew without a word would throw a run away.
            raise CheckpointError(
                f"{self.directory}: none of steps {sorted(steps)} can be read ({damage[max(steps)]}); mend what keeps"
                " them from being read, or delete the folder to begin anew"
            )
        return None

    def _read(
        self, step: int, wanted: PyTree, metadata: Mapping[str, Any]
    ) -> tuple[dict[str, jax.Array], bytes, str | None]:
        """A step's (arrays, iterator state, what is wrong with them or None), the last the same on all processes."""
        arrays, iterator, problem = {}, b"", None
        try:
            # Not by the manager, which waits for all processes when it has read: one that fails would not come.
            folder, args = self.directory / str(step) / "state", ocp.args.StandardRestore(wanted)
            arrays = ocp.StandardCheckpointHandler().restore(folder, args=args)
            iterator = self._json(step, "iterator")["state"].encode()
        except Exception as error:  # the file system, TensorStore and Orbax each have their own
            problem = _first_line(error)
        if _anywhere(problem is not None):
            return {}, b"", problem or "another process cannot read it"
        # TensorStore notices a file that is cut off, but not a block of zeros in one, as a crash may leave it.
        sums = metadata.get("sums", {})
        differ = [path for path, value in _sums(arrays).items() if sums.get(path, value) != value]
        if metadata.get("iterator_sum", zlib.crc32(iterator)) != zlib.crc32(iterator):
            differ.append("the data iterator")
        return arrays, iterator, f"{', '.join(differ)} differ from what was saved" if differ else None

    def wait(self) -> None:
        """Waits for what is being written. Raises CheckpointError if that failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed("the last checkpoint", error) from error

    def close(self) -> None:
        """Waits, and frees the threads. Raises like `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _json(self, step: int, item: str) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def _is_whole(self, step: int) -> bool:
        """Whether all items of a step are there and can be opened (their arrays are not read)."""
        try:
            metadata = self._json(step, "metadata")
            return (
                self._manager.item_metadata(step)["state"] is not None
                and metadata["step"] == step
                and metadata.get("sum", _text_sum(metadata)) == _text_sum(metadata)
                and "state" in self._json(step, "iterator")
            )
        except Exception as error:  # whatever a torn folder makes Orbax say
            logging.info("step %d: %s", step, _first_line(error))
            return False

    def _tidy(self) -> None:
        """Before the first save, puts away what earlier runs left half-done: it would count as a checkpoint.

        Not when opening: a job that only reads must not touch what another is writing.
        """
        if self._tidied:
            return
        # All processes look, since Orbax reads in step; then one acts while the others wait.
        self._manager.reload()
        torn = [str(step) for step in self._manager.all_steps() if step in self._damaged or not self._is_whole(step)]
        _barrier("look")
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                if ".orbax-checkpoint-tmp" in path.name:
                    path.rmtree()
                elif path.name in torn:
                    logging.warning("%s is damaged, and is renamed", path)
                    path.rename(path.with_name(f"torn-{path.name}-{secrets.token_hex(4)}"))
        _barrier("tidied")
        self._manager.reload()
        self._tidied = True

    def _failed(self, what: str, error: Exception) -> CheckpointError:
        try:
            self._manager.reload()
            # Looking closer is for all processes together, and the others may not have failed.
            good = self.latest_step() if jax.process_count() == 1 else max(self._manager.all_steps(), default=None)
        except Exception:  # looking may fail as the writing did; the error at hand is the one to tell of
            good = None
        advice = "Check space and permissions, and start again from there"
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:  # of a barrier, not of the disk
            advice = "Another process of the job has failed or cannot be reached: see what it said last"
        return CheckpointError(
            f"{self.directory}: {what} could not be written ({_first_line(error)}); last good checkpoint:"
            f" {'none' if good is None else f'step {good}'}. {advice}"
        )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"world_distill.checkpoints.{name}")


def _anywhere(condition: bool) -> bool:
    """Whether it holds on any process."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).any())


def _text_sum(metadata: Mapping[str, Any]) -> int:
    """A check sum of a checkpoint's metadata, but for itself."""
    return zlib.crc32(json.dumps({k: v for k, v in metadata.items() if k != "sum"}, sort_keys=True).encode())


def _sums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A check sum of each array."""
    # One after the other: CPU devices that have many programs under way at once, each with an exchange between them,
    # may wait for each other for ever.
    return {path: int(check_sum(x)) for path, x in arrays.items()}


def _first_line(error: Exception) -> str:
    """The error in short. TensorStore says what the matter is at the end of a page: that comes first here."""
    causes = re.findall(
        "No space left on device|Disk quota exceeded|Permission denied|Read-only file system", str(error)
    )
    first = next(iter(str(error).splitlines()), "")[:300]
    return ": ".join([type(error).__name__, *causes[:1], first])


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as `opt_state/0/mu/blocks/q/a`."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have one path: a dictionary key contains '/'")
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _flatten(state: PyTree) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Arrays by path, with typed keys as their data; and the keys' implementations by path."""
    arrays = {p: x if isinstance(x, jax.Array) else jnp.asarray(x) for p, x in _leaves(state).items()}
    empty = [path for path, x in arrays.items() if x.size == 0]
    if empty:
        raise ValueError(f"arrays of size 0 cannot be saved: {', '.join(empty)}")
    keys = {path: str(jax.random.key_impl(x)) for path, x in arrays.items() if _is_key(x)}
    return arrays | {path: jax.random.key_data(arrays[path]) for path in keys}, keys


def _abstract_arrays(abstract_state: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    result = {}
    for path, leaf in _leaves(abstract_state).items():
        shape = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        sharding = getattr(leaf, "sharding", None)
        if sharding is None and jax.process_count() > 1:
            raise ValueError(f"{path}: with several processes, the state to restore needs a sharding on every leaf")
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        result[path] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    return result


def _unflatten(abstract_state: PyTree, arrays: dict[str, jax.Array], keys: dict[str, str], where: str) -> PyTree:
    leaves = []
    for path, leaf in _leaves(abstract_state).items():
        value = arrays[path]
        if _is_key(leaf) != (path in keys):
            raise CheckpointError(f"{where}: {path} is a PRNG key on one side only")
        if path in keys:
            value = jax.random.wrap_key_data(value, impl=keys[path])
            if value.dtype != leaf.dtype:
                raise CheckpointError(f"{where}: {path} is a {keys[path]} key, this run has {leaf.dtype}")
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def _check_same_run(saved: Mapping[str, Any], expect: Mapping[str, Any], where: str) -> None:
    if saved["fingerprint"] == expect["fingerprint"]:
        return
    old, new = ({p: json.dumps(v) for p, v in _dotted(m["config"]).items()} for m in (saved, expect))
    lines = [
        f"  {key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    raise CheckpointError(
        f"{where} is of a run with another config:\n" + "\n".join(lines) + "\nUse another folder, or the old values."
    )


def _dotted(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    return {p: v for k, x in config.items() for p, v in _dotted(x, f"{prefix}.{k}" if prefix else str(k)).items()}


def _check_same_arrays(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    problems = [f"{path}: not in the checkpoint" for path in sorted(wanted.keys() - saved.keys())]
    problems += [f"{path}: only in the checkpoint" for path in sorted(saved.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & saved.keys()):
        old, new = ((tuple(x.shape), np.dtype(x.dtype).name) for x in (saved[path], wanted[path]))
        if old != new:
            problems.append(f"{path}: {old[1]}{list(old[0])} in the checkpoint, {new[1]}{list(new[0])} in this run")
    if problems:
        raise CheckpointError(f"{where} does not fit this run's state:\n  " + "\n  ".join(problems))


def save_weights(path: str | os.PathLike, tree: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a nested dict of arrays as one safetensors file, or leaves what was there.

    Array `tree["a"]["b"]` becomes tensor `a.b`; `metadata` is text to text.

    Raises:
      ValueError: an empty dict, a key that is not text or has a dot, a leaf that is no array, or a dtype that the
        format does not carry. The path of the leaf is named.
      CheckpointError: the file cannot be written.
    """
    path = pathlib.Path(path)
    tensors = {".".join(keys): _to_numpy(".".join(keys), leaf) for keys, leaf in _walk(tree)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, temporary, metadata=dict(metadata))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: the weights could not be written ({_first_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """The (nested dict of numpy arrays, metadata) of a file that `save_weights` wrote.

    Raises CheckpointError if the file is missing, cut off or not in the safetensors format.
    """
    tree: dict[str, Any] = {}
    try:
        with safetensors.safe_open(path, "numpy") as file:
            for name in file.keys():
                *parents, last = name.split(".")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = file.get_tensor(name)
            return tree, file.metadata() or {}
    except (OSError, safetensors.SafetensorError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable weight file ({_first_line(error)})") from error


def _walk(tree: Mapping[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not tree:
        raise ValueError(f"the dict at {'.'.join(parents) or 'the root'!r} is empty: it would be lost in the file")
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "." in key:
            raise ValueError(f"key {key!r} under {'.'.join(parents)!r} is not a text without dots")
        if isinstance(value, Mapping):
            yield from _walk(value, (*parents, key))
        else:
            yield (*parents, key), value


def _to_numpy(name: str, leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise ValueError(f"{name} is a {type(leaf).__name__}, not an array")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"{name} lies on several hosts: gather it first")
    if leaf.dtype.name not in _DTYPES:
        raise ValueError(f"{name} has dtype {leaf.dtype}, which a weight file does not carry")
    # safetensors writes the memory as it lies, whatever the strides say: a transposed array would come back scrambled.
    return np.array(leaf, order="C")
