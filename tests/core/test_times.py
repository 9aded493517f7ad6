import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from world_distill.core import flow, times

GRID = flow.sampling_times(14)
# LTX-2's distilled sampler: half of its steps are the first 2.5 % of the way.
DISTILLED = flow.sampling_times(8, explicit=(1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422))


def draws(function, n=4000):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.jit(jax.vmap(function))(keys))


def stratified(steps, count, skip_first=True, keep_fraction=0.9):
    grid = flow.sampling_times(steps)
    return draws(
        lambda key: times.stratified_times(key, grid, count, skip_first=skip_first, keep_fraction=keep_fraction)
    )


def test_strata_are_awms_where_they_divide_the_grid():
    """13 steps, 6 strata, no pure noise: cuts 1 3 5 7 9 11 13."""
    indices = stratified(13, 6, keep_fraction=1.0)
    assert np.issubdtype(indices.dtype, np.integer) and indices.shape == (4000, 6)
    cuts = [1, 3, 5, 7, 9, 11, 13]
    for i in range(6):
        got, counts = np.unique(indices[:, i], return_counts=True)
        assert got.tolist() == list(range(cuts[i], cuts[i + 1]))
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("steps, count", [(6, 16), (14, 6), (12, 2), (5, 7)])
def test_every_index_is_equally_likely(steps, count):
    """Where the strata do not divide the grid, cuts at whole indices would draw some of them half as often."""
    indices = stratified(steps, count, skip_first=False, keep_fraction=1.0)
    drawn = np.bincount(indices.reshape(-1), minlength=steps)
    share = drawn / drawn.sum() * steps
    assert np.abs(share - 1).max() < 0.12, share
    # And still stratified: no draw lacks an index that it has strata for.
    least = max(0, count // steps - 1)
    assert min(np.bincount(row, minlength=steps).min() for row in indices[:500]) >= least


def by_dt(grid, count, skip_first=False, keep_fraction=1.0):
    """Draws [4000 count] of indices by the length of their steps."""
    return draws(
        lambda key: times.stratified_times(
            key, grid, count, skip_first=skip_first, keep_fraction=keep_fraction, by_dt=True
        )
    )


@pytest.mark.parametrize("count", [1, 6, 16])
def test_by_dt_every_index_is_as_likely_as_its_step_is_long(count):
    indices = by_dt(DISTILLED, count)
    assert indices.shape == (4000, count) and (np.diff(indices, axis=1) >= 0).all()
    share = np.bincount(indices.ravel(), minlength=8) / indices.size
    np.testing.assert_allclose(share, -np.diff(DISTILLED), atol=0.03 / count**0.5)
    # By index, the first four steps are half of all draws.
    assert share[:4].sum() == pytest.approx(0.025, abs=0.01) and share[7] == pytest.approx(0.422, abs=0.02)


def test_by_dt_cuts_take_their_shares_with_them():
    """AWM leaves pure noise out, and may leave out the last time: what is left shares the rest."""
    indices = by_dt(DISTILLED, 6, skip_first=True, keep_fraction=0.9)
    assert np.unique(indices).tolist() == [1, 2, 3, 4, 5, 6]
    share, lengths = np.bincount(indices.ravel(), minlength=8) / indices.size, -np.diff(DISTILLED)[1:7]
    np.testing.assert_allclose(share[1:7], lengths / lengths.sum(), atol=0.01)
    assert np.unique(by_dt(DISTILLED, 6, skip_first=True)).max() == 7  # without that cut, t = .422 is looked at


@pytest.mark.parametrize("steps, count", [(14, 6), (6, 16), (5, 7)])
def test_by_dt_on_an_even_grid_has_the_law_of_indices(steps, count):
    """Stratum by stratum: how often it gives which index."""
    grid = flow.sampling_times(steps)
    one, other = by_dt(grid, count), stratified(steps, count, skip_first=False, keep_fraction=1.0)
    tables = [np.stack([np.bincount(column, minlength=steps) for column in x.T]) / 4000 for x in (one, other)]
    np.testing.assert_allclose(*tables, atol=0.05)


def test_by_dt_a_single_index_is_always_drawn():
    assert (by_dt(flow.sampling_times(2, 3.0), 3, skip_first=True) == 1).all()


@pytest.mark.parametrize(
    "steps, count, skip_first, keep_fraction, reached",
    [
        (14, 6, False, 0.9, range(12)),
        (8, 6, True, 0.9, range(1, 7)),
        (8, 3, False, 1.0, range(8)),
        (4, 6, True, 0.9, range(1, 3)),  # fewer indices than strata
        (50, 7, True, 1.0, range(1, 50)),
        (100, 1, False, 0.29, range(29)),
        (2, 4, True, 1.0, range(1, 2)),
        (1, 2, False, 1.0, range(1)),
    ],
)
def test_every_index_between_the_cuts_is_reached_and_no_other(steps, count, skip_first, keep_fraction, reached):
    indices = stratified(steps, count, skip_first, keep_fraction)
    assert np.unique(indices).tolist() == list(reached)
    assert (np.diff(indices, axis=1) >= 0).all()
    if len(reached) % count == 0:
        assert (np.diff(indices, axis=1) > 0).all()


@pytest.mark.parametrize(
    "steps, count, skip_first, keep_fraction",
    [
        (1, 2, True, 1.0),
        (2, 2, True, 0.9),
        (3, 2, False, 0.1),
        (8, 0, True, 0.9),
        (8, 2, True, 0.0),
        (8, 2, True, 1.1),
    ],
)
def test_an_empty_choice_is_refused(steps, count, skip_first, keep_fraction):
    with pytest.raises(ValueError):
        times.stratified_times(
            jax.random.key(0),
            flow.sampling_times(steps),
            count,
            skip_first=skip_first,
            keep_fraction=keep_fraction,
        )


def test_draws_repeat_with_their_key_and_differ_between_keys():
    def draw(seed):
        return times.logit_normal_times(jax.random.key(seed), 6, 3.0)

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (np.asarray(draw(0)) != np.asarray(draw(1))).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_times_follow_their_law(shift):
    count = 6
    t = draws(lambda key: times.logit_normal_times(key, count, shift))
    assert t.dtype == np.float32 and (t >= 0.01).all() and (t < 1).all()
    # Undo the shift and the sigmoid: a shifted logit is the logit plus log(shift).
    normal = np.log(t / (1 - t)).astype(np.float64) - np.log(shift)
    assert scipy.stats.kstest(normal.ravel(), "norm").pvalue > 1e-3
    rank = scipy.stats.norm.cdf(normal) * count
    strata = np.broadcast_to(np.arange(count), t.shape)
    np.testing.assert_array_equal(np.floor(rank[:, 1:-1]), strata[:, 1:-1])
    assert (rank[:, 0] <= 1 + 1e-4).all() and (rank[:, -1] >= count - 1 - 1e-4).all()


def test_logit_normal_times_have_a_floor():
    t = draws(lambda key: times.logit_normal_times(key, 2, 0.02))
    assert t.min() == np.float32(0.01) and t.max() > 0.01


@pytest.mark.parametrize("shift, low", [(1.0, 0.2), (3.0, 0.0)])
def test_uniform_times_follow_their_law(shift, low):
    count = 4
    t = draws(lambda key: times.uniform_times(key, count, shift, low)).astype(np.float64)
    plain = t / (shift - (shift - 1) * t)  # the inverse shift
    unit = (plain - low) / (1 - low)
    assert scipy.stats.kstest(unit.ravel(), "uniform").pvalue > 1e-3
    cell = unit * count - np.arange(count)
    assert (cell > -1e-5).all() and (cell < 1 + 1e-5).all()


@pytest.mark.parametrize("shift", [1.0, 7.77])
def test_stretched_times_follow_their_law(shift):
    """By samples of the definition: a normal logit, quantiles .005 and .999 at 0 and 1, one in ten uniform."""
    t = draws(lambda key: times.stretched_times(key, 4, shift)).ravel()
    rng = np.random.default_rng(0)
    low, high = (1 / (1 + np.exp(-x) / shift) for x in scipy.stats.norm.ppf([0.005, 0.999]))
    expected = (1 / (1 + np.exp(-rng.normal(size=t.size)) / shift) - low) / (high - low)
    expected = np.where(expected < 1e-3, 2e-3 - expected, expected).clip(0, 1)
    expected = np.where(rng.random(t.size) < 0.1, rng.uniform(1e-3, 1, t.size), expected)
    assert scipy.stats.ks_2samp(t, expected).pvalue > 1e-3
    assert t.min() >= 1e-3 and t.max() == 1


@pytest.mark.parametrize("function", [times.logit_normal_times, times.uniform_times, times.stretched_times])
def test_no_strata_is_refused(function):
    with pytest.raises(ValueError):
        function(jax.random.key(0), 0, 3.0, *([0.2] if function is times.uniform_times else []))


def test_indices_pick_times_under_jit():
    picked = jax.jit(
        lambda key: jnp.asarray(GRID)[times.stratified_times(key, GRID, 6, skip_first=True, keep_fraction=0.9)]
    )(jax.random.key(3))
    assert (np.diff(picked) < 0).all() and set(np.asarray(picked)) <= set(GRID[1:12])
