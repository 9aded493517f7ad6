import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from world_distill.core import metrics

SHAPE = (2, 3, 2, 2, 4)
PINNED = np.float32([0, 1, 1])


def draw(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("mask", [None, PINNED])
def test_velocity_diagnostics_against_flat_vectors(mask):
    v, ref = draw(0), draw(1) + 0.5
    got = metrics.velocity_diagnostics(jnp.asarray(v), jnp.asarray(ref), mask)
    free = slice(None) if mask is None else mask > 0
    for i in range(2):
        a, b = (np.float64(x[i][free]).reshape(-1, 4) for x in (v, ref))
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert got["cosine"][i] == pytest.approx(cosine, rel=1e-5)
        ratio = np.linalg.norm(a) / np.linalg.norm(b)
        assert got["norm_ratio"][i] == pytest.approx(ratio, rel=1e-5)
        # Energy without the channel means, by projection: total minus what is left around them.
        error = a - b
        left = ((error - error.mean(0)) ** 2).sum()
        assert got["dc"][i] == pytest.approx(1 - left / (error**2).sum(), rel=1e-4)


def test_a_pure_colour_offset_is_all_dc_and_zeros_give_zeros():
    v = draw(0)
    offset = np.broadcast_to(np.float32([1.0, -2.0, 0.5, 0.0]), SHAPE)
    got = metrics.velocity_diagnostics(jnp.asarray(v), jnp.asarray(v + offset), None)
    np.testing.assert_allclose(got["dc"], 1, rtol=1e-5)
    zero = jnp.asarray(np.zeros(SHAPE, np.float32))
    for value in metrics.velocity_diagnostics(zero, zero, None).values():
        np.testing.assert_array_equal(value, 0)


def test_binned_by_time():
    t = np.array([0.0, 0.1, 0.25, 0.6, 1.0, 0.75])
    values = np.array([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    means, counts = metrics.binned_by_time(values, t, [0.0, 0.25, 0.5, 0.55, 1.0])
    np.testing.assert_allclose(means, [2.0, 5.0, np.nan, 9.0])
    assert counts.tolist() == [2, 1, 0, 3]
    edges = np.linspace(0, 1, 8)
    t, values = np.random.default_rng(0).uniform(size=500), draw(1, 500).astype(np.float64)
    means, counts = metrics.binned_by_time(values, t, edges)
    np.testing.assert_allclose(means, scipy.stats.binned_statistic(t, values, bins=edges)[0])
    np.testing.assert_array_equal(counts, np.histogram(t, edges)[0])


@pytest.mark.parametrize("t, edges", [([1.1], [0, 1]), ([0.5], [0, 0]), ([np.nan], [0, 1])])
def test_binned_by_time_drops_nothing_silently(t, edges):
    with pytest.raises(ValueError):
        metrics.binned_by_time(np.ones(1), np.array(t), edges)


@pytest.mark.parametrize("successes, n", [(0, 10), (3, 10), (10, 10), (121, 200)])
def test_wilson_interval_against_scipy(successes, n):
    z = scipy.stats.norm.ppf(0.975)
    expected = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(metrics.wilson_interval(successes, n, z), (expected.low, expected.high), atol=1e-12)


def test_wilson_interval_at_its_borders():
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
    for successes, n in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError):
            metrics.wilson_interval(successes, n)


def test_mean_interval_against_scipy():
    values = draw(0, 50).astype(np.float64)
    z = scipy.stats.norm.ppf(0.975)
    mean, low, high = metrics.mean_interval(values, z)
    expected = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    np.testing.assert_allclose((mean, low, high), (values.mean(), *expected))
    mean, low, high = metrics.mean_interval(np.array([2.0]))
    assert mean == 2.0 and np.isnan([low, high]).all()
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError):
            metrics.mean_interval(bad)


def test_correlations_inside_groups_do_not_see_what_sets_groups_apart():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 4)
    level = 10 * rng.normal(size=30)[groups]
    inside = rng.normal(size=120)
    values = {"a": level + inside, "b": level - inside, "c": level, "d": inside + rng.normal(size=120)}
    valid = np.ones(120, bool)
    found = metrics.within_group_correlations(values, groups, valid)
    assert list(found) == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")]
    assert found["a", "b"] == pytest.approx(-1) and np.corrcoef(values["a"], values["b"])[0, 1] > 0.9
    assert np.isnan(found["a", "c"])  # the same for all of a group
    by_hand = [
        np.concatenate([values[n][groups == g] - values[n][groups == g].mean() for g in range(30)]) for n in ("a", "d")
    ]
    assert found["a", "d"] == pytest.approx(np.corrcoef(*by_hand)[0, 1])


def test_correlations_leave_out_what_is_not_valid():
    rng = np.random.default_rng(1)
    groups, valid = np.repeat(np.arange(5), 4), np.ones(20, bool)
    values = {"a": rng.normal(size=20), "b": rng.normal(size=20)}
    valid[[3, 8]] = False
    kept = metrics.within_group_correlations({n: v[valid] for n, v in values.items()}, groups[valid], valid[valid])
    values["a"][~valid] = np.nan
    assert metrics.within_group_correlations(values, groups, valid)["a", "b"] == pytest.approx(kept["a", "b"])


