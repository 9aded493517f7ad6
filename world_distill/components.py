"""From a config to the parts that it names: model family, base weights, mesh, annotator, judge, benchmark.

A part that is not in this package is named by its import path, `factory = "package.module:function"`, with its keyword
arguments in `options`. An option `"@world"` stands for the config's section `world`.
"""

import contextlib
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from world_distill import converted, hosts, models
from world_distill.checkpoints import load_weights
from world_distill.compiles import keep_programs
from world_distill.config import UserError
from world_distill.core import flow, sampling
from world_distill.interfaces import ModelFamily
from world_distill.sharding import make_mesh, tree_shardings
from world_distill.structs import PyTree


def make(config: ConfigDict, section: str) -> Any:
    """Calls the factory of a section that has `factory` and `options`.

    Raises:
      UserError: the factory cannot be imported, or does not take the options.
    """
    try:
        return make_partial(config, section)()
    except TypeError as error:
        raise UserError(f"config.{section}.options do not fit {config[section].factory}: {error}") from error


def make_partial(config: ConfigDict, section: str) -> Callable[..., Any]:
    """The factory of a section, with its options filled in; it takes more arguments when called.

    Raises:
      UserError: the factory cannot be imported.
    """
    path = config[section].factory
    if not path:
        raise UserError(f"config.{section}.factory names nothing: set it to package.module:function (README.md)")
    module, _, name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"config.{section}.factory = {path!r} cannot be imported: {error}") from error
    options = {}
    for key, value in config[section].options.items():
        if isinstance(value, str) and value.startswith("@"):
            value = config[value[1:]]
        options[key] = value.to_dict() if isinstance(value, ConfigDict) else value
    return functools.partial(factory, **options)


FAMILY_SECTIONS = ("model", "executor")  # of a config: all that a family is made from


def make_family(config: ConfigDict, mesh: jax.sharding.Mesh | None = None) -> ModelFamily:
    """The model family, with the config's sizes and LoRA settings; for programs on the mesh, if there is one.

    The same one for the same settings, so that what was traced of it is traced once.

    Raises:
      UserError: the section `model` does not fit the family.
      ValueError: sizes that do not go together, or no such family.
    """
    return _make_family(FrozenConfigDict({name: config[name] for name in FAMILY_SECTIONS}), mesh)


@functools.lru_cache(maxsize=32)
def _make_family(config: FrozenConfigDict, mesh: jax.sharding.Mesh | None) -> ModelFamily:
    sizes = {k: v for k, v in config.model.to_dict().items() if k != "family"}
    executor = config.executor
    scale = executor.alpha / executor.rank if executor.rank else 1.0
    try:
        family = models.build(config.model.family, **sizes, lora_targets=executor.targets, lora_scale=scale)
    except TypeError as error:
        raise UserError(f"config.model does not fit family {config.model.family!r}: {error}") from error
    return family if mesh is None else family.on(mesh)


