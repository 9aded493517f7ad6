"""Configs that earlier versions wrote, in today's keys and units.

Early versions did not multiply AWM's loss by the temperature that divides the log-ratio (`objective.awm_temperature`),
so RL's gradient was larger than `rl_weight` said, by the inverse of that temperature. Today the gradient at ratio 1
does not depend on the temperature, whose key is `objective.awm_ratio_temperature`.
"""

import copy
from collections.abc import Mapping
from typing import Any

_OLD_KEY, _KEY = "awm_temperature", "awm_ratio_temperature"


def is_old(config: Any) -> bool:
    """Whether an earlier version wrote these settings, in units of its own."""
    return _OLD_KEY in config.get("objective", {})


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in today's keys and units, with the gradient that the old ones had; today's are unchanged."""
    config = copy.deepcopy(dict(config))
    family = config.get("model", {}).get("family")
    if family == "tiny" and "base" in config:
        _name_base(config)
    if family in ("tiny", "wan"):
        config["model"].setdefault("int8", False)
    if not is_old(config):
        return config
    objective = config["objective"]
    temperature = objective.pop(_OLD_KEY)
    objective[_KEY] = temperature
    if objective["rl"] == "awm":
        weight = objective["rl_weight"]
        points = isinstance(weight, (list, tuple))
        objective["rl_weight"] = [[s, w / temperature] for s, w in weight] if points else weight / temperature
        if objective["awm_old"] == "current":
            objective[_KEY] = 1.0  # the ratio is 1 whatever divides its logarithm
    return config


def _name_base(config: dict[str, Any]) -> None:
    """Names the base that shipped when the config was written, and the network that it was made for."""
    if "add_scene" not in config["model"]:
        config["model"]["add_scene"] = False
        config["base"] = config["base"] or "1"
    config["base"] = config["base"] or "2"  # before there was "3", no name meant "2"


def refuse(config: Any) -> None:
    """Raises ValueError where a config file has the units of an earlier version."""
    if is_old(config):
        raise ValueError(
            f"config.objective.{_OLD_KEY} is a key of an earlier version, in which its inverse multiplied RL's "
            f"gradient. Name it objective.{_KEY}, and divide objective.rl_weight by it: then the gradient is as before"
        )
