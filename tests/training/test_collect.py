"""Collecting experience: which tasks a step has, what is rolled from them, and what rewards become."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_weights, redraw, small_config
from streams import counts_of, shape_of, tokens, velocity_of

from world_distill.core import losses, sampling
from world_distill.data.records.batches import TaskBatch
from world_distill.devices import hosts
from world_distill.devices.sharding import make_mesh
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective, Phase
from world_distill.settings.rollout import RolloutSettings
from world_distill.structs import Judgment, TrainBatch
from world_distill.training.collect import Collector, Judged, Pending, draw_tasks
from world_distill.training.step_programs import make_programs


def collection(**changes) -> RolloutSettings:
    settings = RolloutSettings(**load_config("sandbox").rollout.to_dict())
    return dataclasses.replace(settings, tasks=2, group=3, **changes)


class Tasks:
    """As much of `TaskBatches` as drawing needs: task i of the order is called r{i}."""

    def __init__(self):
        self.next = 0

    def take(self, needed, *, draws):
        first, self.next = 2 * self.next, self.next + draws
        return {"ids": [f"r{first + i}" for i in np.unique(needed)], "count": 2 * draws}


MESH = make_mesh(devices=jax.devices()[:1])


def test_every_rollout_has_a_task_of_its_own_while_there_is_no_rl():
    tasks, settings = Tasks(), collection(spread=True)
    alone = draw_tasks(settings, MESH, tasks, active=False)
    assert alone["ids"] == [f"r{i}" for i in range(6)]
    assert settings.group_in(False) * alone["count"] == 6
    grouped = draw_tasks(settings, MESH, tasks, active=True)  # goes on where that stopped: no task is passed over
    assert grouped["ids"] == ["r6", "r7"]
    assert settings.group_in(True) * grouped["count"] == 6


@pytest.mark.parametrize("active", [True, False])
def test_groups_stay_together_where_that_is_asked_for(active):
    settings = collection(spread=False)
    assert draw_tasks(settings, MESH, Tasks(), active)["ids"] == ["r0", "r1"] and settings.group_in(active) == 3


@pytest.mark.parametrize("active, expected", [(True, ["r1"]), (False, ["r2", "r3"])])
def test_a_process_draws_the_tasks_of_the_rollouts_that_its_devices_hold(active, expected, monkeypatch):
    monkeypatch.setattr(hosts, "rows_held", lambda count, sharding: np.arange(count)[4:] - (0 if active else 2))
    assert draw_tasks(collection(spread=True), MESH, Tasks(), active)["ids"] == expected


# ---- Rollouts against direct calls of the model

STEPS, TASKS, GROUP = 3, 2, 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory, {"rollout.weights.distill": 1.0, "rollout.distill_min_time": 0.85})


def make(tmp_path_factory, changes, mesh=MESH):
    """(programs of a tiny model, base, Executor, tasks): every weight and text is random."""
    config = small_config(
        tmp_path_factory.mktemp("run"),
        **{
            "model.width": 16, "model.heads": 1, "model.depth": 1, "sampler.steps": STEPS, "sampler.shift": 4.0,
            "rollout.tasks": TASKS, "rollout.group": GROUP, "text_length": 4,
        } | changes,
    )  # fmt: skip
    programs = make_programs(config, mesh)
    rng = np.random.default_rng(0)
    scene = {"video": np.float32(rng.normal(size=(TASKS, 1, *shape_of(programs.family)[1:])))}
    texts = {}
    for role in ("task", "solution"):
        states = np.float32(rng.normal(size=(TASKS, 4, 64)))
        texts[role] = tokens(states, np.arange(4)[None] < rng.integers(1, 5, size=(TASKS, 1)))
    words, weight = ["a", "b"], np.ones(TASKS, np.float32)
    tasks = TaskBatch(
        *[words] * 6, image_png=[b""] * 2, scene=scene, texts=texts, numbers=np.arange(2), count=2, weight=weight
    )
    base = random_weights(programs.family, 1)
    lora = redraw(programs.state.lora, 2)
    return programs, base, lora, tasks


def begin(made, step=0):
    programs, base, lora, tasks = made
    collector = Collector(programs, judge=None, cache=None, rubric=None)
    return collector.begin(lora, base, tasks, jax.random.key(7), step)


def test_the_executor_rolls_told_the_task_and_the_demonstrator_watches_told_the_solution(made):
    programs, base, lora, tasks = made
    family = programs.family
    pending = begin(made)
    batch, grid = pending.batch, np.asarray([1.0, 8 / 9, 2 / 3, 0.0])  # shift 4
    states = np.asarray(batch.states["video"]).reshape(STEPS + 1, -1, *shape_of(family))
    row = [0, 0, 1, 1]  # rollouts of a task are neighbours
    for role, given in (("task", batch.task), ("solution", batch.solution)):
        np.testing.assert_array_equal(given.text["text"].states, tasks.texts[role]["text"].states[row])
        np.testing.assert_array_equal(given.text["text"].mask, tasks.texts[role]["text"].mask[row])
        np.testing.assert_array_equal(given.scene["video"], tasks.scene["video"][row])
    keys = sampling.sample_keys(jax.random.fold_in(jax.random.key(7), 0), jnp.arange(4))
    noise = sampling.initial_noise(keys, batch.task.scene, family.latents)
    np.testing.assert_array_equal(states[0], noise["video"])
    gaps = []
    for i in range(STEPS):
        x, t = jnp.asarray(states[i]), jnp.full(4, grid[i], jnp.float32)
        v = velocity_of(family)(base, lora, x, t, batch.task)
        np.testing.assert_allclose(states[i + 1], x + (grid[i + 1] - grid[i]) * v, atol=2e-4)
        v_d = velocity_of(family)(base, None, x, t, batch.solution)
        np.testing.assert_allclose(np.asarray(batch.demonstrator["video"][i]).reshape(v_d.shape), v_d, atol=2e-4)
        gaps.append(np.asarray(losses.velocity_gap(v, v_d, counts_of(family))))
    # Eq. 9 over t >= .85: all of the first step, and a part of the second.
    expected = -((1 - 8 / 9) * gaps[0] + (8 / 9 - 0.85) * gaps[1])
    np.testing.assert_allclose(pending.reward, expected, rtol=1e-3)
    assert np.ptp(pending.reward) > 1e-3
    moved = np.sqrt(np.mean(np.diff(np.asarray(batch.latents["video"]), axis=1) ** 2, axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(pending.motion, moved, rtol=1e-4)


def test_off_policy_the_demonstrator_rolls_and_its_own_velocities_are_the_targets(tmp_path_factory):
    made = make(tmp_path_factory, {"objective.rl": "none", "rollout.role": "demonstrator", "rollout.spread": False})
    family, base = made[0].family, made[1]
    batch = begin(made).batch
    states = np.asarray(batch.states["video"]).reshape(STEPS + 1, -1, *shape_of(family))
    v = velocity_of(family)(base, None, jnp.asarray(states[0]), jnp.ones(4), batch.solution)
    np.testing.assert_allclose(states[1], states[0] + (8 / 9 - 1) * v, atol=2e-4)
    np.testing.assert_allclose(np.asarray(batch.demonstrator["video"][0]).reshape(v.shape), v, atol=2e-4)
    told_the_task = velocity_of(family)(base, None, jnp.asarray(states[0]), jnp.ones(4), batch.task)
    assert np.abs(v - told_the_task).max() > 1e-2


def test_what_is_kept_of_all_rollouts_lies_once_on_the_devices_that_share_a_clip(tmp_path_factory):
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    spread = begin(make(tmp_path_factory, {"model.heads": 2, "rollout.weights.distill": 1.0}, mesh)).batch
    for kept in (spread.states["video"], spread.demonstrator["video"]):
        k, b, n, p = kept.shape
        assert kept.sharding.shard_shape(kept.shape) == (k, b // 2, n, p // 4)
    for told in (spread.task, spread.solution):
        b, length, width = told.text["text"].states.shape
        assert told.text["text"].states.sharding.shard_shape((b, length, width)) == (b // 2, length // 4, width)
    alone = begin(make(tmp_path_factory, {"model.heads": 2, "rollout.weights.distill": 1.0})).batch
    for field in ("states", "demonstrator", "task", "solution", "latents"):
        for x, y in zip(*(jax.tree.leaves(getattr(batch, field)) for batch in (spread, alone)), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-4)


def test_rollouts_of_a_task_and_of_two_steps_differ(made):
    first, again, second = (np.asarray(begin(made, step).batch.states["video"]) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    apart = [np.abs(first[0, i] - first[0, j]).max() for i in range(4) for j in range(i)]
    apart += [np.abs(first[0, i] - second[0, j]).max() for i in range(4) for j in range(4)]
    assert min(apart) > 0.1


# ---- From judgments to advantages


def weigh(scores: dict, *, reward=None, distilling=False, **changes):
    """(advantages, used, info) of 2 tasks with 3 rollouts each, whose clips have these log-odds."""
    settings = collection(**changes)
    objective = section(load_config("sandbox").objective, Objective)
    programs = types.SimpleNamespace(
        rollout_settings=settings, objective=objective, mesh=make_mesh(devices=jax.devices()[:1]),
        roll=None, decode=None, demonstrate=None,
    )  # fmt: skip
    collector = Collector(programs, judge=None, cache=None, rubric=None)
    scores = {name: np.float64(values) for name, values in scores.items()}
    valid = np.isfinite(np.stack(list(scores.values()))).all(0)
    order = np.random.default_rng(0).permutation(6)  # clips come back in any order, with their numbers
    judged = Judged(order, Judgment({n: v[order] for n, v in scores.items()}, valid[order]), {"judge/x": 1.0})
    batch = TrainBatch(**{f.name: None for f in dataclasses.fields(TrainBatch)})
    tasks = types.SimpleNamespace(ids=["a", "b"], count=2)
    pending = Pending(
        step=0, phase=Phase(not distilling, True), tasks=tasks, batch=batch, clips=None,
        reward=None if reward is None else jnp.float32(reward), motion=jnp.arange(6.0), started=0.0,
    )  # fmt: skip
    batch, info = collector.weigh(pending, judged)
    return np.asarray(batch.advantages), np.asarray(batch.valid), info


QUIET = {"agent": [0.0] * 6, "consistency": [0.0] * 6}


def test_rewards_are_compared_within_the_rollouts_of_a_task():
    """Rows 0 to 2 are the first task's: its worst rollout is better than the other task's best."""
    advantages, used, info = weigh({"task": [2.0, 1.0, 3.0, -2.0, -2.5, -1.5]} | QUIET, std="none")
    np.testing.assert_allclose(advantages, np.array([0, -1, 1, 0, -0.5, 0.5]) / 5, atol=1e-7)
    assert used.all() and info["judge/used"] == 1.0 and info["judge/x"] == 1.0
    assert info["rate/task"] == 0.5 and info["reward/task"] == pytest.approx(0.0)
    assert info["within_group/task~total"] == pytest.approx(1.0)
    assert info["within_group/task~motion"] == pytest.approx(
        np.corrcoef([0, -1, 1, 0, -0.5, 0.5], [-1, 0, 1, -1, 0, 1])[0, 1]
    )


def test_questions_are_clipped_weighted_and_divided_as_the_settings_say():
    scores = {"task": [9.0, 0, 0, 0, 0, 0], "agent": [0, 2.0, 0, 0, 0, 0], "consistency": [0, 0, 1.0, 0, 0, 0]}
    weights = {"task": 1.0, "agent": 0.5, "consistency": 4.0, "distill": 0.0}
    advantages, _, _ = weigh(scores, std="none", clip=3.0, weights=weights)
    np.testing.assert_allclose(advantages[:3], (np.array([3, 1, 4]) - 8 / 3) / 5, atol=1e-7)
    scaled, _, _ = weigh(scores, std="none", clip=3.0, weights=weights, negative_scale=0.25)
    np.testing.assert_allclose(scaled, np.where(advantages < 0, advantages / 4, advantages), atol=1e-7)
    floored, _, _ = weigh(scores, std="group", std_floor=10.0, clip=3.0, weights=weights)
    np.testing.assert_allclose(floored[:3], advantages[:3] / 10, rtol=1e-4)


def test_equation_9_is_a_reward_beside_the_judges():
    still, _, _ = weigh({"task": [0.0] * 6} | QUIET, std="none")
    assert not still.any()
    weights = {"task": 1.0, "agent": 1.0, "consistency": 1.0, "distill": 10.0}
    reward = [-0.3, -0.2, -0.1, -0.2, -0.2, -0.2]
    advantages, _, info = weigh({"task": [0.0] * 6} | QUIET, std="none", reward=reward, weights=weights)
    np.testing.assert_allclose(advantages, np.array([-1, 0, 1, 0, 0, 0]) / 5, atol=1e-6)
    assert info["reward/distill"] == pytest.approx(-0.2) and info["within_group/distill~total"] == pytest.approx(1)


def test_a_clip_without_a_judgment_is_left_out_of_its_group_and_of_the_means():
    bad = float("nan")
    advantages, used, info = weigh({"task": [1.0, bad, 3.0, bad, bad, 1.0]} | QUIET, std="none")
    np.testing.assert_allclose(advantages, np.array([-1, 0, 1, 0, 0, 0]) / 5, atol=1e-7)
    assert used.tolist() == [True, False, True, False, False, False]  # one judgment makes no group
    assert info["judge/invalid"] == 0.5 and info["judge/used"] == pytest.approx(1 / 3)
    assert info["reward/task"] == pytest.approx(5 / 3)


def test_a_step_without_rl_needs_no_judgment():
    advantages, used, info = weigh({"task": [5.0, 0, 0, 0, 0, 0]} | QUIET, distilling=True, spread=False)
    assert not advantages.any() and used.all() and "reward/total" not in info
