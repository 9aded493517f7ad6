"""A sandbox run small enough for tests: a few scenes, a tiny random base, a handful of rollouts.

Tests that share these settings share compiled programs, which is most of their time.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from world_distill import build
from world_distill.programs import prepare
from world_distill.settings.loading import load_config
from world_distill.storage.weight_files import save_weights
from world_distill.training.step_programs import make_programs

HASH, PATTERN = "hash_judge:HashJudge", "hash_judge:PatternJudge"

SMALL = {
    "model.width": 32,
    "model.heads": 2,
    "model.depth": 2,
    "model.unroll": 1,
    "executor.rank": 4,
    "executor.alpha": 8.0,
    "sampler.steps": 3,
    "rollout.tasks": 4,
    "rollout.group": 2,
    "objective.updates": 2,
    "objective.minibatches": 2,
    "optimizer.name": "adam",
    # On other devices, sums are rounded otherwise. Two things would blow that up: Adam moves an entry of vanishing
    # gradient by the sign of its rounding, and a low temperature puts rows on either side of the ratio's clip.
    "optimizer.eps": 1e-3,
    "objective.awm_ratio_temperature": 1.0,
    "objective.awm_old": "start",
    "objective.beta_d": ((0, 0.1),),
    "optimizer.learning_rate": ((0, 2e-3),),
    "objective.rl_weight": ((0, 1.0),),
    "scenes.train": 6,
    "scenes.validation": 2,
    "scenes.test": 4,
    "annotator.pairs": 2,
    "annotator.test_pairs": 1,
    "steps": 4,
    "log_every": 1,
    "save_every": 2,
    "evaluate_every": 0,
    "evaluate_batch": 8,
    "evaluate_tasks": 4,
    "host_devices": 1,
}

# The three kinds of training step that are tested throughout; AWM is what the others change.
VARIANTS = {
    "distill": {"objective.rl": "none", "objective.beta_d": ((0, 1.0),)},
    "awm": {},
    "flow_grpo": {"objective.rl": "flow_grpo", "sampler.eta": 0.7},
}


def small_config(folder: pathlib.Path, **overrides):
    """The sandbox config at test size; the base is random weights in `folder`, records are in `folder`/data.

    The judge's answers are a hash of the clip (`hash_judge`), so that there is RL in every step that has it.
    """
    own = {"base": str(folder / "base.safetensors"), "judge.factory": HASH}
    config = load_config("sandbox", {**SMALL, **own, **overrides})
    config.data = str(folder / "data")
    return config


def check_advantages(config, workdir: pathlib.Path) -> None:
    """Fails unless, in a finished run, every group of every step that has RL has advantages."""
    objective = make_programs(config, build.start_devices(config)).objective
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    judged = {line["step"]: line["reward/zero_std_ratio"] for line in lines if "reward/zero_std_ratio" in line}
    assert judged == {step + 1: 0.0 for step in range(config.steps) if objective.rl_active(step)}


def redraw(tree, seed: int, size: float = 0.15):
    """Another tree of the same shapes, all random: layers that start at zero would hide what lies behind them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * size, jnp.float32), tree)


def random_weights(family, seed: int):
    """Base weights of a family, all random."""
    return redraw(jax.eval_shape(family.init_base, jax.random.key(0)), seed)


def make_inputs(folder: pathlib.Path, **overrides) -> None:
    """Writes the base weights and the records that `small_config` names, with the same overrides."""
    config = small_config(folder, **overrides)
    family = build.make_family(config)
    save_weights(folder / "base.safetensors", random_weights(family, 7), {"note": "random"})
    prepare.make_records(config, folder / "data")
