"""Warns where the weights of the two losses are so far apart that one of them cannot matter."""

from collections.abc import Mapping

from absl import logging

LEAST = 0.01  # share of the other gradient's length below which a loss moves nothing
STEPS = 5  # in a row, before it is said: the first steps of RL are noisy


class Balance:
    """Watches the lengths of the two gradients through a run; each warning is given once."""

    def __init__(self):
        self._counts = {"anchor": 0, "rl": 0}
        self._said: set[str] = set()

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """Looks at a step's metrics; those without both gradients are passed over."""
        ratio = values.get("train/anchor_to_rl")
        if ratio is None or not values.get("train/beta_d") or not values.get("train/rl_weight"):
            return
        for name, small in (("anchor", ratio < LEAST), ("rl", ratio > 1 / LEAST)):
            self._counts[name] = self._counts[name] + 1 if small else 0
            if self._counts[name] >= STEPS and name not in self._said:
                self._said.add(name)
                logging.warning(_TEXTS[name], step, ratio, values[_WEIGHTS[name]])


_WEIGHTS = {"anchor": "train/beta_d", "rl": "train/rl_weight"}
_TEXTS = {
    "anchor": "step %d: the anchor's gradient is %.2g of RL's, so objective.beta_d = %g hardly matters",
    "rl": "step %d: the anchor's gradient is %.3g times RL's, so objective.rl_weight = %g hardly matters: are the "
    "rewards of a group all alike (reward/group_std)?",
}
