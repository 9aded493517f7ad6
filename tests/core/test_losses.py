import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from world_distill.core import flow, losses, sampling

SHAPE = (2, 3, 2, 2, 4)  # b f h w c
PINNED = np.float32([0, 1, 1])


def draw(seed, shape=SHAPE, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def numpy_gap(a, b, mask=None):
    square = (np.float64(a) - np.float64(b)) ** 2
    free = slice(None) if mask is None else mask > 0
    return square[:, free].mean((1, 2, 3, 4))


def slope(loss, *arguments):
    """Gradient of the summed [b] loss in its first argument."""
    return np.asarray(jax.jit(jax.grad(lambda *a: loss(*a).sum()))(*arguments))


# ------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("mask", [None, PINNED])
def test_velocity_gap_is_the_mean_square(mask):
    v, ref = draw(0), draw(1)
    np.testing.assert_allclose(losses.velocity_gap(v, ref, mask), numpy_gap(v, ref, mask), rtol=1e-6)
    expected = 2 * np.asarray(v - ref) / (48 if mask is None else 32)
    if mask is not None:
        expected[:, 0] = 0
    np.testing.assert_allclose(slope(lambda v: losses.velocity_gap(v, ref, mask), v), expected, rtol=1e-6)


@pytest.mark.parametrize("gap", [losses.velocity_gap, losses.decoupled_gap])
def test_the_reference_gets_no_gradient(gap):
    v, ref = draw(0), draw(1)
    assert not slope(lambda ref: gap(v, ref, None), ref).any()
    assert slope(lambda v: gap(v, ref, None), v).all()


def test_distillation_reward_is_a_riemann_sum_without_gradient():
    times = np.float32([1.0, 0.7, 0.3, 0.0])
    v_e, v_d = draw(0, (3, *SHAPE)), draw(1, (3, *SHAPE))
    expected = np.zeros(2)
    for i in range(3):
        expected -= (float(times[i]) - float(times[i + 1])) * numpy_gap(v_e[i], v_d[i], PINNED)
    reward = losses.distillation_reward(v_e, v_d, times, PINNED)
    np.testing.assert_allclose(reward, expected, rtol=1e-6)
    reward = functools.partial(losses.distillation_reward, times=times, counts=None)
    assert not slope(lambda v: reward(v, v_d), v_e).any()
    assert not slope(lambda v: reward(v_e, v), v_d).any()


def test_distillation_reward_stops_at_its_lower_bound():
    """States above the bound count with the part of their step that lies above it, the others not at all."""
    times = np.float32([1.0, 0.9, 0.6, 0.2, 0.0])
    v_e, v_d = draw(0, (4, *SHAPE)), draw(1, (4, *SHAPE))
    gaps = [numpy_gap(v_e[i], v_d[i], PINNED) for i in range(4)]
    for bound, widths in ((0.9, (0.1, 0, 0, 0)), (0.7, (0.1, 0.2, 0, 0)), (0.2, (0.1, 0.3, 0.4, 0))):
        reward = losses.distillation_reward(v_e, v_d, times, PINNED, bound)
        np.testing.assert_allclose(reward, -sum(w * g for w, g in zip(widths, gaps, strict=True)), rtol=1e-5)
    np.testing.assert_array_equal(
        losses.distillation_reward(v_e, v_d, times, PINNED, 0.0), losses.distillation_reward(v_e, v_d, times, PINNED)
    )


def test_distillation_reward_converges_to_the_integral():
    """With v_E - v_D = t everywhere the integral is 1/3; left sums reach it at first order."""

    def reward(k):
        times = flow.sampling_times(k)
        gap = jnp.broadcast_to(times[:-1].reshape(k, 1, 1, 1, 1, 1), (k, 1, 1, 1, 1, 1))
        return float(losses.distillation_reward(gap, jnp.zeros_like(gap), times, None)[0])

    assert reward(8) == pytest.approx(-1 / 3 - 1 / 16 - 1 / 384, abs=1e-6)
    assert reward(512) == pytest.approx(-1 / 3, abs=1.1e-3)


def decoupled_by_hand(v, ref, frozen_length):
    """The definition with a cosine, in float64, with sg[|v|] as an argument of its own."""
    length, ref_length = np.sqrt((v**2).mean()), np.sqrt((ref**2).mean())
    cosine = (v * ref).mean() / (length * ref_length)
    return (length - ref_length) ** 2 + 2 * frozen_length * ref_length * (1 - cosine)


@pytest.mark.parametrize("mask", [None, PINNED])
def test_decoupled_gap_has_the_value_of_the_mean_square(mask):
    v, ref = draw(0), draw(1)
    for close in (1.0, 1e-2, 1e-4):
        near = ref + close * v
        got = losses.decoupled_gap(near, ref, mask)
        np.testing.assert_allclose(got, numpy_gap(near, ref, mask), rtol=3e-3 if close < 1e-3 else 1e-4)


def test_decoupled_gap_has_the_gradient_of_its_definition():
    v, ref = draw(0, (1, 1, 1, 2, 3)), draw(1, (1, 1, 1, 2, 3))
    v64, ref64 = np.float64(v).ravel(), np.float64(ref).ravel()
    frozen = np.sqrt((v64**2).mean())
    expected = [
        (decoupled_by_hand(v64 + 1e-6 * unit, ref64, frozen) - decoupled_by_hand(v64 - 1e-6 * unit, ref64, frozen))
        / 2e-6
        for unit in np.eye(6)
    ]
    got = slope(losses.decoupled_gap, v, ref, None).ravel()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(got, slope(losses.velocity_gap, v, ref, None).ravel(), rtol=0.05)


def test_decoupled_gap_does_not_shrink_what_points_elsewhere():
    """v at a right angle to r and as long: the mean square shortens v, the decoupled gap turns it."""
    v, ref = jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])
    v, ref = v.reshape(1, 1, 1, 1, 2), ref.reshape(1, 1, 1, 1, 2)
    assert slope(losses.velocity_gap, v, ref, None).ravel()[0] == pytest.approx(1.0)
    assert slope(losses.decoupled_gap, v, ref, None).ravel()[0] == pytest.approx(0.0, abs=1e-6)
    assert slope(losses.decoupled_gap, v, ref, None).ravel()[1] == pytest.approx(-1.0)


