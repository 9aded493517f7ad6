"""Times drawn by dt, CPS in the Flow-GRPO loss, and losses by the sampler's step, through the network of `toy.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.toy import GRID, PIECES, ROWS, STEPS, TABLES, change, make_batch, make_objective, make_state, run
from world_distill.core import flow
from world_distill.training import step as steps

DISTILLED = flow.sampling_times(8, explicit=(1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422))


@pytest.fixture(scope="module")
def preserved(family, base, lora):
    """Rollouts by CPS."""
    return make_batch(family, base, lora, TABLES["cps"], "cps")


def draws(objective, batch, grid, count=300):
    keys = jax.random.split(jax.random.key(1), count)
    return jax.device_get(
        jax.jit(jax.vmap(lambda key: steps.draw_rows(key, objective, batch, grid, None)._replace(keys=0)))(keys)
    )


def test_times_by_dt_are_those_of_visited_states_and_of_renoised_clips(batch):
    objective = make_objective(rl="awm", draws=4, tied=1)
    shares = {}
    for law in ("index", "by_dt"):
        drawn = draws(dataclasses.replace(objective, times=law), batch, DISTILLED)
        for name in ("visited", "renoised"):
            indices = getattr(drawn, name).ravel()
            shares[law, name] = np.bincount(indices, minlength=8) / indices.size
    lengths = -np.diff(DISTILLED)
    np.testing.assert_allclose(shares["by_dt", "visited"], lengths, atol=0.01)
    # Re-noised clips leave pure noise out.
    np.testing.assert_allclose(shares["by_dt", "renoised"], np.where(np.arange(8) > 0, lengths, 0) / 0.99375, atol=0.01)
    np.testing.assert_allclose(shares["index", "visited"], 1 / 8, atol=0.01)
    np.testing.assert_allclose(shares["index", "renoised"][1:], 1 / 7, atol=0.01)
    assert shares["by_dt", "visited"][:4].sum() < 0.04 and shares["index", "visited"][:4].sum() > 0.48


def test_with_draws_by_dt_the_anchor_is_its_integral_over_the_path(family, base, lora, batch):
    """One row, so many draws that strata are fine: the mean is Eq. 9's sum of gaps by dt, not Eq. 11's mean."""
    settings = {"rl": "none", "beta_d": 1.0, "updates": 1, "draws": STEPS, "tied": 0, "log_by_step": True}
    _, metrics = run(family, base, lora, batch, make_objective(**settings))
    gaps = np.array([float(metrics[f"train/anchor/step_{i}"]) for i in range(STEPS)])
    assert float(metrics["train/anchor"]) == pytest.approx(gaps.mean(), rel=1e-5)
    _, metrics = run(family, base, lora, batch, make_objective(**settings | {"times": "by_dt", "draws": 400}))
    integral = (gaps * -np.diff(GRID)).sum()
    assert abs(integral / gaps.mean() - 1) > 0.02
    assert float(metrics["train/anchor"]) == pytest.approx(integral, rel=5e-3)


@pytest.mark.parametrize("pieces", [{}, PIECES], ids=["whole", "pieces"])
def test_cps_ratio_is_one_before_any_update(family, base, lora, preserved, pieces):
    objective = make_objective(rl="flow_grpo", updates=1, draws=STEPS - 1, **pieces)
    _, metrics = run(family, base, lora, preserved, objective, diffuses=True, sde="cps")
    assert abs(float(metrics["train/ratio"]) - 1) < 1e-6 and abs(float(metrics["train/ratio_max"]) - 1) < 1e-6
    # Neither for another policy's rollouts, nor by the other step's log-probabilities.
    other = jax.tree.map(lambda x: 1.5 * x, lora)
    _, metrics = run(family, base, other, preserved, objective, diffuses=True, sde="cps")
    assert abs(float(metrics["train/ratio"]) - 1) > 1e-5
    _, metrics = run(family, base, lora, preserved, objective, diffuses=True)
    assert abs(float(metrics["train/ratio"]) - 1) > 1e-2


def test_cps_gradient_by_hand(family, base, lora, preserved):
    """At ratio 1: that of A mean (x_next - mean)^2, and of the exact KL, with the mean as the paper writes it."""
    objective = make_objective(rl="flow_grpo", beta_d=0.0, updates=1, draws=STEPS - 1, grpo_beta=0.3)
    state, metrics = run(family, base, lora, preserved, objective, diffuses=True, sde="cps")
    states = preserved.states["video"].reshape(STEPS + 1, ROWS, *family.latents["video"].shape)

    def means(weights, i):
        t, t_next = GRID[i], GRID[i + 1]
        v = family.denoise(base, weights, {"video": states[i]}, jnp.full(ROWS, t), preserved.task)["video"]
        clip, noise = states[i] - t * v, states[i] + (1 - t) * v
        return ((1 - t_next) * clip + np.sqrt(t_next**2 - TABLES["cps"][i] ** 2) * noise)[:, 1:]

    def direct(weights):
        total = 0.0
        for i in range(STEPS - 1):
            mean = means(weights, i)
            error = ((states[i + 1][:, 1:] - mean) ** 2).mean((1, 2, 3, 4))
            apart = ((mean - jax.lax.stop_gradient(means(None, i))) ** 2).mean((1, 2, 3, 4))
            total += (preserved.advantages * error + 0.3 * apart / (2 * TABLES["cps"][i] ** 2)).mean()
        return total / (STEPS - 1)

    expected = jax.jit(jax.grad(direct))(lora)
    jax.tree.map(
        lambda a, g: np.testing.assert_allclose(a, -g, rtol=2e-3, atol=1e-6), change(lora, state.lora), expected
    )
    assert float(metrics["train/kl"]) > 1e-4


def test_losses_by_step_are_logged_on_request_and_change_nothing_else(family, base, lora, noisy):
    objective = make_objective(rl="flow_grpo", beta_d=0.5, updates=2, draws=2, log_by_step=True, **PIECES)
    quiet = dataclasses.replace(objective, log_by_step=False)
    plain_state, plain = run(family, base, lora, noisy, quiet, diffuses=True)
    state, metrics = run(family, base, lora, noisy, objective, diffuses=True)
    jax.tree.map(np.testing.assert_array_equal, state.lora, plain_state.lora)
    assert metrics.keys() - plain.keys() == {
        f"train/{name}/step_{i}" for i in range(STEPS)
        for name in ("anchor", "rl", "ratio", "velocity_cosine", "velocity_norm_ratio", "velocity_dc")
    }  # fmt: skip
    by_step = {name: [float(metrics[f"train/{name}/step_{i}"]) for i in range(STEPS)] for name in ("ratio", "anchor")}
    assert np.isfinite(by_step["ratio"][:-1]).all() and np.isnan(by_step["ratio"][-1])  # the last step has no noise
    assert np.isfinite(by_step["anchor"]).all() and np.ptp(by_step["anchor"]) > 0.01


def test_a_figure_by_step_is_the_mean_over_all_rows_that_looked_there(family, base, lora, batch):
    """Six strata of four states: an update looks at some of them twice, so means of updates do not weigh alike."""
    settings = {"beta_d": 0.0, "updates": 3, "draws": 1, "tied": 1, "skip_first": False, "log_by_step": True}
    objective = make_objective(rl="awm", awm_old="current", **settings)
    _, metrics = run(family, base, lora, batch, objective)
    sums, counts = np.zeros(STEPS), np.zeros((3, STEPS))
    keys = jax.random.split(jax.random.fold_in(make_state(optax.sgd(1.0), lora).key, 0), 3)
    for update, key in enumerate(keys):
        looked = np.asarray(steps.draw_rows(key, objective, batch, GRID, None).renoised[0])
        np.add.at(sums, looked, -np.asarray(batch.advantages))  # at ratio 1 the surrogate is -A
        np.add.at(counts[update], looked, 1)
    assert counts.min() > 0 and (np.ptp(counts, axis=0) > 0).any()
    values = [float(metrics[f"train/rl/step_{i}"]) for i in range(STEPS)]
    np.testing.assert_allclose(values, sums / counts.sum(axis=0), atol=1e-6)
