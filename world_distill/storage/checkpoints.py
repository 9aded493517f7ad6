"""Checkpoints of a run, from which it continues.

A checkpoint has four items: the Executor (arrays by path), the rest of the train state, the state of the data iterator
(JSON text), and metadata (JSON: config, fingerprint, versions). Evaluation, generation and export read the Executor
alone. Earlier versions kept its arrays among the train state's; their checkpoints are read, too.

Orbax writes into a temporary folder and renames it when all is there, so a run that is killed leaves no half checkpoint
under a step's name. `Checkpointer` checks that again, that every array has the bits that were saved (by check sums in
the metadata), and that the run which reads is the run that wrote.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from world_distill.errors import UserError
from world_distill.storage.check_sum import check_sum
from world_distill.structs import PyTree

# Leaves of the state below this path are the item "executor": what is evaluated, exported and generated with.
EXECUTOR = "lora_ema"
T = TypeVar("T")
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "world-distill")


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
            "executor": ocp.StandardCheckpointHandler(),
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
        apart = {"executor_apart": True} if "executor" in _by_item(arrays) else {}
        saved = dict(metadata) | {"step": step, "keys": keys} | apart | sums
        saved["sum"] = _text_sum(saved)
        items = ocp.args.Composite(
            **{name: ocp.args.StandardSave(part) for name, part in _by_item(arrays).items()},
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
        self,
        abstract_state: PyTree,
        *,
        expect: Mapping[str, Any] | None = None,
        translate: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> tuple[PyTree, bytes, dict[str, Any]] | None:
        """The newest undamaged checkpoint as (state, iterator_state, metadata), or None in an empty folder.

        One that is not whole, cannot be read or holds other bits than were saved is passed over with a warning, and
        put aside (`torn-STEP-…`) at the first `save`.

        Args:
          abstract_state: the state's structure: `ShapeDtypeStruct`s (or arrays) with the shardings to restore to, which
            need not be those of saving. Without a sharding, the default device of a single process.
          expect: this run's `make_metadata`, to be sure that the checkpoint is of the same run.
          translate: from a saved config, which an earlier version may have written, to today's keys and values.

        Raises:
          CheckpointError: another config (every differing key is listed), another structure, shape or dtype (every path
            is listed), or there are checkpoints, but none that is undamaged.
        """
        wanted = _abstract_arrays(abstract_state)

        def read(step: int, metadata: dict[str, Any], where: str):
            if expect is not None:
                _check_same_run(metadata, expect, translate, where)
            _check_same_arrays(self._saved_arrays(step), wanted, where)
            arrays, iterator, problem = self._read(step, wanted, metadata)
            if problem:
                return None, problem
            return (_unflatten(abstract_state, arrays, metadata["keys"], where), iterator, metadata), None

        return self._newest(read)

    def restore_executor(self, abstract_executor: PyTree) -> tuple[PyTree, int] | None:
        """The newest undamaged checkpoint's (Executor, step), or None in an empty folder. Reads nothing else.

        Args:
          abstract_executor: its structure, as in `restore_latest`.

        Raises:
          CheckpointError: another structure, shape or dtype, or there are checkpoints, but none that is undamaged.
        """
        wanted = _abstract_arrays({EXECUTOR: abstract_executor})

        def read(step: int, metadata: dict[str, Any], where: str):
            saved = {path: x for path, x in self._saved_arrays(step).items() if path.startswith(f"{EXECUTOR}/")}
            _check_same_arrays(saved, wanted, where)
            arrays, problem = {}, None
            try:
                arrays = self._read_executor(step, wanted)
            except Exception as error:  # the file system, TensorStore and Orbax each have their own
                problem = _first_line(error)
            if _anywhere(problem is not None):
                return None, problem or "another process cannot read it"
            if differ := _differing(arrays, metadata):
                return None, f"{', '.join(differ)} differ from what was saved"
            return (_unflatten({EXECUTOR: abstract_executor}, arrays, {}, where)[EXECUTOR], step), None

        return self._newest(read)

    def _newest(self, read: Callable[[int, dict[str, Any], str], tuple[T | None, str | None]]) -> T | None:
        """The result of `read` for the newest step that is whole, and that `read` finds nothing wrong with.

        `read` gets a step, its metadata and its folder's name, and gives its result and what is wrong, or None.
        """
        self.wait()
        self._manager.reload()
        steps, damage = self._manager.all_steps(), {}
        for step in sorted(steps, reverse=True):
            if not self._is_whole(step):
                damage[step] = "not whole"
            else:
                found, problem = read(step, self._json(step, "metadata"), f"{self.directory / str(step)}")
                if not problem:
                    return found
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
            for item, part in _by_item(wanted, apart=self._has_executor(step)).items():
                folder, args = self.directory / str(step) / item, ocp.args.StandardRestore(part)
                arrays |= ocp.StandardCheckpointHandler().restore(folder, args=args)
            iterator = self._json(step, "iterator")["state"].encode()
        except Exception as error:  # the file system, TensorStore and Orbax each have their own
            problem = _first_line(error)
        if _anywhere(problem is not None):
            return {}, b"", problem or "another process cannot read it"
        # TensorStore notices a file that is cut off, but not a block of zeros in one, as a crash may leave it.
        differ = _differing(arrays, metadata)
        if metadata.get("iterator_sum", zlib.crc32(iterator)) != zlib.crc32(iterator):
            differ.append("the data iterator")
        return arrays, iterator, f"{', '.join(differ)} differ from what was saved" if differ else None

    def _read_executor(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        folder = self.directory / str(step)
        if self._has_executor(step):
            return ocp.StandardCheckpointHandler().restore(folder / "executor", args=ocp.args.StandardRestore(wanted))
        # Among the state's arrays, of an earlier version.
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)

    def _has_executor(self, step: int) -> bool:
        return (self.directory / str(step) / "executor").exists()

    def _saved_arrays(self, step: int) -> dict[str, Any]:
        """Shapes and types of a step's arrays, by path."""
        found = dict(self._manager.item_metadata(step).items())
        trees = (found[item] for item in ("state", "executor") if found.get(item) is not None)
        return {path: leaf for tree in trees for path, leaf in dict(getattr(tree, "tree", tree)).items()}

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
                and self._has_executor(step) == metadata.get("executor_apart", False)
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
        multihost_utils.sync_global_devices(f"world_distill.storage.checkpoints.{name}")


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


def _differing(arrays: Mapping[str, jax.Array], metadata: Mapping[str, Any]) -> list[str]:
    """Paths of the arrays that are not what was saved, by their check sums."""
    sums = metadata.get("sums", {})
    return [path for path, value in _sums(arrays).items() if sums.get(path, value) != value]


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


def _by_item(arrays: Mapping[str, Any], *, apart: bool = True) -> dict[str, dict[str, Any]]:
    """Arrays by the item of a checkpoint that keeps them; all in one, if the Executor's do not lie apart."""
    executor = {path: x for path, x in arrays.items() if apart and path.startswith(f"{EXECUTOR}/")}
    rest = {path: x for path, x in arrays.items() if path not in executor}
    return {"state": rest} | ({"executor": executor} if executor else {})


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


def _check_same_run(
    saved: Mapping[str, Any],
    expect: Mapping[str, Any],
    translate: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    where: str,
) -> None:
    if saved["fingerprint"] == expect["fingerprint"]:
        return
    configs = translate(saved["config"]), expect["config"]
    old, new = ({p: json.dumps(v) for p, v in _dotted(config).items()} for config in configs)
    lines = [
        f"  {key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if not lines:  # the same settings, in the words of an earlier version
        return
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
