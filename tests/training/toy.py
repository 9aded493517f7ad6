"""A network of one hidden layer and a batch for it: what a training step needs, and no more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from streams import shape_of, told, video

from world_distill.core import flow, sampling
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.structs import TrainBatch, TrainState
from world_distill.training import step as steps

ROWS, STEPS = 6, 4
GRID = flow.sampling_times(STEPS, 3.0)
DIFFUSION = sampling.flow_grpo_diffusion(GRID, 0.7)
TABLES = {"flow_grpo": DIFFUSION, "cps": sampling.cps_diffusion(GRID, 0.8)}


class Network:
    """As much of `interfaces.ModelFamily` as a training step sees."""

    latents = video((3, 4, 4, 2), [0, 1, 1])
    shapes = {"pixel": (2, 16), "clip": (16, 16), "text": (8, 16), "time": (16,), "out": (16, 2)}

    def denoise(self, base, lora, x_t, t, condition):
        free, text = self.latents["video"].moves, condition.text["text"].states
        x = jnp.concatenate([condition.scene["video"], x_t["video"][:, 1:]], axis=1)
        time = (t[:, None] * free)[:, :, None, None, None] * base["time"]
        h = jnp.tanh(x @ base["pixel"] + time + (text.mean(1) @ base["text"])[:, None, None, None])
        h = h + jnp.tanh(h.mean((1, 2, 3)) @ base["clip"])[:, None, None, None]
        out = base["out"] if lora is None else base["out"] + lora["out"]["a"] @ lora["out"]["b"]
        return {"video": h @ out * free[:, None, None, None]}


def make_objective(**changes) -> Objective:
    settings = section(load_config("sandbox").objective, Objective)
    return dataclasses.replace(
        settings, **{"rl_weight": 1.0, "awm_ratio_temperature": 1.0, "minibatches": 1, "tied": 0, **changes}
    )


def appended(states, last):
    return jnp.concatenate([states, last[None]])


def flat(latents):
    return jax.tree.map(lambda x: x.reshape(*x.shape[:3], -1), latents)


def make_batch(family, base, lora, diffusion=None, sde="flow_grpo") -> TrainBatch:
    @jax.jit
    def make(base, lora, key):
        f, h, w, c = shape_of(family)
        scene = jax.random.normal(key, (ROWS, 1, h, w, c))
        mask = jnp.ones((ROWS, 3), bool)
        task, solution = (
            told(jax.random.normal(jax.random.fold_in(key, i), (ROWS, 3, 8)), mask, scene) for i in (1, 2)
        )
        rollout = sampling.rollout(
            family.denoise, base, lora, task, sampling.sample_keys(key, jnp.arange(ROWS)), times=GRID,
            streams=family.latents, diffusion=diffusion, sde=sde, keep_states=True,
        )  # fmt: skip
        shown = jax.lax.map(
            lambda job: family.denoise(base, None, job[0], jnp.full(ROWS, job[1]), solution),
            (rollout.states, jnp.asarray(GRID[:-1])),
        )
        return TrainBatch(
            task=task, solution=solution, latents=rollout.latents,
            states=flat(jax.tree.map(appended, rollout.states, rollout.latents)), demonstrator=flat(shown),
            log_probs=rollout.log_probs, advantages=jnp.array([1.0, -1.0, 0.5, -0.5, 0.2, -0.2]),
            valid=jnp.ones(ROWS, bool),
        )  # fmt: skip

    return make(base, lora, jax.random.key(5))


def make_state(optimizer, lora):
    copy = lambda: jax.tree.map(jnp.copy, lora)  # noqa: E731
    return TrainState(jnp.zeros((), jnp.int32), copy(), copy(), copy(), optimizer.init(lora), jax.random.key(9))


@functools.cache
def make_step(family, objective, rate, diffuses, sde="flow_grpo"):
    """The jitted training step, with plain gradient descent; one for all tests of the same settings."""
    table = TABLES[sde] if diffuses else None
    return jax.jit(steps.make_train_step(family, objective, optax.sgd(rate), GRID, table, sde=sde))


def run(family, base, lora, batch, objective, rate=1.0, diffuses=False, sde="flow_grpo"):
    return make_step(family, objective, rate, diffuses, sde)(make_state(optax.sgd(rate), lora), base, batch)


def change(before, after):
    return jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), before, after)


PIECES = {"tied": 1, "minibatches": 2, "micro_batch": 1}


def renoised(family, batch, objective, lora):
    """(times, noisy clips, their velocities' target), of the stream "video", of a first update with one draw."""
    key = jax.random.split(jax.random.fold_in(make_state(optax.sgd(1.0), lora).key, 0), 1)[0]
    draw = steps.draw_rows(key, objective, batch, GRID, None)
    t = jnp.asarray(GRID)[draw.renoised[0]]
    eps = sampling.initial_noise(draw.keys[0], batch.task.scene, family.latents)
    x_t = sampling.pin(flow.interpolate(batch.latents, eps, t), batch.task.scene, family.latents)
    return t, x_t["video"], flow.velocity(batch.latents, eps)["video"]
