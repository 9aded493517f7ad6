"""The values that settings may have, of configs and of flags, in one table.

`RANGES` maps a key of a config to its range, or to the words that it may be. `load_config` and `override` check what
they set, so that a wrong value ends a command before it does anything. The dataclasses of settings check themselves by
the same table, and flags of the command line are read by the same ranges (`cli.arguments.number`).
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

from world_distill.errors import SettingError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`; without the ends, where they are open. Points hold such values."""

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False
    also: float | None = None  # one more value, with a meaning of its own

    def holds(self, value: float) -> bool:
        """Whether the number is in the range."""
        if value == self.also:
            return True
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_least else 'at least'} {self.least:.12g}"
        high = f"{'below' if self.open_most else 'at most'} {self.most:.12g}"
        parts = ([low] if self.least > -math.inf else []) + ([high] if self.most < math.inf else [])
        text = " and ".join(parts) or "a finite number"
        return text if self.also is None else f"{text}, or {self.also:g}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        """Whether the value is one of the words."""
        return value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


ONE = Range(1)  # at least one of something
SOME = Range(0)  # or none, or all, or no limit, as the key says
SHARE = Range(0, 1)
PART = Range(0, 1, open_least=True)
DECAY = Range(0, 1, open_most=True)
POSITIVE = Range(0, open_least=True)
SEED = Range(0, 2**32, open_most=True)
SCALE = Range(1)  # of guidance; 1 is none
AXIS = Range(1, also=-1)  # of a mesh; -1 takes the devices that are left
GREY = Range(0, 255)

OPTIMIZERS = OneOf(("adam", "adamw", "muon"))
SPREAD = OneOf(("batch", "group", "none"))

RANGES: Mapping[str, Range | OneOf] = {
    "seed": SEED,
    "text_length": ONE,
    "encode_batch": ONE,
    "host_devices": ONE,
    "steps": ONE,
    "log_every": ONE,
    "save_every": ONE,
    "keep": ONE,
    "evaluate_every": SOME,
    "evaluate_tasks": SOME,
    "evaluate_batch": ONE,
    "demonstrator.guidance": SCALE,
    "executor.rank": SOME,
    "executor.alpha": POSITIVE,
    "executor.start_alpha": SOME,
    "sampler.steps": ONE,
    "sampler.shift": POSITIVE,
    "sampler.eta": SOME,
    "sampler.sde": OneOf(("flow_grpo", "cps")),
    "rollout.tasks": ONE,
    "rollout.group": ONE,
    "rollout.role": OneOf(("executor", "demonstrator")),
    "rollout.micro_batch": SOME,
    "rollout.guidance": SCALE,
    "rollout.staleness": Range(0, 1),
    "rollout.weights.*": SOME,
    "rollout.distill_min_time": DECAY,
    "rollout.clip": SOME,
    "rollout.normalise": SPREAD,
    "rollout.std": SPREAD,
    "rollout.std_floor": SOME,
    "rollout.min_valid": ONE,
    "rollout.max_invalid": SHARE,
    "rollout.negative_scale": SOME,
    "objective.kind": OneOf(("wmsd", "sft")),
    "objective.sft_times": OneOf(("uniform", "logit_normal", "stretched", "grid")),
    "objective.sft_shift": POSITIVE,
    "objective.sft_power": SOME,
    "objective.rl": OneOf(("awm", "nft", "flow_grpo", "none")),
    "objective.rl_weight": SOME,
    "objective.beta_d": SOME,
    "objective.anchor_states": OneOf(("visited", "renoised")),
    "objective.anchor_loss": OneOf(("mse", "decoupled")),
    "objective.times": OneOf(("index", "by_dt")),
    "objective.updates": ONE,
    "objective.minibatches": ONE,
    "objective.draws": ONE,
    "objective.tied": SOME,
    "objective.micro_batch": SOME,
    "objective.keep_fraction": PART,
    "objective.awm_weighting": OneOf(("uniform", "t", "t2", "huber", "ghuber")),
    "objective.awm_power": POSITIVE,
    "objective.awm_clip": POSITIVE,
    "objective.awm_ratio_temperature": POSITIVE,
    "objective.awm_old": OneOf(("current", "start", "ema")),
    "objective.nft_beta": POSITIVE,
    "objective.nft_old": OneOf(("start", "ema")),
    "objective.beta_old": SOME,
    "objective.old_slope": SOME,
    "objective.old_maximum": DECAY,
    "objective.beta_base": SOME,
    "objective.grpo_clip": POSITIVE,
    "objective.grpo_beta": SOME,
    "objective.ema_decay": DECAY,
    "optimizer.name": OPTIMIZERS,
    "optimizer.learning_rate": SOME,
    "optimizer.weight_decay": SOME,
    "optimizer.grad_clip": POSITIVE,
    "optimizer.b2": DECAY,
    "optimizer.eps": POSITIVE,
    "mesh.*": AXIS,
    "annotator.pairs": ONE,
    "annotator.test_pairs": ONE,
    "annotator.max_side": SOME,
    "annotator.max_failures": SHARE,
    "filters.min_side": SOME,
    "filters.min_mean": GREY,
    "filters.max_mean": GREY,
    "filters.min_spread": SOME,
    "filters.min_sharpness": SOME,
    "filters.near": Range(-1, 64),
    "judge.keep_clips": SHARE,
    "judge.controls": SOME,
    "scenes.train": SOME,
    "scenes.validation": SOME,
    "scenes.test": SOME,
    "pretrain.steps": ONE,
    "pretrain.batch": ONE,
    "pretrain.optimizer": OPTIMIZERS,
    "pretrain.learning_rate": SOME,
    "pretrain.warmup": SOME,
    "pretrain.grad_clip": POSITIVE,
    "pretrain.loss_power": SOME,
    "pretrain.drop_text": SHARE,
    "pretrain.shift": POSITIVE,
    "pretrain.plain_every": ONE,
    "pretrain.ema_decay": DECAY,
    "pretrain.log_every": ONE,
    "pretrain.save_every": ONE,
    "model.frames": ONE,
    "model.size": ONE,
    "model.fps": POSITIVE,
    "model.depth": ONE,
    "model.heads": ONE,
    "model.places": ONE,
    "model.piece": SOME,
    "model.rows": SOME,
}


def problem(key: str, value: Any) -> str | None:
    """What is wrong with the value of a config's key, as a clause that begins with the key; None: nothing is.

    A value of points (step, value) is looked at point by point, a tuple of numbers number by number. Keys that the
    table does not have, and values of another type than their key's, are somebody else's to check.
    """
    allowed = RANGES.get(key) or next((r for k, r in RANGES.items() if "*" in k and fnmatch.fnmatch(key, k)), None)
    if isinstance(allowed, OneOf):
        if not allowed.holds(value):
            return f"{key} must be {allowed}, not {value!r}; {did_you_mean(str(value), allowed.words)}"
    elif isinstance(allowed, Range):
        for number in _numbers(value):
            if not allowed.holds(number):
                return f"{key} must be {allowed}, not {number:g}"
    return None


def check(section: str, settings: Any) -> None:
    """Raises SettingError, naming every one of them, where fields of a section's dataclass are out of their ranges."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        inner = value if isinstance(value, Mapping) else None
        values |= {f"{field.name}.{k}": v for k, v in inner.items()} if inner is not None else {field.name: value}
    found = [text for name, value in values.items() if (text := problem(f"{section}.{name}", value))]
    if found:
        raise SettingError("\n  ".join(found))


def _numbers(value: Any) -> list[float]:
    """The numbers of a value: itself, the items of a tuple, or the values of points."""
    if isinstance(value, (bool, str)) or value is None:
        return []
    if isinstance(value, (int, float)):
        return [value]
    if isinstance(value, (tuple, list)):
        return [n for item in value for n in _numbers(item[-1:] if isinstance(item, (tuple, list)) else item)]
    return []
