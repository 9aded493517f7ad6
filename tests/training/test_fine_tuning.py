"""Supervised fine-tuning as a training step: plain flow matching on the clips of the batch, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import velocity_of

from tests.training.toy import GRID, PIECES, ROWS, STEPS, change, make_objective, make_state, make_step, run
from world_distill.core import sampling
from world_distill.settings.objective import Objective
from world_distill.structs import TrainBatch
from world_distill.training import step as steps

SFT = {"kind": "sft", "rl": "none", "beta_d": 0.0, "updates": 1, "draws": 1}


@pytest.fixture
def clips(batch) -> TrainBatch:
    """As `Collector` makes them of records: without anything that a rollout or the Demonstrator gives."""
    none = {f.name: None for f in dataclasses.fields(TrainBatch)}
    return TrainBatch(**none | {"task": batch.task, "latents": batch.latents, "valid": jnp.ones(ROWS, bool)})


def drawn(batch, objective: Objective, lora):
    key = jax.random.split(jax.random.fold_in(make_state(optax.sgd(1.0), lora).key, 0), 1)[0]
    return steps.draw_rows(key, objective, batch, GRID, None)


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_the_step_is_the_gradient_of_flow_matching_on_the_clips(family, base, lora, clips, power):
    objective = make_objective(**SFT, sft_shift=3.0, sft_power=power, tied=1)
    state, metrics = run(family, base, lora, clips, objective)
    draw = drawn(clips, objective, lora)
    t, clean = draw.times[0], clips.latents["video"]
    assert len(set(np.asarray(t).tolist())) == ROWS
    eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), clean.shape[1:]))(draw.keys[0])
    np.testing.assert_array_equal(eps[:, 1:], sampling.draw_noise(draw.keys[0], 0, family.latents)["video"][:, 1:])
    time = t[:, None, None, None, None]
    x_t = ((1 - time) * clean + time * eps).at[:, :1].set(clips.task.scene["video"])

    def direct(lora):
        v = velocity_of(family)(base, lora, x_t, t, clips.task)
        errors = jnp.mean((v - (eps - clean))[:, 1:] ** 2, axis=(1, 2, 3, 4))  # the first frame is the scene
        return jnp.mean(t**power * errors), jnp.mean(errors)

    gradient, value = jax.grad(direct, has_aux=True)(lora)
    expected = jax.tree.map(lambda g: -g, gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3), change(lora, state.lora), expected
    )
    assert float(metrics["train/sft"]) == pytest.approx(float(value), rel=1e-5)
    assert not {name for name in metrics if "anchor" in name or name == "train/rl"}


def test_what_lies_at_the_pinned_places_of_the_clips_does_not_matter(family, base, lora, clips):
    class Looking(type(family)):
        """Takes the scene from the noisy latents, as other families might."""

        def denoise(self, base, lora, x_t, t, condition):
            v = super().denoise(base, lora, x_t, t, condition)["video"]
            return {"video": v * (1 + x_t["video"][:, :1].mean())}

    objective, looking = make_objective(**SFT), Looking()
    other = clips.replace(latents={"video": clips.latents["video"].at[:, 0].set(7.0)})
    one, another = (run(looking, base, lora, batch, objective) for batch in (clips, other))
    jax.tree.map(np.testing.assert_array_equal, one[0].lora, another[0].lora)
    assert one[1]["train/sft"] == another[1]["train/sft"]


def test_the_demonstrator_is_never_computed(family, base, lora, clips):
    class Watched(type(family)):
        def denoise(self, base, lora, x_t, t, condition):
            assert lora is not None
            return super().denoise(base, lora, x_t, t, condition)

    _, metrics = run(Watched(), base, lora, clips, make_objective(**SFT))
    assert metrics["train/gradient_norm"] > 0


@pytest.mark.parametrize("pieces", [PIECES, {"micro_batch": 2, "draws": 2}], ids=["parts", "micro"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(family, base, lora, clips, pieces):
    objective = make_objective(**{**SFT, **pieces})
    whole = dataclasses.replace(objective, micro_batch=0)
    one, other = (run(family, base, lora, clips, settings)[0].lora for settings in (objective, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)


def test_many_updates_bring_the_loss_down(family, base, lora, clips):
    # The same noise in every step, as the key does not change: only learning lowers the loss.
    objective = make_objective(**{**SFT, "draws": 4})
    state, first = run(family, base, lora, clips, objective, rate=0.3)
    for _ in range(20):
        state = dataclasses.replace(state, step=jnp.zeros((), jnp.int32))
        state, last = make_step(family, objective, 0.3, False)(state, base, clips)
    assert last["train/sft"] < 0.9 * first["train/sft"]


def test_times_of_the_grid_are_the_samplers(clips, lora):
    objective = make_objective(**{**SFT, "draws": 8}, sft_times="grid", skip_first=True, tied=1)
    draw = drawn(clips, objective, lora)
    np.testing.assert_array_equal(np.unique(draw.times), np.sort(GRID[1:-1]))  # neither pure noise nor data
    np.testing.assert_array_equal(GRID[np.asarray(draw.renoised)], draw.times)


@pytest.mark.parametrize("law", ["uniform", "logit_normal", "stretched"])
def test_times_between_the_samplers_belong_to_the_step_that_passes_them(clips, lora, law):
    objective = make_objective(**{**SFT, "draws": 16}, sft_times=law, sft_shift=2.0, tied=1)
    draw = drawn(clips, objective, lora)
    at, t = np.asarray(draw.renoised), np.asarray(draw.times)
    assert at.min() >= 0 and at.max() < STEPS and len(np.unique(at)) == STEPS
    assert ((GRID[at + 1] < t) & (t <= GRID[at])).all()


def test_times_are_dealt_out_at_random(clips, lora):
    """Strata rise with their number; a row has to see them all over many draws."""
    objective = make_objective(**{**SFT, "draws": 16}, tied=1)
    t = np.asarray(drawn(clips, objective, lora).times)
    assert np.abs(t.mean(axis=0) - 0.5).max() < 0.25 and np.abs(t.mean(axis=1) - 0.5).max() < 0.35
    together = np.asarray(drawn(clips, dataclasses.replace(objective, tied=0), lora).times)
    assert (together == together[:, :1]).all() and len(np.unique(together)) == 16


def test_losses_are_logged_by_the_step_of_the_sampler(family, base, lora, clips):
    _, metrics = run(family, base, lora, clips, make_objective(**{**SFT, "draws": 8}, log_by_step=True, tied=1))
    means = [float(metrics[f"train/sft/step_{i}"]) for i in range(STEPS)]
    assert np.isfinite(means).all() and min(means) <= metrics["train/sft"] <= max(means)
