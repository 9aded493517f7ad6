"""From a config to the parts that it names: model family, base weights, mesh, annotator, judge, benchmark.

A part that is not in this package is named by its import path, `factory = "package.module:function"`, with its keyword
arguments in `options`. An option `"@world"` stands for the config's section `world`.
"""

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from world_distill import models
from world_distill.core import flow, sampling
from world_distill.devices import hosts
from world_distill.devices.compilation import keep_programs
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.interfaces import Judge, ModelFamily
from world_distill.judges.rubric import Rubric, rubric_for
from world_distill.settings import addresses, loading


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
    factory, options = find_factory(config, section), {}
    for key, value in config[section].options.items():
        if isinstance(value, str) and value.startswith("@"):
            value = config[value[1:]]
        options[key] = value.to_dict() if isinstance(value, ConfigDict) else value
    return functools.partial(factory, **options)


def find_factory(config: ConfigDict, section: str) -> Callable[..., Any]:
    """The factory that a section names, without its options.

    Raises:
      UserError: the section names none, or it cannot be imported.
    """
    path = config[section].factory
    if not path:
        raise UserError(
            f"config.{section}.factory names nothing: set it to package.module:function (world_distill/README.md)"
        )
    return load_part(path, f"config.{section}.factory")


def load_part(address: str, key: str) -> Callable[..., Any]:
    """What an address of this or an earlier version names; `key` is where it stands.

    Raises:
      UserError: it cannot be imported.
    """
    module, _, name = addresses.current(address).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} = {address!r} cannot be imported: {error}") from error


def parameters(factory: Callable[..., Any], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that a factory takes, with their defaults; numbers as floats where it says so.

    A factory that hands on options to a judge, which its option `judge` names, takes those as well.
    """
    found, hands_on = {}, False
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            hands_on = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            default = None if parameter.default is parameter.empty else parameter.default
            found[name] = float(default) if parameter.annotation is float and default is not None else default
    judge = (options or {}).get("judge", found.get("judge"))
    if hands_on and isinstance(judge, str):
        found = parameters(load_part(judge, "judge")) | found
    return found


def load(spec: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """`loading.load_config`, where overrides may also be of options that a factory takes and the config does not name.

    Raises:
      UserError: see `loading.load_config`, or a factory cannot be imported.
    """
    config = loading.load_config(spec)
    make_room(config, overrides)
    loading.override(config, overrides)
    return config


def make_room(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Gives a config the options that overrides set and that their factories take, at the defaults of these.

    Where an override names another factory, or another judge for it, options that this one does not take are left out.
    A new option that the factory does not take gets no room, so `loading.override` refuses it.

    Raises:
      UserError: a factory cannot be imported.
    """
    for name in {key.partition(".")[0] for key in overrides}:
        section = config.get(name)
        if not isinstance(section, ConfigDict) or not {"factory", "options"} <= set(section):
            continue
        wanted = {key.removeprefix(f"{name}.options."): key for key in overrides if key.startswith(f"{name}.options.")}
        factory = overrides.get(f"{name}.factory", section.factory)
        changes = addresses.current(factory) != section.factory or "judge" in wanted
        if not factory or not (wanted or changes):
            continue
        chosen = {"judge": overrides[wanted["judge"]]} if "judge" in wanted else {}
        takes = parameters(load_part(factory, f"config.{name}.factory"), {**section.options, **chosen})
        with config.unlocked():
            if changes and takes:
                section.options = ConfigDict({key: value for key, value in section.options.items() if key in takes})
            for path in wanted:
                _room(section.options, path.split("."), takes)


def _room(options: ConfigDict, path: Sequence[str], takes: Mapping[str, Any]) -> None:
    first, *rest = path
    if first == "beside" and len(rest) == 2:  # an option of one of the judges beside the first
        for key in (first, rest[0]):
            if key not in options:
                options[key] = ConfigDict()
            options = options[key]
        first, rest = rest[1], []
    if first not in options and first in takes and not rest:
        default = takes[first]
        options[first] = ConfigDict(default) if isinstance(default, Mapping) else default


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
    more = {"lora_differences": executor.differences} if executor.differences and executor.rank else {}
    try:
        family = models.build(config.model.family, **sizes, lora_targets=executor.targets, lora_scale=scale, **more)
    except TypeError as error:
        raise UserError(f"config.model does not fit family {config.model.family!r}: {error}") from error
    return family if mesh is None else family.on(mesh)


def make_rubric(config: ConfigDict, part: str = "judge", *, judge: Judge | None = None) -> Rubric:
    """The questions that a section of the config names, about clips of its model; a learned reward's are its measures.

    Raises:
      UserError, FileNotFoundError, ValueError: see `rubric_for`.
    """
    fps = make_family(config).fps if "model" in config else 0.0  # a config of a judge alone has none
    return rubric_for(judge, config[part].rubric, fps=fps)


def text_lengths(family: ModelFamily, config: ConfigDict) -> dict[str, int]:
    """Tokens that the family's texts are padded to, by the name of their states.

    Raises:
      UserError: `config.text_length` is more than the model reads.
    """
    texts = family.encoders.texts
    for spec in texts.values():
        if spec.length is None and spec.most is not None and config.text_length > spec.most:
            raise UserError(
                f"config.text_length = {config.text_length}: family {family.name} reads at most {spec.most} tokens"
            )
    return {name: spec.length or config.text_length for name, spec in texts.items()}


def start_devices(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of the config's devices; to be called before anything else touches JAX.

    On a CPU, XLA runs the small operations of a small model on one thread a device, so the cores are used by splitting
    the batch over `config.host_devices` CPU devices. Their number is part of the config and not of the machine: sums
    over the batch are grouped by device, and a run should be the same everywhere. In a job of several processes each
    has its part of them. On accelerators compiled programs are kept on disk (`compilation.keep_programs`).

    Raises:
      UserError: the processes of the job do not find together, or cannot share out the CPU devices.
    """
    count = hosts.start()
    own = max(config.host_devices // count, 1)
    flags: Any = jax.config  # its attributes are made at run time
    if flags.jax_num_cpu_devices < own and "device_count" not in os.environ.get("XLA_FLAGS", ""):
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


def own_devices(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of `start_devices`; in a job of several processes, one of this process's devices alone.

    It is for work that each process does on its own, such as encoding its shards of a record set.
    """
    mesh = start_devices(config)
    return mesh if jax.process_count() == 1 else make_mesh(devices=jax.local_devices())


def sampler_grid(config: ConfigDict) -> tuple[np.ndarray, np.ndarray | None]:
    """The sampler's times [k + 1], and where it is stochastic its table [k] of `sampling.DIFFUSIONS`."""
    settings = config.sampler
    grid = flow.sampling_times(settings.steps, settings.shift, settings.explicit or None)
    if settings.eta == 0:
        return grid, None
    return grid, sampling.DIFFUSIONS[settings.sde](grid, settings.eta, tuple(settings.window) or None)