@pytest.mark.parametrize(
    "values", [[1.0], [0.5], [1, 1, 1], [0.75] * 4, [1, 0.9], [0.0, 0.02, 0.01], [0, 1], [0, 1, 1, 1]]
)
def test_intervals_of_scores_lie_in_their_range_and_are_never_empty(values):
    mean, low, high = metrics.score_interval(np.array(values, float))
    assert mean == pytest.approx(np.mean(values)) and 0 <= low <= mean <= high <= 1 and low < high


def test_intervals_of_scores_are_wilsons_for_verdicts_and_students_for_grades():
    assert metrics.score_interval(np.array([1.0, 0, 0, 1]))[1:] == metrics.wilson_interval(2, 4)
    assert metrics.score_interval(np.full(4, 0.75))[1:] == metrics.wilson_interval(3.0, 4)  # 0.75 is not 1
    grades = np.array([0.25, 0.5, 0.75, 0.5])
    assert metrics.score_interval(grades) == metrics.student_interval(grades)
    for bad in ([], [0.5, np.nan], [1.5], [-0.1]):
        with pytest.raises(ValueError):
            metrics.score_interval(np.array(bad, float))


def test_differences_of_verdicts_are_agresti_and_mins():
    """The equation of Statistics in Medicine 24 (2005): half a pair is added to each cell."""
    a, b = np.repeat([1.0, 0, 1, 0], [14, 2, 5, 9]), np.repeat([0.0, 1, 1, 0], [14, 2, 5, 9])
    centre, n = (14.5 - 2.5) / 32, 32
    half = 1.96 * np.sqrt((14.5 + 2.5) / n - centre**2) / np.sqrt(n)
    assert metrics.score_difference(a, b) == pytest.approx((0.4, centre - half, centre + half))
    assert metrics.score_difference(b, a) == pytest.approx((-0.4, -centre - half, half - centre))
    assert metrics.score_difference(a, b)[1:] == metrics.paired_rate_interval(a > 0, b > 0)[1:]


def test_differences_of_grades_are_students_and_paired():
    """A shared spread far larger than the difference must cancel."""
    rng = np.random.default_rng(0)
    shared = rng.uniform(0.1, 0.8, 40)
    a, b = shared + 0.1 + rng.uniform(0, 0.1, 40), shared + rng.uniform(-0.1, 0.1, 40)
    d = a - b
    expected = scipy.stats.t.interval(0.95, 39, d.mean(), scipy.stats.sem(d))
    assert metrics.score_difference(a, b) == pytest.approx((d.mean(), *expected))


@pytest.mark.parametrize("values", [[1.0] * 3, [0.5] * 3, [0.2, 0.9, 0.4]])
def test_differences_of_scores_are_never_empty_and_stay_in_their_range(values):
    one = np.array(values)
    difference, low, high = metrics.score_difference(one, one)
    assert difference == 0 and low < 0 < high
    for a, b in ((one, 0 * one), (0 * one, one), (one, one[::-1])):
        difference, low, high = metrics.score_difference(a, b)
        assert -1 <= low <= difference <= high <= 1 and low < high


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_few_cases_show_no_sign(n, spread):
    """All n differ alike, or nearly so: two-sided, that has chance 2 / 2^n. Cases that are equal show nothing more."""
    a, b = 1 - spread * np.arange(n) / 8, np.zeros(n)
    for ties in (0, 30):
        _, low, high = metrics.score_difference(np.pad(a, (0, ties)), np.pad(b, (0, ties)))
        assert (low > 0) == (n >= 6), (n, ties)
        assert -metrics.score_difference(np.pad(b, (0, ties)), np.pad(a, (0, ties)))[2] == pytest.approx(low)


@pytest.mark.parametrize("up, down", [(1, 0), (5, 0), (6, 0), (7, 1), (9, 2), (10, 3), (30, 14), (40, 20)])
def test_the_sign_flip_test_of_verdicts_is_mcnemars(up, down):
    d = np.repeat([1.0, -1, 0], [up, down, 17])
    expected = scipy.stats.binomtest(up, up + down).pvalue
    exact = up + down <= 12
    assert metrics.sign_flip_p(d) == pytest.approx(expected, abs=1e-12 if exact else 0.01)
    assert metrics.sign_flip_p(-d) == metrics.sign_flip_p(d)


def test_the_sign_flip_test_of_grades_tries_all_signs():
    d = np.array([0.3, 0.1, -0.2, 0.4, 0.25])
    found = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert metrics.sign_flip_p(d) == pytest.approx(found.pvalue)
    assert metrics.sign_flip_p(np.zeros(3)) == metrics.sign_flip_p(np.array([])) == 1
    many = np.random.default_rng(0).normal(0.3, 1, 60)
    assert metrics.sign_flip_p(many) == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    assert metrics.sign_flip_p(np.ones(60)) == 1 / 4097  # never 0


@pytest.mark.parametrize("a, b", [([], []), ([1.0, np.nan], [1.0, 1.0]), ([1.5], [1.0])])
def test_differences_of_scores_refuse_what_they_cannot_use(a, b):
    with pytest.raises(ValueError):
        metrics.score_difference(np.array(a, float), np.array(b, float))
