"""The frozen base: from what `config.base` names to arrays on the mesh."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from world_distill.build import own_devices
from world_distill.devices.sharding import tree_shardings
from world_distill.errors import UserError
from world_distill.interfaces import ModelFamily
from world_distill.models.int8 import Int8Kernel, quantise, quantised, quantised_axes
from world_distill.storage import array_store
from world_distill.storage.weight_files import load_weights
from world_distill.structs import PyTree

RANDOM = "random"
_SHOWN = 12  # arrays that a message names


@functools.lru_cache(maxsize=32)
def abstract_base(family: ModelFamily, mesh: jax.sharding.Mesh, *, int8: bool = True) -> PyTree:
    """Shapes and shardings of the base on a mesh; without `int8` before any of its kernels is turned into int8."""
    shapes, axes = jax.eval_shape(family.init_base, jax.random.key(0)), family.base_axes()
    if int8:
        shapes = jax.eval_shape(functools.partial(quantised, paths=family.int8_kernels()), shapes)
        axes = quantised_axes(axes, shapes)
    return jax.tree.map(_abstract, shapes, tree_shardings(mesh, axes, shapes))


def _abstract(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def abstract_executor(family: ModelFamily, mesh: jax.sharding.Mesh, rank: int) -> PyTree:
    """Shapes and shardings of an Executor's weights on a mesh: LoRA factors, or full differences for rank 0."""
    base = abstract_base(family, mesh)
    shapes = jax.eval_shape(lambda: family.init_lora(jax.random.key(0), base, rank=rank or None))
    places = tree_shardings(mesh, family.lora_axes(shapes), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def base_path(family: ModelFamily, name: str) -> str | pathlib.Path | None:
    """Where the weights are that `config.base` names (see `load_base`); None where it names none."""
    return family.shipped_bases.get(name) or name or None


def origin(base: str) -> dict[str, Any]:
    """The metadata of the checkpoint that `config.base` names (`source`, `revision`, `license`); {} of another base."""
    return array_store.describe(base)[1] if base and pathlib.Path(base).is_dir() else {}


def load_base(
    family: ModelFamily,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    parts: Sequence[str] | None = None,
    int8: bool = True,
) -> PyTree:
    """The frozen base, placed on the mesh: the one copy that serves Demonstrator and Executor.

    `config.base` is a checkpoint of `world-distill convert`, a weight file of `world-distill pretrain`, "random" for
    untrained weights, or the name of weights that ship with the family. With `parts`, only these of the base's
    outermost keys. Without `int8`, kernels that the family keeps as int8 come as they are stored.

    Raises:
      UserError: no weights are named, or they do not fit the config's sizes.
    """
    if parts is not None and not parts:
        return {}
    path = base_path(family, config.base)
    if not path:
        ships = ", ".join(family.shipped_bases)
        raise UserError(
            "config.base names no weights: --config.base=FOLDER takes a checkpoint of `world-distill convert`"
            + (f", and with model family {family.name} ship {ships}" if ships else "")
        )

    def chosen(tree):
        return tree if parts is None else {part: tree[part] for part in parts}

    kernels = set(family.int8_kernels()) if int8 else set()
    placed = chosen(abstract_base(family, mesh, int8=int8))
    if path == RANDOM:
        shardings = jax.tree.map(lambda x: x.sharding, placed)
        return jax.jit(lambda key: chosen(quantised(family.init_base(key), kernels)), out_shardings=shardings)(
            jax.random.key(0)
        )
    read = _reader(path, family, mesh)
    arrays = read([name for name in array_store.by_name(placed) if name not in kernels])
    for name, kernel in array_store.by_name(placed).items():
        if name in kernels:  # one at a time: the dense kernels together may not fit
            arrays[name] = jax.block_until_ready(_quantiser(kernel)(read([name])[name]))
    return unflatten_dict(arrays, sep=".")


@functools.lru_cache(maxsize=32)
def _quantiser(kernel: Int8Kernel) -> Callable[[jax.Array], Int8Kernel]:
    """A program that turns dense kernels into int8 ones like this abstract one."""
    shardings = jax.tree.map(lambda x: x.sharding, kernel)
    return jax.jit(lambda dense: quantise(dense.astype(kernel.dtype)), out_shardings=shardings)


def _reader(
    path: str | pathlib.Path, family: ModelFamily, mesh: jax.sharding.Mesh
) -> Callable[[Sequence[str]], dict[str, Any]]:
    """A function that places arrays of the base on the mesh, by their dotted paths; each call reads them anew.

    Raises:
      UserError: the weights at `path` are not the family's.
    """
    if not pathlib.Path(path).exists():
        raise UserError(
            f"config.base: {path} is not there; `world-distill convert` makes a checkpoint of published weights"
        )
    expected = abstract_base(family, mesh, int8=False)
    wanted = array_store.by_name(expected)
    if pathlib.Path(path).is_dir():
        shapes, metadata = array_store.describe(path)
        _check_family(path, metadata, family)
        _check_weights(path, _read_by(family, shapes), expected)
        _check_settings(path, metadata, family)
        _check_beside(pathlib.Path(path), metadata, family)

        def read(names):
            tree = unflatten_dict({name: wanted[name] for name in names}, sep=".")
            return array_store.by_name(array_store.load(path, tree))

        return read
    weights = array_store.by_name(load_weights(path)[0])
    _check_weights(path, {name: x.shape for name, x in weights.items()}, expected)
    return lambda names: {name: jax.device_put(weights[name], wanted[name].sharding) for name in names}


def open_base(family: ModelFamily, config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[[str], jax.Array]:
    """A function that gives an array of the base by its dotted path, as it is stored; see `load_base`.

    From a checkpoint of `world-distill convert`, each array is read when it is asked for, and kept nowhere.
    """
    path = base_path(family, config.base)
    if not path or path == RANDOM or not pathlib.Path(path).is_dir():
        return array_store.by_name(load_base(family, config, mesh, int8=False)).__getitem__
    read = _reader(path, family, mesh)
    return lambda name: read([name])[name]


def _check_family(path: str | pathlib.Path, metadata: Mapping[str, Any], family: ModelFamily) -> None:
    if metadata.get("family") != family.name:
        raise UserError(
            f"{path} holds a model of family {metadata.get('family')}, config.model.family is {family.name}"
        )


def _read_by(family: ModelFamily, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The arrays of a checkpoint without those that the family leaves unread."""
    unread = family.published.unread if family.published is not None else ""
    return {name: shape for name, shape in shapes.items() if not re.fullmatch(unread, name)}


def _check_settings(path: str | pathlib.Path, metadata: Mapping[str, Any], family: ModelFamily) -> None:
    if family.published is None or "model" not in metadata:
        return
    # What shapes do not show: with other heads or another eps, the same weights are another network.
    have, want = (array_store.by_name(json.loads(json.dumps(x))) for x in (metadata["model"], family.published.sizes))
    if other := [f"config.model.{key} = {want[key]}, not {have[key]}" for key in have if have[key] != want.get(key)]:
        raise UserError(f"the weights in {path} are of a model with other settings:\n  " + "\n  ".join(other))


def _check_beside(path: pathlib.Path, metadata: Mapping[str, Any], family: ModelFamily) -> None:
    """Raises UserError where texts would be encoded as for the model before a LoRA was merged into it."""
    for part, file in metadata.get("beside", {}).items():
        if family.encoders.name and getattr(family, part, None) == "":
            raise UserError(
                f"a LoRA that changes the {part} is merged into {path}: add --config.model.{part}={path.parent / file},"
                " or texts are encoded as for the model before the merge"
            )


def _check_weights(path: str | pathlib.Path, shapes: Mapping[str, tuple[int, ...]], expected: PyTree) -> None:
    wanted = {name: x.shape for name, x in array_store.by_name(expected).items()}
    problems = differences(shapes, wanted)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise UserError(
            f"the weights in {path} do not fit config.model: {len(problems)} of {len(wanted)} arrays differ\n  "
            + "\n  ".join(problems[:_SHOWN] + more)
        )


def load_codec(family: ModelFamily, config: ConfigDict) -> PyTree:
    """The parts of the base that decode clips and encode scenes, on this process's devices.

    Nothing is read where the codec has no weights.
    """
    parts = tuple(dict.fromkeys((*family.codec.parts, *family.encoders.parts)))
    if not parts:
        return {}
    return load_base(family, config, own_devices(config), parts=parts)


def differences(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line an array that is missing, unexpected or of another shape."""
    lines = [f"missing {name} {want[name]}" for name in sorted(want.keys() - have.keys())]
    lines += [f"unexpected {name} {have[name]}" for name in sorted(have.keys() - want.keys())]
    both = sorted(n for n in have.keys() & want.keys() if have[n] != want[n])
    return lines + [f"{name} is {have[name]}, not {want[name]}" for name in both]
