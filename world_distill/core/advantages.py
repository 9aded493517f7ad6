"""From judgments to advantages: numpy on the host, float64, every failed judgment masked.

    R = sum_i lambda_i r_i                       WMSD (arXiv 2606.12072) Eq. 10
    A = (R - mean of its group) / (max(std, floor) + eps)    group-relative advantage
    A <- clamp(A, -c, c) / c                     AWM (arXiv 2509.25050): c = 5, std of the batch

A group is all rollouts of one (scene, task). The judge's rewards are log-odds, log p(yes) - log
p(no); unclipped, one very sure answer outweighs all the others. Means and standard deviations
(population) run over valid rollouts only, so a failed judgment moves nothing.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from world_distill.core.losses import ADVANTAGE_CLIP

# Below it rewards differ by rounding only, and dividing would blow the rounding up.
_TINY_STD = 1e-8


def _group_moments(values: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and std [g] of each group's masked-in values; all 0 in an empty group."""
    size = int(ids.max(initial=-1)) + 1
    ids, values = ids[mask], values[mask]
    count = np.bincount(ids, minlength=size)
    divisor = np.maximum(count, 1)
    mean = np.bincount(ids, weights=values, minlength=size) / divisor
    std = np.sqrt(np.bincount(ids, weights=(values - mean[ids]) ** 2, minlength=size) / divisor)
    return count, mean, std