def test_decoupled_gap_at_degenerate_points():
    v, zero = draw(0), jnp.zeros(SHAPE)
    gap = losses.decoupled_gap
    np.testing.assert_allclose(gap(v, v, None), 0, atol=1e-12)
    np.testing.assert_allclose(slope(gap, v, v, None), 0, atol=1e-8)
    np.testing.assert_array_equal(gap(zero, zero, None), 0)
    np.testing.assert_array_equal(slope(gap, zero, zero, None), 0)
    for a, b in ((zero, v), (v, zero)):
        np.testing.assert_allclose(gap(a, b, None), numpy_gap(a, b), rtol=1e-6)
        np.testing.assert_allclose(slope(gap, a, b, None), slope(losses.velocity_gap, a, b, None), rtol=1e-5)
    for scale in (1e-24, 1e-18, 1e-12, 1e12):
        assert np.isfinite(slope(gap, scale * v, draw(1), None)).all()
        assert np.isfinite(slope(gap, draw(1), scale * v, None)).all()


# ----------------------------------------------------------------------------------------- AWM


def test_awm_log_likelihood_by_hand():
    m, t = jnp.asarray([0.16, 0.5]), np.float32([0.5, 1.0])
    expected = {
        "uniform": [-0.16, -0.5],
        "t": [-0.08, -0.5],
        "t2": [-0.04, -0.5],
        "huber": [-0.5 * (0.4 - 1e-5), -(0.5**0.5 - 1e-5)],
        "ghuber": [-2 * (0.16**0.25 - 10**-2.5), -4 * (0.5**0.25 - 10**-2.5)],
    }
    for weighting, values in expected.items():
        np.testing.assert_allclose(losses.awm_log_likelihood(m, t, weighting), values, rtol=1e-6)
    half = losses.awm_log_likelihood(m, t, "ghuber", p=0.5)
    np.testing.assert_allclose(half, losses.awm_log_likelihood(m, t, "huber") * 2, rtol=1e-6)
    np.testing.assert_allclose(
        losses.awm_log_likelihood(m, t, "ghuber", p=1.0),
        losses.awm_log_likelihood(m, t, "t"),
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="cubic"):
        losses.awm_log_likelihood(m, t, "cubic")


@pytest.mark.parametrize("p", [0.25, 0.6])
def test_ghuber_slope_against_finite_differences(p):
    m = np.array([1e-3, 0.1, 2.0])
    t = np.array([0.2, 0.9, 0.5])

    def value(m):
        return -t / p * ((m + 1e-10) ** p - 1e-10**p)

    expected = (value(m * (1 + 1e-5)) - value(m * (1 - 1e-5))) / (2e-5 * m)
    got = slope(lambda m: losses.awm_log_likelihood(m, np.float32(t), "ghuber", p), jnp.float32(m))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
