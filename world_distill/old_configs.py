"""Configs that earlier versions wrote, in today's keys and units.

Early versions did not multiply AWM's loss by the temperature that divides the log-ratio (`objective.awm_temperature`),
so RL's gradient was larger than `rl_weight` said, by the inverse of that temperature. Today the gradient at ratio 1
does not depend on the temperature, whose key is `objective.awm_ratio_temperature`.
"""

import copy
from collections.abc import Mapping
from typing import Any

# Keys that are newer than some run, with the value that changes nothing.
_NEWER = {
    "objective": {"nft_beta": 1.0, "nft_old": "start"},
    "rollout": {"distill_min_time": 0.0, "std_floor": 0.0, "guidance": 1.0},
    "demonstrator": {"guidance": 1.0, "negative": ""},
}
_OLD_KEY, _KEY = "awm_temperature", "awm_ratio_temperature"


def is_old(config: Mapping[str, Any]) -> bool:
    """Whether an earlier version wrote these settings, in units of its own."""
    return _OLD_KEY in config.get("objective", {})


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in today's keys and units, with the gradient that the old ones had; today's are unchanged."""
    config = copy.deepcopy(dict(config))
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
    for section, values in _NEWER.items():
        config[section] = values | config.get(section, {})
    if config.get("model", {}).get("family") == "tiny" and "add_scene" not in config["model"]:
        # The base that shipped then, and the network that it was made for.
        config["model"]["add_scene"] = False
        config["base"] = config["base"] or "1"
    return config


def refuse(config: Mapping[str, Any]) -> None:
    """Raises ValueError where a config file has the units of an earlier version."""
    if is_old(config):
        raise ValueError(
            f"config.objective.{_OLD_KEY} is a key of an earlier version, in which its inverse multiplied RL's "
            f"gradient. Name it objective.{_KEY}, and divide objective.rl_weight by it: then the gradient is as before"
        )