def start_devices(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of the config's devices; to be called before anything else touches JAX.

    On a CPU, XLA runs the small operations of a small model on one thread a device, so the cores are used by splitting
    the batch over `config.host_devices` CPU devices. Their number is part of the config and not of the machine: sums
    over the batch are grouped by device, and a run should be the same everywhere. In a job of several processes each
    has its part of them. On accelerators compiled programs are kept on disk (`compiles.keep_programs`).

    Raises:
      UserError: the processes of the job do not find together, or cannot share out the CPU devices.
    """
    count = hosts.start()
    own = max(config.host_devices // count, 1)
    if jax.config.jax_num_cpu_devices < own and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Too late if JAX is in use already (a notebook): then take the devices that there are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", own)
    devices = jax.devices()
    keep_programs(devices[0].platform)
    if devices[0].platform == "cpu" and config.host_devices % jax.process_count():
        raise UserError(
            f"config.host_devices = {config.host_devices} does not divide by {jax.process_count()} processes"
        )
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[: config.host_devices]
    return make_mesh(**config.mesh.to_dict(), devices=devices)


RANDOM = "random"


@functools.lru_cache(maxsize=32)
def abstract_base(family: ModelFamily, mesh: jax.sharding.Mesh) -> PyTree:
    """Shapes and shardings of the base on a mesh."""
    shapes = jax.eval_shape(family.init_base, jax.random.key(0))
    places = tree_shardings(mesh, family.base_axes(), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def base_path(family: ModelFamily, name: str) -> str | pathlib.Path | None:
    """Where the weights are that `config.base` names (see `load_base`); None where none do and none ship."""
    return family.shipped_bases.get(name) or name or family.default_base


def load_base(
    family: ModelFamily, config: ConfigDict, mesh: jax.sharding.Mesh, *, parts: Sequence[str] | None = None
) -> PyTree:
    """The frozen base, placed on the mesh: the one copy that serves Demonstrator and Executor.

    `config.base` is a checkpoint of `world-distill convert`, a weight file of `world-distill pretrain`, "random" for
    untrained weights, the name of weights that ship with the family, or empty for the newest of them. With `parts`,
    only these of the base's outermost keys.

    Raises:
      UserError: no weights are named and none ship with the family, or they do not fit the config's sizes.
    """
    if parts is not None and not parts:
        return {}
    path = base_path(family, config.base)
    if not path:
        raise UserError(f"config.base names no weights, and none ship with model family {family.name}")

    def chosen(tree):
        return tree if parts is None else {part: tree[part] for part in parts}

    expected = abstract_base(family, mesh)
    shardings = chosen(jax.tree.map(lambda x: x.sharding, expected))
    if path == RANDOM:
        return jax.jit(lambda key: chosen(family.init_base(key)), out_shardings=shardings)(jax.random.key(0))
    if pathlib.Path(path).is_dir():
        return _load_converted(pathlib.Path(path), family, expected, shardings)
    weights, _ = load_weights(path)
    _check_weights(path, {name: x.shape for name, x in converted.by_name(weights).items()}, expected)
    return jax.device_put(chosen(weights), shardings)


def _load_converted(path: pathlib.Path, family: ModelFamily, expected: PyTree, shardings: PyTree) -> PyTree:
    """The arrays that have a sharding, read straight into it."""
    shapes, metadata = converted.describe(path)
    if metadata.get("family") != family.name:
        raise UserError(
            f"{path} holds a model of family {metadata.get('family')}, config.model.family is {family.name}"
        )
    _check_weights(path, shapes, expected)
    wanted = {
        part: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), expected[part], places)
        for part, places in shardings.items()
    }
    return converted.load(path, wanted)


def _check_weights(path: str | pathlib.Path, shapes: Mapping[str, tuple[int, ...]], expected: PyTree) -> None:
    problems = differences(shapes, {name: x.shape for name, x in converted.by_name(expected).items()})
    if problems:
        raise UserError(f"the weights in {path} do not fit config.model:\n  " + "\n  ".join(problems))


def load_codec(family: ModelFamily, config: ConfigDict) -> PyTree:
    """The parts of the base that decode clips and encode scenes; nothing is read where the codec has no weights."""
    if not family.codec_parts:
        return {}
    return load_base(family, config, start_devices(config), parts=family.codec_parts)


def differences(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line an array that is missing, unexpected or of another shape."""
    lines = [f"missing {name} {want[name]}" for name in sorted(want.keys() - have.keys())]
    lines += [f"unexpected {name} {have[name]}" for name in sorted(have.keys() - want.keys())]
    both = sorted(n for n in have.keys() & want.keys() if have[n] != want[n])
    return lines + [f"{name} is {have[name]}, not {want[name]}" for name in both]


def sampler_grid(config: ConfigDict) -> tuple[np.ndarray, np.ndarray | None]:
    """The sampler's times [k + 1], and its diffusion coefficients [k] where it is stochastic."""
    settings = config.sampler
    grid = flow.sampling_times(settings.steps, settings.shift, settings.explicit or None)
    if settings.eta == 0:
        return grid, None
    return grid, sampling.flow_grpo_diffusion(grid, settings.eta, tuple(settings.window) or None)
