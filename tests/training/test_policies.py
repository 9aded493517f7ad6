"""Which policy, which text and which key a loss of the training step reads, through the network of `toy.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small import small_config
from streams import velocity_of

from tests.training.toy import GRID, ROWS, change, make_objective, make_state, make_step, renoised, run
from world_distill.devices.sharding import make_mesh
from world_distill.training import step as steps
from world_distill.training.step_programs import make_programs


def leaf(tree) -> np.ndarray:
    return np.asarray(tree["out"]["a"])


def test_the_slow_average_by_hand(family, base, lora, batch):
    """Two updates: decays 1/10 and 2/11 while it warms up."""
    objective = make_objective(rl="none", beta_d=1.0, updates=1, draws=2, ema_decay=0.9)
    step, states = make_step(family, objective, 0.1, False), [make_state(optax.sgd(0.1), lora)]
    before = leaf(lora)
    states.append(step(states[0], base, batch)[0])
    first = leaf(states[1].lora)
    average = first + 0.1 * (before - first)
    np.testing.assert_allclose(leaf(states[1].lora_ema), average, atol=1e-6)
    second_state = step(states[1], base, batch)[0]
    second = leaf(second_state.lora)
    np.testing.assert_allclose(leaf(second_state.lora_ema), second + 2 / 11 * (average - second), atol=1e-6)
    assert np.abs(second - first).max() > 1e-4 and np.abs(first - before).max() > 1e-4


def test_the_slow_average_within_a_step(family, base, lora, batch):
    """It counts updates: after two, weights that stay put are where they were, and its decay is that of two."""
    objective = make_objective(rl="none", beta_d=1.0, updates=2, draws=2, ema_decay=0.9)
    start = make_state(optax.sgd(0.0), lora).replace(lora_ema=jax.tree.map(lambda x: 3.0 * x, lora))
    state, _ = make_step(family, objective, 0.0, False)(start, base, batch)
    np.testing.assert_allclose(leaf(state.lora_ema), leaf(lora) * (1 + 2 * (1 / 10) * (2 / 11)), rtol=1e-5)


def test_awm_by_hand(family, base, lora, batch):
    """One draw: the gradient of A t m with the `t` weighting, on free frames."""
    objective = make_objective(rl="awm", beta_d=0.0, updates=1, draws=1, awm_weighting="t", awm_old="start")
    state, _ = run(family, base, lora, batch, objective)
    t, x_t, target = renoised(family, batch, objective, lora)

    def direct(weights):
        error = (velocity_of(family)(base, weights, x_t, t, batch.task) - target)[:, 1:]
        return (batch.advantages * t * (error**2).mean((1, 2, 3, 4))).mean()

    by_hand = jax.tree.map(jnp.negative, jax.jit(jax.grad(direct))(lora))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), change(lora, state.lora), by_hand)


def test_rows_draws_and_steps_have_noise_of_their_own(family, base, lora, batch):
    objective = make_objective(draws=3)
    draw = steps.draw_rows(jax.random.key(0), objective, batch, GRID, None)
    keys = np.asarray(jax.random.key_data(draw.keys)).reshape(3 * ROWS, -1)
    assert len(np.unique(keys, axis=0)) == 3 * ROWS
    objective = make_objective(rl="awm", beta_d=0.0, updates=2, draws=1)
    step = make_step(family, objective, 1e-3, False)
    moved = []
    for number in (0, 0, 1):
        state = make_state(optax.sgd(1e-3), lora).replace(step=jnp.asarray(number, jnp.int32))
        moved.append(leaf(step(state, base, batch)[0].lora) - leaf(lora))
    np.testing.assert_array_equal(moved[0], moved[1])
    assert np.abs(moved[2] - moved[0]).max() > 1e-2 * np.abs(moved[0]).max()


def ratio_of(family, base, lora, batch, old, **changes):
    objective = make_objective(rl="awm", beta_d=0.0, updates=1, draws=2, awm_old=old)
    state = make_state(optax.sgd(1.0), lora).replace(**changes)
    state, metrics = make_step(family, objective, 1.0, False)(state, base, batch)
    return abs(float(metrics["train/ratio"]) - 1), state


def test_the_ratio_is_to_the_policy_that_is_named(family, base, lora, batch):
    other = lambda: jax.tree.map(lambda x: 1.5 * x, lora)  # noqa: E731  (a step gives away its buffers)
    assert ratio_of(family, base, lora, batch, "start")[0] < 1e-6
    assert ratio_of(family, base, lora, batch, "ema")[0] < 1e-6
    assert ratio_of(family, base, lora, batch, "ema", lora_old=other())[0] > 1e-3
    assert ratio_of(family, base, lora, batch, "start", lora_old=other())[0] < 1e-6
    # Where rollouts run a step ahead, the policy that made them is the one of a step ago.
    moved, state = ratio_of(family, base, lora, batch, "start", lora_rolled=other())
    assert moved > 1e-3
    np.testing.assert_array_equal(leaf(state.lora_rolled), leaf(lora))


def test_the_base_is_told_the_task_and_the_demonstrator_the_solution(family, base, lora, batch, noisy):
    """An Executor that equals the base is at no distance from it, told the same; and from the Demonstrator it is."""
    fresh = jax.tree.map(jnp.zeros_like, lora)
    objective = make_objective(
        rl="awm", beta_d=1.0, anchor_states="renoised", updates=1, draws=2, beta_base=1.0, beta_old=1.0
    )
    _, metrics = run(family, base, fresh, batch, objective)
    assert float(metrics["train/base"]) < 1e-10 and float(metrics["train/old"]) < 1e-10
    assert float(metrics["train/anchor"]) > 1e-3
    _, alike = run(family, base, fresh, batch.replace(solution=batch.task), objective)
    assert float(alike["train/anchor"]) < 1e-10
    objective = make_objective(rl="flow_grpo", beta_d=0.0, grpo_beta=1.0, updates=1, draws=2)
    _, metrics = run(family, base, fresh, noisy, objective, diffuses=True)
    assert float(metrics["train/kl"]) < 1e-10
    _, metrics = run(family, base, lora, noisy, objective, diffuses=True)
    assert float(metrics["train/kl"]) > 1e-4


def test_the_learning_rate_follows_training_steps_and_not_updates(tmp_path):
    rates = {"optimizer.learning_rate": ((0, 1e-3), (2, 0.0)), "objective.updates": 2, "optimizer.eps": 1e-12}
    made = make_programs(small_config(tmp_path, **rates), make_mesh(devices=jax.devices()[:1]))
    weights = jax.tree.map(lambda x: jnp.zeros(x.shape), made.state.lora)
    state, sizes = made.optimizer.init(weights), []
    for _ in range(5):
        changes, state = made.optimizer.update(jax.tree.map(jnp.ones_like, weights), state, weights)
        sizes.append(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(changes)))
    np.testing.assert_allclose(sizes, [1e-3, 1e-3, 5e-4, 5e-4, 0.0], rtol=1e-3, atol=1e-9)
