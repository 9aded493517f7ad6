"""All sections of a config, with their defaults.

A section is a frozen dataclass. Its fields hold the defaults, its docstring says what each key means, in which unit,
and neither is written anywhere else. `world-distill VERB --help-config` prints them. A config file starts from
`default_config()` and states what differs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from world_distill.settings.filters import Filters
from world_distill.settings.objective import Objective
from world_distill.settings.optimizer import OptimizerSettings
from world_distill.settings.parts import (
    AnnotatorSettings,
    BenchmarkSettings,
    ClipsSettings,
    HeldOutSettings,
    JudgeSettings,
    ScenesSettings,
)
from world_distill.settings.pretrain import PretrainSettings
from world_distill.settings.roles import DemonstratorSettings, ExecutorSettings, SamplerSettings
from world_distill.settings.rollout import RolloutSettings
from world_distill.settings.run import AblationSettings, MeshSettings, ReproduceSettings, RunSettings

# In the order in which they are explained; "" is the top level.
SECTIONS: dict[str, type] = {
    "": RunSettings,
    "demonstrator": DemonstratorSettings,
    "executor": ExecutorSettings,
    "sampler": SamplerSettings,
    "rollout": RolloutSettings,
    "objective": Objective,
    "optimizer": OptimizerSettings,
    "mesh": MeshSettings,
    "annotator": AnnotatorSettings,
    "filters": Filters,
    "judge": JudgeSettings,
    "held_out": HeldOutSettings,
    "benchmark": BenchmarkSettings,
    # Only in configs that have such a stage.
    "scenes": ScenesSettings,
    "clips": ClipsSettings,
    "pretrain": PretrainSettings,
    "ablation": AblationSettings,
    "reproduce": ReproduceSettings,
}
_NOT_EVERYWHERE = ("", "scenes", "clips", "pretrain", "ablation", "reproduce")
EVERYWHERE = tuple(name for name in SECTIONS if name not in _NOT_EVERYWHERE)


def default_config(*extra: str) -> ConfigDict:
    """A config with all sections that every config has, and those named in `extra`, at their defaults."""
    config = to_section(RunSettings())
    for name in (*EVERYWHERE, *extra):
        config[name] = to_section(SECTIONS[name]())
    return config


def to_section(settings: Any) -> ConfigDict:
    """A dataclass of settings as a section of a config."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return ConfigDict({key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()})


def with_newer_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings that an earlier version wrote, with the keys that it did not know, at their defaults.

    A key that is added to a section therefore has a default that changes nothing.
    """
    filled = {**dataclasses.asdict(RunSettings()), **config}
    for name, section in SECTIONS.items():
        if name and (name in config or name in EVERYWHERE):
            filled[name] = {**dataclasses.asdict(section()), **config.get(name, {})}
    return filled