def _prepare(rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards as float64, groups as ids 0 .. g-1, the mask as bool; checks what is valid."""
    rewards, groups, valid = np.asarray(rewards, np.float64), np.asarray(groups), np.asarray(valid)
    if rewards.ndim != 1 or rewards.shape != groups.shape or rewards.shape != valid.shape:
        raise ValueError(f"shapes differ: {rewards.shape=}, {groups.shape=}, {valid.shape=}")
    valid = valid.astype(bool)
    bad = valid & ~np.isfinite(rewards)
    if bad.any():
        raise ValueError(f"valid rewards must be finite; rows {np.flatnonzero(bad).tolist()} are not")
    return rewards, np.unique(groups, return_inverse=True)[1].reshape(-1), valid


def combine_rewards(
    scores: Mapping[str, Float[np.ndarray, " b"]],
    weights: Mapping[str, float],
    *,
    clip: float | Mapping[str, float] | None,
    normalise: Literal["none", "batch", "group"],
    groups: Int[np.ndarray, " b"],
    valid: Bool[np.ndarray, " b"],
) -> Float[np.ndarray, " b"]:
    """The weighted sum of rewards (WMSD Eq. 10), float64 [b]; NaN where a rollout is not valid.

    Args:
        scores: name -> rewards: log-odds of the judge's questions, and whatever else is weighted
            (the distillation reward). Names without a weight are ignored.
        weights: name -> lambda. A weight of 0 leaves its reward out, unread.
        clip: rewards are first clipped to +-clip; a mapping clips the names in it only, None clips
            nothing.
        normalise: then divide each reward by its std over valid rollouts, of the batch or of the
            rollout's group, so that weights compare rewards of very different spread. A std of 0
            divides nothing.
        groups: label of each rollout's group.
        valid: False where the judgment failed.

    Raises:
        KeyError: a weight, or a clip, names no score.
        ValueError: a score is not finite where `valid`, or `normalise` is not one of the three.
    """
    if normalise not in ("none", "batch", "group"):
        raise ValueError(f"normalise must be none, batch or group, got {normalise!r}")
    limits = clip if isinstance(clip, Mapping) else dict.fromkeys(scores, clip)
    for name in [*weights, *limits]:
        if name not in scores:
            raise KeyError(f"no score named {name!r}; there are {sorted(scores)}")
    total = np.where(np.asarray(valid, bool), 0.0, np.nan)
    for name, weight in weights.items():
        if weight == 0:
            continue
        reward = np.asarray(scores[name], np.float64)
        limit = limits.get(name)
        if limit is not None:
            reward = np.clip(reward, -limit, limit)
        try:
            reward, ids, mask = _prepare(reward, groups, valid)
        except ValueError as error:
            raise ValueError(f"score {name!r}: {error}") from error
        if normalise != "none":
            if normalise == "batch":
                ids = np.zeros_like(ids)
            std = _group_moments(reward, ids, mask)[2][ids]
            reward = reward / np.where(std > _TINY_STD, std, 1.0)
        total = total + weight * reward
    return total


def group_advantages(
    rewards: Float[np.ndarray, " b"],
    groups: Int[np.ndarray, " b"],
    valid: Bool[np.ndarray, " b"],
    *,
    std: Literal["batch", "group", "none"],
    std_floor: float = 0.0,
    clip_max: float = ADVANTAGE_CLIP,
    rescale: bool = True,
    min_valid: int = 2,
    eps: float = 1e-4,
    negative_scale: float = 1.0,
) -> tuple[Float[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
    """Group-relative advantages: (advantages float32 [b], used [b]).

    Args:
        rewards: combined rewards; anything where not `valid`.
        groups: label of each rollout's group.
        valid: False where the judgment failed.
        std: divide by the std of all used rewards (AWM), of the group's, or not at all.
        std_floor: least std that is divided by, in the unit of the rewards: differences far below it
            are noise of the judge and give small advantages.
        clip_max: bound of the advantages, in units of the std.
        rescale: divide by `clip_max` at the end, so that advantages lie in [-1, 1].
        min_valid: a group with fewer valid rollouts is left out whole.
        eps: added to the std.
        negative_scale: multiplies negative advantages, last of all; below 1 pushes away less than
            it pulls.

    Returns:
        Advantages, 0 where a rollout is not used; and which are used: valid, in a group that is
        kept.

    Raises:
        ValueError: a valid reward is not finite, shapes differ, or a setting is out of range.
    """
    if std not in ("batch", "group", "none"):
        raise ValueError(f"std must be batch, group or none, got {std!r}")
    if not clip_max > 0 or min_valid < 1 or std_floor < 0:
        raise ValueError(f"need clip_max > 0, min_valid >= 1, std_floor >= 0: {clip_max=}, {min_valid=}, {std_floor=}")
    rewards, ids, valid = _prepare(rewards, groups, valid)
    count, mean, group_std = _group_moments(rewards, ids, valid)
    used = valid & (count >= min_valid)[ids]
    if not used.any():
        return np.zeros(len(rewards), np.float32), used
    centred = np.where(used, rewards - mean[ids], 0.0)
    match std:
        case "batch":
            centred /= max(np.std(rewards[used]), std_floor) + eps
        case "group":
            centred /= np.maximum(group_std, std_floor)[ids] + eps
    advantages = np.clip(centred, -clip_max, clip_max)
    if rescale:
        advantages = advantages / clip_max
    advantages = np.where(advantages < 0, negative_scale * advantages, advantages)
    return advantages.astype(np.float32), used


def group_statistics(
    rewards: Float[np.ndarray, " b"],
    groups: Int[np.ndarray, " b"],
    valid: Bool[np.ndarray, " b"],
    *,
    tolerance: float = 1e-6,
) -> dict[str, float]:
    """What to watch about a batch of rewards, for logs; NaN where nothing is there to average.

    Returns:
        zero_std_ratio: share of groups (of two or more valid rollouts) whose std is at most
            `tolerance`: these teach nothing; group_std: mean std inside such groups; reward_mean
            and reward_std over valid rollouts; valid_fraction.
    """
    rewards, ids, valid = _prepare(rewards, groups, valid)
    count, _, std = _group_moments(rewards, ids, valid)
    std = std[count >= 2]
    some = rewards[valid]
    return {
        "zero_std_ratio": float(np.mean(std <= tolerance)) if std.size else float("nan"),
        "group_std": float(np.mean(std)) if std.size else float("nan"),
        "reward_mean": float(np.mean(some)) if some.size else float("nan"),
        "reward_std": float(np.std(some)) if some.size else float("nan"),
        "valid_fraction": float(np.mean(valid)) if valid.size else float("nan"),
    }
