"""The count of forward passes that "equal compute" rests on, against the calls that a training step really makes."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from small import small_config
from streams import shape_of, tokens, told

from world_distill.devices import flops
from world_distill.devices.sharding import make_mesh
from world_distill.models.tiny.family import TinyFamily
from world_distill.settings.objective import Phase
from world_distill.training import forwards, step_programs
from world_distill.training.collect import Collector

SMALLEST = {
    "model.width": 16, "model.heads": 1, "model.depth": 1, "sampler.steps": 5, "rollout.tasks": 2, "rollout.group": 2,
    "objective.updates": 2, "objective.minibatches": 2, "objective.draws": 2, "text_length": 4,
}  # fmt: skip
NO_JUDGE = {f"rollout.weights.{name}": 0.0 for name in ("task", "agent", "consistency")}
# (settings, losses with a weight, forwards a rollout by hand): rollouts have 5 steps, updates read 2 states of each.
CASES = {
    "on_policy": ({"objective.rl": "none"}, Phase(False, True), 5 + 2 * (3 + 1)),
    "many_reads": ({"objective.rl": "none", "objective.draws": 6}, Phase(False, True), 5 + 5 + 6 * 3),
    "off_policy": ({"objective.rl": "none", "rollout.role": "demonstrator"}, Phase(False, True), 5 + 2 * 3),
    "renoised": ({"objective.rl": "none", "objective.anchor_states": "renoised"}, Phase(False, True), 5 + 2 * (3 + 1)),
    "awm": ({}, Phase(True, True), 5 + 2 * (3 + 1) + 2 * (3 + 1)),
    "awm_alone": ({"objective.beta_base": 0.1}, Phase(True, False), 5 + 2 * (3 + 1 + 1)),
    "awm_shared": ({"objective.anchor_states": "renoised", "objective.awm_old": "ema"}, Phase(True, True),
                   5 + 2 * (3 + 1 + 1)),
    "nft": ({"objective.rl": "nft"}, Phase(True, True), 5 + 2 * (3 + 1) + 2 * (3 + 1)),
    "reward": (NO_JUDGE | {"rollout.weights.distill": 1.0}, Phase(True, True), 5 + 5 + 2 * 3 + 2 * (3 + 1)),
    "flow_grpo": ({"objective.rl": "flow_grpo", "sampler.eta": 0.7, "objective.grpo_beta": 0.1}, Phase(True, True),
                  5 + 2 * (3 + 1) + 2 * (3 + 1)),
    # With guidance, a velocity of the Demonstrator, or of the Executor that is sampled, is two forwards.
    "guided": ({"objective.rl": "none", "demonstrator.guidance": 2.0}, Phase(False, True), 5 + 2 * (3 + 2)),
    "guided_clips": ({"objective.rl": "none", "rollout.guidance": 2.0}, Phase(False, True), 2 * 5 + 2 * (3 + 1)),
    "guided_off": ({"objective.rl": "none", "rollout.role": "demonstrator", "demonstrator.guidance": 2.0},
                   Phase(False, True), 2 * 5 + 2 * 3),
    "guided_reward": (NO_JUDGE | {"rollout.weights.distill": 1.0, "demonstrator.guidance": 2.0}, Phase(True, True),
                      5 + 2 * 5 + 2 * 3 + 2 * (3 + 1)),
    "guided_shared": ({"objective.anchor_states": "renoised", "demonstrator.guidance": 2.0}, Phase(True, True),
                      5 + 2 * (3 + 2 + 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_forwards_are_counted_as_they_are_made(case, tmp_path, monkeypatch):
    """In place of the network stands one product without a gradient; the traced programs tell how often it is made."""
    changes, phase, by_hand = CASES[case]

    def one_product(self, base, lora, x_t, t, condition):
        x = x_t["video"]
        column = jax.lax.stop_gradient(x.reshape(len(x), -1)[:, :1]) @ jnp.ones((1, 1))
        moved = 0.0 if lora is None else sum(x.sum() for x in jax.tree.leaves(lora))
        free = self.latents["video"].moves[:, None, None, None]
        return {"video": (x + moved) * column.reshape(-1, 1, 1, 1, 1) * free}

    monkeypatch.setattr(TinyFamily, "denoise", one_product)
    # None of a test before or after this one.
    monkeypatch.setattr(step_programs, "_make", step_programs._make.__wrapped__)
    config = small_config(tmp_path, **SMALLEST | changes)
    made = step_programs.make_programs(config, make_mesh(devices=jax.devices()[:1]))
    count = made.rollout_settings.tasks * made.rollout_settings.group
    assert made.forwards(phase) == count * by_hand

    negative = tokens(jnp.ones((4, 64))) if made.guidance.used else None
    collector = Collector(made, judge=None, cache=None, rubric=None, negative=negative)
    monkeypatch.setattr(type(made.objective), "phase", lambda self, step: phase)
    scene = jnp.zeros((count, 1, *shape_of(made.family)[1:]))
    condition = told(jnp.ones((count, 4, 64)), jnp.ones((count, 4), bool), scene)
    monkeypatch.setattr(collector, "_conditions", lambda tasks, phase: (condition, condition))

    def step(state, base, key):
        batch = collector.begin(state.lora, base, {}, key, 0).batch
        return made.update[phase](state, base, batch.replace(advantages=jnp.ones(count), valid=jnp.ones(count, bool)))

    base = jax.eval_shape(made.family.init_base, jax.random.key(0))
    products = flops.count(jax.make_jaxpr(step)(made.state, base, jax.random.key(0))) / 2
    # A backward pass counts as two forwards, and makes none of these products.
    objective = made.objective.in_phase(phase)
    trained = objective.uses_visited + objective.uses_renoised + (objective.rl == "flow_grpo")
    assert products + 2 * trained * objective.reads * count == made.forwards(phase)


def test_what_is_not_read_is_not_computed(tmp_path):
    """`wan22_5b:distill` reads 2 of 12 states: before, it computed the Demonstrator at all 12."""
    from world_distill.settings.loading import load_config, section

    config = load_config("wan22_5b:distill")
    objective = section(config.objective, forwards.Objective)
    settings = forwards.RolloutSettings(**config.rollout.to_dict())
    steps, phase = config.sampler.steps, Phase(False, True)
    cost = forwards.per_rollout(objective, settings, steps, phase)
    assert cost == 12 + 2 * (3 + 1)
    assert 1 - cost / (12 + 12 + 2 * 3) == pytest.approx(1 / 3)
    for rl, anchor in itertools.product((True, False), repeat=2):
        assert forwards.per_step(objective, settings, steps, Phase(rl, anchor)) >= 64 * 12
