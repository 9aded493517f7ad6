import inspect
import math

import numpy as np
import pytest

from world_distill.core import advantages

unchecked = inspect.unwrap  # what happens outside of tests, where annotations are not checked

GROUPS = np.array([7, 7, 7, 3, 3, 3, 9, 9])
VALID = np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)


def rewards(seed=0):
    values = np.random.default_rng(seed).normal(size=8) * 3
    values[~VALID] = np.nan
    return values


def mean_std(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def loop(values, std, std_floor, clip_max, rescale, min_valid, eps, negative_scale):
    """The definition, one rollout at a time."""
    members = {g: [i for i in range(8) if GROUPS[i] == g and VALID[i]] for g in GROUPS}
    used = [i for g in members for i in members[g] if len(members[g]) >= min_valid]
    result = [0.0] * 8
    for i in used:
        mean, group_std = mean_std([values[j] for j in members[GROUPS[i]]])
        batch_std = mean_std([values[j] for j in used])[1]
        batch_std, group_std = max(batch_std, std_floor), max(group_std, std_floor)
        divisor = {"batch": batch_std + eps, "group": group_std + eps, "none": 1.0}[std]
        a = max(-clip_max, min(clip_max, (values[i] - mean) / divisor))
        a = a / clip_max if rescale else a
        result[i] = a * negative_scale if a < 0 else a
    return result, [i in used for i in range(8)]


@pytest.mark.parametrize("std", ["batch", "group", "none"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(clip_max=0.5),
        dict(clip_max=0.7, rescale=False),
        dict(min_valid=1),
        dict(std_floor=2.5),
        dict(min_valid=3),
        dict(eps=0.5, negative_scale=0.25),
    ],
)
def test_group_advantages_against_a_plain_loop(std, settings):
    full = dict(std_floor=0.0, clip_max=5.0, rescale=True, min_valid=2, eps=1e-4, negative_scale=1.0) | settings
    values = rewards()
    got, used = advantages.group_advantages(values, GROUPS, VALID, std=std, **settings)
    expected, expected_used = loop(values, std, **full)
    assert got.dtype == np.float32 and used.dtype == bool
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    assert used.tolist() == expected_used


def test_a_floor_keeps_the_judges_noise_small():
    """Without one, rewards that differ by a hundredth have advantages as large as rewards that differ by hundreds."""
    alike, apart = np.array([2.00, 2.01, 1.99, 2.00]), np.array([200.0, 201.0, 199.0, 200.0])
    groups, valid = np.zeros(4, int), np.ones(4, bool)

    def largest(values, floor):
        return np.abs(advantages.group_advantages(values, groups, valid, std="group", std_floor=floor)[0]).max()

    assert largest(alike, 0.0) == pytest.approx(largest(apart, 0.0), rel=0.02)
    assert largest(alike, 0.5) < 0.005 and largest(apart, 0.5) == pytest.approx(largest(apart, 0.0), rel=1e-3)


def test_a_failed_judgment_moves_nothing():
    values = rewards()
    other = values.copy()
    other[~VALID] = [1e6, -np.inf]
    for std in ("batch", "group", "none"):
        one = advantages.group_advantages(values, GROUPS, VALID, std=std)
        two = advantages.group_advantages(other, GROUPS, VALID, std=std)
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])
        kept = advantages.group_advantages(values[VALID], GROUPS[VALID], VALID[VALID], std=std)
        np.testing.assert_array_equal(one[0][VALID], kept[0])
        assert not one[0][~VALID].any() and not one[1][~VALID].any()


def test_a_skipped_group_does_not_enter_the_batch_std():
    values = rewards()
    one, used = advantages.group_advantages(values, GROUPS, VALID, std="batch")
    assert used.tolist() == [True, True, False, True, True, True, False, False]
    values[6] = 1e5  # alone in its group
    np.testing.assert_array_equal(advantages.group_advantages(values, GROUPS, VALID, std="batch")[0], one)


def test_equal_rewards_give_no_advantage_and_no_group_gives_none():
    same, used = advantages.group_advantages(np.full(8, 2.5), GROUPS, VALID, std="group")
    assert not same.any() and used.sum() == 5
    nothing, used = advantages.group_advantages(np.zeros(8), GROUPS, np.zeros(8, bool), std="batch")
    assert not nothing.any() and not used.any() and nothing.dtype == np.float32


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_valid_rewards_must_be_finite(broken):
    values = rewards()
    values[4] = broken
    with pytest.raises(ValueError, match="4"):
        advantages.group_advantages(values, GROUPS, VALID, std="batch")
    with pytest.raises(ValueError, match="4"):
        advantages.group_statistics(values, GROUPS, VALID)


@pytest.mark.parametrize("settings", [dict(std="both"), dict(std="none", clip_max=0.0), dict(std="none", min_valid=0)])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError):
        unchecked(advantages.group_advantages)(rewards(), GROUPS, VALID, **settings)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        unchecked(advantages.group_advantages)(rewards()[:5], GROUPS, VALID, std="none")