def test_log_likelihood_of_a_perfect_match_is_0_with_a_finite_gradient(weighting):
    v = draw(0)

    def through_velocity(v):
        m = losses.velocity_gap(v, draw(0), None)
        return losses.awm_log_likelihood(m, np.float32([0.5, 0.9]), weighting)

    np.testing.assert_allclose(through_velocity(v), 0, atol=1e-9)
    np.testing.assert_array_equal(slope(through_velocity, v), 0)


def surrogate(log_ratio, advantage, clip, temperature=1.0):
    """Loss, ratio and d loss / d log-likelihood of one example."""
    old = jnp.asarray([-0.3])
    advantage = jnp.asarray([advantage])

    def loss(log_lik):
        value, ratio = losses.awm_surrogate(log_lik, old, advantage, clip, temperature)
        return value.sum(), ratio

    (value, ratio), gradient = jax.value_and_grad(loss, has_aux=True)(old + log_ratio)
    return float(value), float(ratio[0]), float(gradient[0])


@pytest.mark.parametrize("advantage", [-0.8, 0.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.005])
def test_on_policy_gradient_is_minus_advantage(advantage, temperature):
    value, ratio, gradient = surrogate(0.0, advantage, 0.2, temperature)
    assert ratio == 1.0 and value == pytest.approx(-advantage * temperature)
    assert gradient == pytest.approx(-advantage)  # whatever the temperature is


def test_awm_on_policy_gradient_through_a_velocity():
    """-A d l / d theta, with d l worked out by hand for the t weighting."""
    v, target = draw(0), draw(1)
    t, advantages = np.float32([0.4, 0.8]), np.float32([0.7, -0.2])

    def loss(v):
        log_lik = losses.awm_log_likelihood(losses.velocity_gap(v, target, None), t, "t")
        return losses.awm_surrogate(log_lik, log_lik, jnp.asarray(advantages), 1.0)[0]

    weight = (advantages * t)[:, None, None, None, None]
    expected = weight * 2 * (np.asarray(v) - np.asarray(target)) / 48
    np.testing.assert_allclose(slope(loss, v), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "log_ratio, advantage, clipped",
    [
        (0.5, 1.0, True),  # already much likelier and good: enough
        (-0.5, -1.0, True),  # already much less likely and bad: enough
        (0.5, -1.0, False),  # likelier and bad: must still be pulled back
        (-0.5, 1.0, False),
        (0.1, 1.0, False),  # inside the range
        (-0.1, -1.0, False),
    ],
)
def test_clip_stops_only_what_went_far_enough(log_ratio, advantage, clipped):
    value, ratio, gradient = surrogate(log_ratio, advantage, 0.2)
    assert ratio == pytest.approx(np.exp(log_ratio), rel=1e-6)
    limit = 1.2 if log_ratio > 0 else 0.8
    assert value == pytest.approx(-advantage * (limit if clipped else ratio), rel=1e-6)
    assert gradient == pytest.approx(0.0 if clipped else -advantage * ratio, rel=1e-6)


def test_temperature_lets_the_clip_engage():
    assert surrogate(1e-3, 1.0, 0.2)[2] != 0
    value, ratio, gradient = surrogate(1e-3, 1.0, 0.2, temperature=0.005)
    assert ratio == pytest.approx(np.exp(0.2), rel=1e-4)
    assert value == pytest.approx(-1.2 * 0.005) and gradient == 0.0


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_an_exploding_ratio_keeps_loss_and_gradient_finite(advantage):
    value, ratio, gradient = surrogate(1e4, advantage, 0.2)
    assert np.isfinite([value, ratio, gradient]).all() and ratio > 1e8


def test_a_broken_log_likelihood_is_not_hidden():
    value, ratio, _ = surrogate(float("nan"), 1.0, 0.2)
    assert np.isnan(value) and np.isnan(ratio)


# -------------------------------------------------------------------------------- DiffusionNFT


