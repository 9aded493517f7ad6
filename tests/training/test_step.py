"""The training step, through a network of one hidden layer; `test_train.py` has it with a transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import shape_of, velocity_of

from tests.training.toy import (
    GRID,
    PIECES,
    ROWS,
    STEPS,
    change,
    make_objective,
    make_state,
    make_step,
    renoised,
    run,
)
from world_distill.core import flow, losses, sampling
from world_distill.devices import cycles
from world_distill.devices.sharding import batch_sharding, make_mesh, replicated
from world_distill.training import step as steps
from world_distill.training import step_losses


@pytest.mark.parametrize(
    "old, pieces", [("current", {}), ("start", {"micro_batch": 3}), ("ema", PIECES)], ids=["current", "start", "ema"]
)
@pytest.mark.once
def test_awm_ratio_is_one_before_any_update(family, base, lora, batch, old, pieces):
    objective = make_objective(rl="awm", awm_old=old, updates=1, draws=2, **pieces)
    _, metrics = run(family, base, lora, batch, objective)
    assert abs(float(metrics["train/ratio"]) - 1) < 1e-6
    assert abs(float(metrics["train/ratio_max"]) - 1) < 1e-6


@pytest.mark.parametrize("pieces", [{}, PIECES], ids=["whole", "pieces"])
def test_flow_grpo_ratio_is_one_before_any_update(family, base, lora, noisy, pieces):
    objective = make_objective(rl="flow_grpo", updates=1, draws=STEPS - 1, **pieces)
    _, metrics = run(family, base, lora, noisy, objective, diffuses=True)
    assert abs(float(metrics["train/ratio"]) - 1) < 1e-6
    assert abs(float(metrics["train/ratio_max"]) - 1) < 1e-6
    # It is not one for another policy's rollouts: the test could fail.
    other = jax.tree.map(lambda x: 1.5 * x, lora)
    _, metrics = run(family, base, other, noisy, objective, diffuses=True)
    assert abs(float(metrics["train/ratio"]) - 1) > 1e-4


def test_anchor_alone_is_the_gradient_of_equation_11(family, base, lora, batch):
    objective = make_objective(rl="none", beta_d=2.0, updates=1, draws=STEPS)
    state, metrics = run(family, base, lora, batch, objective)

    def at(states, i):
        return {name: x[i] for name, x in states.items()}

    def frames(x):
        return x["video"].reshape(ROWS, *shape_of(family))

    def direct(lora):
        gaps = [
            jnp.mean((velocity_of(family)(base, lora, frames(at(batch.states, i)), jnp.full(ROWS, GRID[i]), batch.task)
                      - frames(at(batch.demonstrator, i)))[:, 1:] ** 2)
            for i in range(STEPS)
        ]  # fmt: skip
        return sum(gaps) / STEPS

    # With as many strata as grid steps, every visited state is drawn once: the mean is Eq. 11's.
    value, gradient = jax.jit(jax.value_and_grad(direct))(lora)
    expected = jax.tree.map(lambda g: -2.0 * g, gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3), change(lora, state.lora), expected
    )
    assert float(metrics["train/anchor"]) == pytest.approx(float(value), rel=1e-5)
    # The anchor needs no judgment.
    unjudged, _ = run(family, base, lora, batch.replace(valid=jnp.zeros(ROWS, bool)), objective)
    jax.tree.map(np.testing.assert_array_equal, unjudged.lora, state.lora)


def test_micro_batches_do_not_change_an_update(family, base, lora, batch):
    results = []
    for micro_batch in (0, 2):
        objective = make_objective(rl="awm", beta_d=0.5, updates=1, draws=2, micro_batch=micro_batch)
        results.append(run(family, base, lora, batch, objective)[0].lora)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), *results)
    with pytest.raises(ValueError, match="does not divide"):
        run(family, base, lora, batch, make_objective(micro_batch=4))


@pytest.mark.once
def test_micro_batches_send_no_rows_from_device_to_device(family, base, lora, batch):
    """A part takes rows of every device; a slice of neighbours would have all devices gather the whole batch."""
    mesh = make_mesh()
    rows = 2 * mesh.size

    def place(x, axis):
        shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=batch_sharding(mesh, axis))

    wide = steps._rows(batch, place)
    step = make_step(family, make_objective(rl="awm", updates=1, draws=1, micro_batch=mesh.size), 1.0, False)
    everywhere = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree
    )
    compiled = step.lower(everywhere(make_state(optax.sgd(1.0), lora)), everywhere(base), wide).compile()
    counts = cycles.estimate(compiled.as_text()).counts
    assert counts.keys() == {"all-reduce"}, counts


def test_devices_do_not_change_an_update(family, base, lora, batch):
    """Flow-GRPO, with the anchor; `test_train` has all of a step with AWM."""
    mesh, settings = make_mesh(), make_objective(rl="flow_grpo", beta_d=0.5, grpo_beta=0.1, updates=1)
    wide = steps._rows(batch, lambda x, axis: jnp.take(x, jnp.arange(mesh.size) % ROWS, axis=axis))
    placed = steps._rows(wide, lambda x, axis: jax.device_put(x, batch_sharding(mesh, axis)))
    (one, _), (other, _) = (
        run(family, jax.device_put(base, where), jax.device_put(lora, where), rows, settings, diffuses=True)
        for where, rows in ((jax.devices()[0], wide), (replicated(mesh), placed))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), one.lora, jax.device_get(other.lora))
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(change(lora, one.lora)))


@pytest.mark.once
def test_tied_rows_share_times_that_cover_the_grid(family, base, lora, batch):
    """Six equal rows in two blocks, two draws: four strata, so each of the four visited states counts once."""
    equal = lambda x, axis: jnp.repeat(jax.lax.slice_in_dim(x, 0, 1, axis=axis), ROWS, axis=axis)  # noqa: E731
    batch = steps._rows(batch, equal)
    apart = make_objective(rl="none", beta_d=1.0, updates=1, draws=2, tied=3)
    full = make_objective(rl="none", beta_d=1.0, updates=1, draws=STEPS)
    one, other = (run(family, base, lora, batch, objective)[0].lora for objective in (apart, full))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)
    with pytest.raises(ValueError, match="tied = 4 does not divide"):
        run(family, base, lora, batch, make_objective(tied=4))


def test_tied_rows_get_a_time_each_block(family, base, lora, batch, monkeypatch):
    """Blocks of one update look at different times, rows of a block at the same."""
    seen = []
    real = step_losses.each

    def spy(values, indices):
        jax.debug.callback(lambda i: seen.append(np.asarray(i)), indices)
        return real(values, indices)

    monkeypatch.setattr(step_losses, "each", spy)
    objective = make_objective(rl="none", beta_d=1.0, updates=6, draws=1, tied=2)
    jax.block_until_ready(run(family, base, lora, batch, objective))
    jax.effects_barrier()
    assert len(seen) == 2 * 6  # the states, and the Demonstrator's velocities there
    for indices in seen:
        assert indices.shape == (ROWS,) and 0 <= indices.min() and indices.max() < STEPS
        pairs = indices.reshape(3, 2)
        assert (pairs[:, 0] == pairs[:, 1]).all()
        assert len(set(pairs[:, 0])) >= 2
    assert len({tuple(i) for i in seen}) > 2  # and not the same in every update


@pytest.mark.once
def test_minibatches_take_turns(family, base, lora, batch):
    """For small steps, one update on each half is as good as two on the whole."""
    results = []
    for minibatches in (1, 2):
        objective = make_objective(rl="none", beta_d=1.0, updates=2, draws=STEPS, minibatches=minibatches)
        state, _ = run(family, base, lora, batch, objective, rate=1e-3)
        results.append(change(lora, state.lora))
    whole, halves = (np.concatenate([x.ravel() for x in jax.tree.leaves(r)]) for r in results)
    assert np.linalg.norm(halves - whole) < 1e-2 * np.linalg.norm(whole)
    # One update alone sees its half only.
    first = make_objective(rl="none", beta_d=1.0, updates=1, draws=STEPS, minibatches=2)
    state, _ = run(family, base, lora, batch, first)
    half = steps._rows(batch, lambda x, axis: jnp.take(x, jnp.arange(0, ROWS, 2), axis=axis))
    alone, _ = run(family, base, lora, half, make_objective(rl="none", beta_d=1.0, updates=1, draws=STEPS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.lora, alone.lora)
    with pytest.raises(ValueError, match="minibatches = 4 does not divide"):
        run(family, base, lora, batch, make_objective(minibatches=4))


@pytest.mark.once
def test_awm_raises_the_likelihood_of_what_was_good(family, base, lora, batch):
    objective = make_objective(rl="awm", beta_d=0.0, updates=1, draws=3, skip_first=True)
    state, _ = run(family, base, lora, batch, objective, rate=0.05)

    @jax.jit
    def errors(weights):
        total = 0.0
        for i, t in enumerate(GRID[1:-1]):
            keys = sampling.sample_keys(jax.random.key(100 + i), jnp.arange(ROWS))
            eps = sampling.initial_noise(keys, batch.task.scene, family.latents)
            x_t = flow.interpolate(batch.latents, eps, jnp.full(ROWS, t))
            v = family.denoise(base, weights, x_t, jnp.full(ROWS, t), batch.task)
            total += losses.velocity_gap(v, flow.velocity(batch.latents, eps), sampling.counted(family.latents))
        return total

    gain = np.asarray(errors(lora) - errors(state.lora))
    assert np.dot(gain, np.asarray(batch.advantages)) > 0


@pytest.mark.parametrize("rl, temperature", [("awm", 1.0), ("awm", 0.005), ("nft", 1.0)])
def test_rl_is_a_mean_over_judged_rows(family, base, lora, batch, rl, temperature):
    """Two judged rows of six weigh as much as six: rows without an advantage have no gradient of their own."""
    objective = make_objective(rl=rl, beta_d=0.0, updates=1, draws=3, awm_ratio_temperature=temperature)
    judged = jnp.arange(ROWS) < 2
    masked, _ = run(family, base, lora, batch.replace(valid=judged), objective)
    quiet = batch.replace(advantages=jnp.where(judged, batch.advantages, 0.0))
    whole, _ = run(family, base, lora, quiet, objective)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 3 * b, rtol=1e-4, atol=1e-7),
        change(lora, masked.lora), change(lora, whole.lora),
    )  # fmt: skip
    assert max(np.abs(x).max() for x in jax.tree.leaves(change(lora, masked.lora))) > 1e-5


@pytest.mark.once
def test_the_gradient_of_rl_does_not_depend_on_the_temperature(family, base, lora, batch):
    changes = []
    for temperature in (1.0, 0.005):
        objective = make_objective(rl="awm", beta_d=0.1, updates=1, draws=2, awm_ratio_temperature=temperature)
        state, metrics = run(family, base, lora, batch, objective)
        changes.append(change(lora, state.lora))
        assert float(metrics["train/rl_gradient_norm"]) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *changes)


def test_the_two_gradients_are_logged_as_they_are_weighted(family, base, lora, batch):
    def norm(beta_d, rl_weight):
        objective = make_objective(rl="awm", beta_d=beta_d, rl_weight=rl_weight, updates=1, draws=2)
        state, metrics = run(family, base, lora, batch, objective)
        metrics = {name.removeprefix("train/"): float(value) for name, value in metrics.items()}
        return np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(change(lora, state.lora)))), metrics

    (anchor, _), (rl, _), (both, metrics) = norm(0.5, 0.0), norm(0.0, 2.0), norm(0.5, 2.0)
    assert metrics["anchor_gradient_norm"] == pytest.approx(anchor, rel=1e-4)
    assert metrics["rl_gradient_norm"] == pytest.approx(rl, rel=1e-4)
    assert metrics["anchor_to_rl"] == pytest.approx(anchor / rl, rel=1e-4)
    assert metrics["gradient_norm"] == pytest.approx(both, rel=1e-4) and both < anchor + rl


@pytest.mark.once
@pytest.mark.parametrize("pieces", [{}, {"micro_batch": 2, "minibatches": 1, "tied": 2}], ids=["whole", "pieces"])
def test_the_demonstrator_is_the_same_in_a_table_and_where_it_is_read(family, base, lora, batch, pieces):
    objective = make_objective(rl="none", beta_d=1.0, updates=2, draws=2, **pieces)
    table, _ = run(family, base, lora, batch, objective)
    read, metrics = run(family, base, lora, batch.replace(demonstrator=None), objective)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), table.lora, read.lora)
    # Told the task in place of the solution it would be another one.
    other, _ = run(family, base, lora, batch.replace(demonstrator=None, solution=batch.task), objective)
    assert max(np.abs(x).max() for x in jax.tree.leaves(change(read.lora, other.lora))) > 1e-4


def test_nft_pulls_to_what_was_good(family, base, lora, batch):
    """One update by hand: the gradient of the loss at the old policy, at one time for all rows."""
    objective = make_objective(rl="nft", beta_d=0.0, updates=1, draws=1, nft_old="start")
    state, metrics = run(family, base, lora, batch, objective)
    assert float(metrics["train/policy_gap"]) == pytest.approx(0.0, abs=1e-12)
    t, x_t, target = renoised(family, batch, objective, lora)
    v_old = velocity_of(family)(base, lora, x_t, t, batch.task)
    error = (v_old - target)[:, 1:]
    scale = t * jnp.abs(error).mean((1, 2, 3, 4))

    def direct(weights):
        v = velocity_of(family)(base, weights, x_t, t, batch.task)[:, 1:]
        inner = 2 * (jax.lax.stop_gradient(error) * v).mean((1, 2, 3, 4))
        return (5 * batch.advantages * t**2 * inner / scale).mean()

    expected = jax.jit(jax.grad(direct))(lora)
    jax.tree.map(
        lambda a, g: np.testing.assert_allclose(a, -g, rtol=1e-3, atol=1e-6), change(lora, state.lora), expected
    )


@pytest.mark.once
def test_nft_pulls_back_to_its_old_policy(family, base, lora, batch):
    """Without an advantage the loss is least at the old policy: the one that rolled, or the fast average."""
    start = make_state(optax.sgd(0.01), lora).replace(lora_old=jax.tree.map(lambda x: 1.5 * x, lora))
    quiet = batch.replace(advantages=jnp.zeros(ROWS))
    moved = {}
    for old in ("start", "ema"):
        objective = make_objective(rl="nft", beta_d=0.0, updates=1, draws=2, nft_old=old)
        state, _ = make_step(family, objective, 0.01, False)(start, base, quiet)
        moved[old] = change(lora, state.lora)
        start = make_state(optax.sgd(0.01), lora).replace(lora_old=jax.tree.map(lambda x: 1.5 * x, lora))
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved["start"])) < 1e-7
    towards = sum(
        (d * 0.5 * np.asarray(x)).sum() for d, x in zip(*map(jax.tree.leaves, (moved["ema"], lora)), strict=True)
    )
    assert towards > 1e-6


def test_invalid_rows_and_zero_advantages_do_not_count(family, base, lora, batch):
    objective = make_objective(rl="awm", beta_d=0.0, updates=1, draws=2)
    state, _ = run(family, base, lora, batch.replace(advantages=jnp.zeros(ROWS)), objective)
    assert max(np.abs(x).max() for x in jax.tree.leaves(change(lora, state.lora))) == 0
    state, _ = run(family, base, lora, batch.replace(valid=jnp.zeros(ROWS, bool)), objective)
    assert max(np.abs(x).max() for x in jax.tree.leaves(change(lora, state.lora))) == 0
    # A masked row weighs nothing, whatever its advantage.
    valid = jnp.ones(ROWS, bool).at[0].set(False)
    one, _ = run(family, base, lora, batch.replace(valid=valid), objective)
    wild = batch.replace(valid=valid, advantages=batch.advantages.at[0].set(100.0))
    other, _ = run(family, base, lora, wild, objective)
    jax.tree.map(np.testing.assert_array_equal, one.lora, other.lora)


def test_schedules_follow_the_step(family, base, lora, batch):
    objective = make_objective(rl="none", beta_d=((0, 4.0), (10, 0.0)), updates=1)
    step = make_step(family, objective, 0.0, False)
    for count, expected in ((0, 4.0), (5, 2.0), (50, 0.0)):
        state = make_state(optax.sgd(0.0), lora).replace(step=jnp.asarray(count, jnp.int32))
        state, metrics = step(state, base, batch)
        assert float(metrics["train/beta_d"]) == pytest.approx(expected)
        assert int(state.step) == count + 1


def test_averages_trail_the_weights(family, base, lora, batch):
    objective = make_objective(rl="none", beta_d=1.0, updates=3, ema_decay=0.5, old_slope=0.2, old_maximum=0.3)
    state, _ = run(family, base, lora, batch, objective, rate=0.1)
    leaf = lambda tree: np.asarray(tree["out"]["a"])  # noqa: E731
    moved = np.abs(leaf(state.lora) - leaf(lora)).max()
    assert 0 < np.abs(leaf(state.lora_ema) - leaf(state.lora)).max() < moved
    # lora_old = 0.2 old + 0.8 new after the first step
    np.testing.assert_allclose(leaf(state.lora_old), 0.2 * leaf(lora) + 0.8 * leaf(state.lora), atol=1e-6)


@pytest.mark.parametrize("field", ["beta_old", "beta_base", "grpo_beta"])
def test_other_anchors_pull_towards_their_reference(family, base, lora, noisy, field):
    rl = "flow_grpo" if field == "grpo_beta" else "awm"
    batch = noisy.replace(advantages=jnp.zeros(ROWS))
    objective = make_objective(rl=rl, beta_d=0.0, updates=1, draws=2, **{field: 1.0})
    step = make_step(family, objective, 0.01, True)
    state = make_state(optax.sgd(0.01), lora)
    state = state.replace(lora_old=jax.tree.map(jnp.zeros_like, lora))
    name = {"beta_old": "old", "beta_base": "base", "grpo_beta": "kl"}[field]
    values = []
    for _ in range(2):
        state, metrics = step(state.replace(step=jnp.zeros((), jnp.int32)), base, batch)
        values.append(float(metrics[f"train/{name}"]))
    assert 0 < values[1] < values[0]