SCORES = {
    "task": np.array([8.0, -1.0, np.nan, 2.0, 0.5, -7.0, 1.0, 0.0]),
    "consistency": np.array([1.0, 2.0, 3.0, -4.0, 5.0, 6.0, -1.0, np.nan]),
    "distill": np.array([-0.01, -0.02, -0.03, -9.0, -0.05, -0.06, -0.07, -0.08]),
}


def combine(weights, clip=None, normalise="none", scores=SCORES):
    return advantages.combine_rewards(scores, weights, clip=clip, normalise=normalise, groups=GROUPS, valid=VALID)


def test_rewards_are_clipped_then_weighted():
    got = combine({"task": 1.0, "consistency": 0.5}, clip=3.0)
    expected = [3.5, 0.0, np.nan, 0.5, 2.0, -1.5, 0.5, np.nan]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected)


def test_a_mapping_clips_what_it_names():
    got = combine({"task": 1.0, "distill": 10.0}, clip={"task": 3.0})
    expected = [2.9, -1.2, np.nan, -88.0, 0.0, -3.6, 0.3, np.nan]
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize("normalise", ["batch", "group"])
def test_normalised_rewards_against_a_plain_loop(normalise):
    weights = {"task": 2.0, "distill": 0.3}
    got = combine(weights, clip=3.0, normalise=normalise)
    for i in range(8):
        if not VALID[i]:
            assert np.isnan(got[i])
            continue
        expected = 0.0
        for name, weight in weights.items():
            clipped = [max(-3.0, min(3.0, value)) for value in SCORES[name]]
            mates = [clipped[j] for j in range(8) if VALID[j] and (normalise == "batch" or GROUPS[j] == GROUPS[i])]
            std = mean_std(mates)[1]
            expected += weight * clipped[i] / (std if std > 0 else 1.0)
        np.testing.assert_allclose(got[i], expected, rtol=1e-9)


def test_normalising_makes_weights_free_of_units():
    loud = SCORES | {"task": SCORES["task"] * 1000}
    weights = {"task": 1.0, "consistency": 1.0}
    np.testing.assert_allclose(
        combine(weights, normalise="group", scores=loud)[:6],  # group 9 has one valid rollout
        combine(weights, normalise="group")[:6],
    )


def test_rounding_noise_is_not_blown_up():
    flat = {"task": 0.3 + 1e-12 * np.arange(8.0)}
    np.testing.assert_allclose(combine({"task": 1.0}, normalise="batch", scores=flat)[VALID], 0.3)


def test_a_zero_weight_switches_a_reward_off():
    scores = SCORES | {"agent": np.full(8, np.nan)}
    got = combine({"task": 1.0, "agent": 0.0}, scores=scores)
    np.testing.assert_array_equal(got, combine({"task": 1.0}))


def test_unknown_names_are_named():
    with pytest.raises(KeyError, match="agnet"):
        combine({"agnet": 1.0})
    with pytest.raises(KeyError, match="agnet"):
        combine({"task": 1.0}, clip={"agnet": 3.0})


def test_normalise_must_be_known():
    with pytest.raises(ValueError, match="all"):
        unchecked(advantages.combine_rewards)(
            SCORES, {"task": 1.0}, clip=None, normalise="all", groups=GROUPS, valid=VALID
        )


def test_a_score_that_is_missing_where_valid_is_named():
    broken = SCORES | {"task": SCORES["task"] * np.where(np.arange(8) == 3, np.nan, 1.0)}
    for normalise in ("none", "batch"):
        with pytest.raises(ValueError, match="task.*3"):
            combine({"task": 1.0}, normalise=normalise, scores=broken)


def test_infinite_log_odds_are_usable_once_clipped():
    sure = SCORES | {"task": np.where(np.arange(8) == 3, np.inf, SCORES["task"])}
    assert combine({"task": 1.0}, clip=3.0, scores=sure)[3] == 3.0


def test_group_statistics():
    values = np.array([1.0, 3.0, np.nan, 2.0, 2.0, 2.0, 10.0, np.nan])
    got = advantages.group_statistics(values, GROUPS, VALID)
    some = [1, 3, 2, 2, 2, 10]
    assert got["zero_std_ratio"] == 0.5  # group 3 of 7 and 3; group 9 is too small to tell
    assert got["group_std"] == 0.5
    assert got["reward_mean"] == pytest.approx(mean_std(some)[0])
    assert got["reward_std"] == pytest.approx(mean_std(some)[1])
    assert got["valid_fraction"] == 0.75


def test_group_statistics_of_nothing():
    got = advantages.group_statistics(rewards(), GROUPS, np.zeros(8, bool))
    assert got.pop("valid_fraction") == 0.0
    assert len(got) == 4 and all(math.isnan(value) for value in got.values())