def nft_reference(v, v_old, x_t, x0, t, advantage, beta):
    """The released code's loss of one clip, which compares clean latents (its `adv_clip_max` is 5)."""
    share = np.clip(np.clip(5 * advantage, -5, 5) / 5 / 2 + 0.5, 0, 1)

    def distance(velocity):
        clean = x_t - t * velocity
        return np.mean((clean - x0) ** 2) / max(np.mean(np.abs(clean - x0)), 1e-5)

    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    return 5 * (share * distance(positive) / beta + (1 - share) * distance(negative) / beta)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_the_released_codes(beta):
    v, v_old, x0, eps = (np.asarray(draw(i), np.float64) for i in range(4))
    t, advantages = np.float64([0.4, 0.9]), np.float64([0.7, -0.4])
    x_t = (1 - t)[:, None, None, None, None] * x0 + t[:, None, None, None, None] * eps
    got = losses.nft_loss(
        jnp.asarray(v), jnp.asarray(v_old), jnp.asarray(eps - x0), jnp.asarray(t), jnp.asarray(advantages), beta, None
    )
    expected = [nft_reference(v[i], v_old[i], x_t[i], x0[i], t[i], advantages[i], beta) for i in range(2)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_nft_moves_by_the_advantage_and_not_at_all_without_one():
    v, target, mask = draw(0), draw(1), np.float32([0, 1, 1])[: draw(0).shape[1]]

    def slopes(advantage):
        a, t = jnp.full(2, advantage), jnp.full(2, 0.5)
        return slope(lambda x: losses.nft_loss(x, v, target, t, a, 1.0, mask), v)

    np.testing.assert_allclose(slopes(0.0), 0, atol=1e-9)
    good, bad = slopes(1.0), slopes(-1.0)
    np.testing.assert_allclose(good, -bad, rtol=1e-5, atol=1e-9)
    free = np.asarray(good)[:, 1:]
    assert np.abs(free).max() > 0 and np.abs(np.asarray(good)[:, 0]).max() == 0
    assert (free * np.asarray(target - v)[:, 1:] <= 0).all()  # going down the slope leads to the target


# ----------------------------------------------------------------------------------- Flow-GRPO


def test_flow_grpo_surrogate_by_hand():
    old = np.float32([-1.0, -1.0, -1.0])
    new = np.float32([-0.9995, -1.0, -0.98])
    advantages = np.float32([2.0, -0.5, 1.0])
    loss, ratio = losses.flow_grpo_surrogate(jnp.asarray(new), jnp.asarray(old), jnp.asarray(advantages), 1e-3)
    expected = np.exp(np.float64(new) - np.float64(old))
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    np.testing.assert_allclose(loss, [-2 * expected[0], 0.5, -1.001], rtol=1e-6)


@pytest.mark.parametrize("surrogate", [losses.awm_surrogate, losses.flow_grpo_surrogate])
def test_only_the_policy_gets_a_gradient(surrogate):
    new, old, advantages = draw(0, 3, 0.1), draw(1, 3, 0.1), draw(2, 3)

    def loss(new, old, advantages):
        return surrogate(new, old, advantages, 10.0)[0].sum()

    first, *others = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(new, old, advantages)
    ratio = np.exp(np.float64(new) - np.float64(old))
    np.testing.assert_allclose(first, -np.float64(advantages) * ratio, rtol=1e-5)
    assert not np.any(others)


def test_kl_is_the_integral_of_two_gaussians():
    mean, ref = draw(0, (2, 1, 1, 1, 2)), draw(1, (2, 1, 1, 1, 2))
    std = np.float32([0.5, 1.3])
    got = losses.flow_grpo_kl(mean, ref, std, None)
    for i in range(2):
        entries = []
        for a, b in zip(np.float64(mean[i]).ravel(), np.float64(ref[i]).ravel(), strict=True):
            p, q = scipy.stats.norm(a, std[i]), scipy.stats.norm(b, std[i])
            entries.append(
                scipy.integrate.quad(
                    lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)),
                    a - 10 * std[i],
                    a + 10 * std[i],
                )[0]
            )
        np.testing.assert_allclose(got[i], np.mean(entries), rtol=1e-5)


def test_kl_of_sde_steps_is_a_time_weight_on_the_velocity_gap():
    x, v, ref = draw(0), draw(1), draw(2)
    t, t_next, g = np.float32([0.8, 0.3]), np.float32([0.7, 0.1]), np.float32([0.9, 0.4])
    _, mean, std = sampling.sde_step(x, v, t, t_next, g, None)
    _, mean_ref, _ = sampling.sde_step(x, ref, t, t_next, g, None)
    weight = (1 + g**2 * (1 - t) / (2 * t)) ** 2 * (t - t_next) / (2 * g**2)
    expected = weight * numpy_gap(v, ref, PINNED)
    np.testing.assert_allclose(losses.flow_grpo_kl(mean, mean_ref, std, PINNED), expected, rtol=1e-5)


def test_kl_of_a_deterministic_step_is_0_with_gradient_0():
    mean, ref, std = draw(0), draw(1), np.float32([0.0, 0.5])
    kl = losses.flow_grpo_kl(mean, ref, std, None)
    assert kl[0] == 0 and kl[1] > 0
    gradient = slope(losses.flow_grpo_kl, mean, ref, std, None)
    assert not gradient[0].any()
    np.testing.assert_allclose(gradient[1], np.asarray(mean - ref)[1] / 0.25 / 48, rtol=1e-5)
    assert not slope(lambda ref: losses.flow_grpo_kl(mean, ref, std, None), ref).any()
