"""Guidance in a whole run: each velocity by hand, what has a part in training, resuming, devices, clips."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, VARIANTS, make_inputs, redraw, small_config
from streams import counts_of, one_stream, shape_of, tokens, told, velocity_of, video

from world_distill import build
from world_distill.core import flow, losses, sampling
from world_distill.data.records.batches import task_batches
from world_distill.data.records.negative import load_negative, negative_path
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.devices import cycles
from world_distill.devices.sharding import batch_sharding
from world_distill.models.hashed_words import encode_text
from world_distill.programs import train
from world_distill.settings.loading import load_config, section
from world_distill.settings.objective import Objective
from world_distill.storage.checkpoints import Checkpointer
from world_distill.structs import TrainBatch
from world_distill.training import run_folder
from world_distill.training import step as steps
from world_distill.training.collect import Collector
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model

TEXT, SHOWN, ROLLED = "nothing moves", 2.5, 1.5
GUIDED = VARIANTS["distill"] | {
    "demonstrator.guidance": SHOWN, "demonstrator.negative": TEXT, "rollout.guidance": ROLLED, "model.depth": 1,
    "steps": 2, "save_every": 1,
}  # fmt: skip
# Eq. 9 keeps the velocities of rollouts.
REWARDED = GUIDED | {"objective.rl": "awm", "rollout.weights.distill": 1.0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, **GUIDED)
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """(config, folder of its run)."""
    config, folder = small_config(inputs, **GUIDED), tmp_path_factory.mktemp("run")
    train.train(config, folder)
    return config, folder


def parts(config):
    """(programs, base, Executor of random weights, conditions of a step's rollouts, negative text)."""
    mesh = build.start_devices(config)
    programs = make_programs(config, mesh)
    reader = RecordReader(config.data, "train")
    tasks = task_batches(reader, tasks_per_step=4, seed=0, lengths={"text": config.text_length}).take()
    conditions = [jax.tree.map(jnp.asarray, tasks.condition(role)) for role in ("task", "solution")]
    group = programs.rollout_settings.group
    conditions = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), conditions)
    base = base_model.load_base(programs.family, config, mesh)
    negative = load_negative(reader, programs.guidance, {"text": config.text_length}, mesh)
    return programs, base, redraw(programs.state.lora, 2), conditions, negative


def by_hand(family, scale, length):
    """(base, lora, x, t, condition) -> the guided velocity, from two calls and the words of the negative text."""
    states = encode_text(TEXT, family.config.text_width)
    text = np.zeros((length, states.shape[1]), np.float32)
    text[: len(states)] = states

    @jax.jit
    def velocity(base, lora, x, t, condition):
        real = np.arange(length) < len(states)
        other = condition.replace(text=tokens(*(jnp.asarray(np.stack([y] * len(x))) for y in (text, real))))
        told, untold = (velocity_of(family)(base, lora, x, t, c) for c in (condition, other))
        return (1 - scale) * untold + scale * told

    return velocity


def steps_of(family, rollout):
    """Visited states, the final latents, and the velocities, each [b f h w c] a step."""
    frames = lambda x: x.reshape(-1, *shape_of(family))  # noqa: E731
    states, velocities = (list(map(frames, x["video"])) for x in (rollout.states, rollout.velocities))
    return [*states, rollout.latents["video"]], velocities


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


def check_steps(family, grid, states, velocities, velocity, *given):
    """Fails unless each velocity is what `velocity` says at its state, and leads to the next state."""
    for i, v in enumerate(velocities):
        close(v, velocity(*given[:2], states[i], jnp.full(len(v), grid[i], jnp.float32), given[2]))
        close(states[i + 1], states[i] + (grid[i + 1] - grid[i]) * v)


def test_rollouts_and_the_demonstrators_velocities_are_the_formula(inputs):
    config = small_config(inputs, **REWARDED)
    programs, base, lora, conditions, negative = parts(config)
    family, length = programs.family, config.text_length
    grid, _ = build.sampler_grid(config)
    given = lora, base, *conditions, jax.random.key(3), jnp.int32(0), negative
    (task, solution), rollout = conditions, programs.roll[True](*given)
    states, velocities = steps_of(family, rollout)
    check_steps(family, grid, states, velocities, by_hand(family, ROLLED, length), base, lora, task)
    shown, reward = programs.demonstrate(base, rollout, solution, negative)
    velocity = by_hand(family, SHOWN, length)
    at = list(zip(states[:-1], grid[:-1], strict=True))
    expected = [velocity(base, None, x, jnp.full(len(x), t, jnp.float32), solution) for x, t in at]
    for found, wanted in zip(shown["video"], expected, strict=True):
        close(found.reshape(wanted.shape), wanted)
    # Eq. 9 is between the velocity that made the clip and the Demonstrator's guided one.
    gaps = [losses.velocity_gap(v, w, counts_of(family)) for v, w in zip(velocities, expected, strict=True)]
    close(reward, -sum(gap * (a - b) for gap, a, b in zip(gaps, grid[:-1], grid[1:], strict=True)))
    assert max(np.abs(v - w).max() for v, w in zip(velocities, expected, strict=True)) > 0.1


def test_the_demonstrators_own_rollouts_are_guided(inputs):
    config = small_config(inputs, **GUIDED | {"rollout.role": "demonstrator"})
    programs, base, lora, conditions, negative = parts(config)
    grid, _ = build.sampler_grid(config)
    given = lora, base, *conditions, jax.random.key(3), jnp.int32(0), negative
    solution, rollout = conditions[1], programs.roll[True](*given)
    velocity = by_hand(programs.family, SHOWN, config.text_length)
    check_steps(programs.family, grid, *steps_of(programs.family, rollout), velocity, base, None, solution)


def test_clips_at_evaluation_are_guided_by_role(run):
    config, _ = run
    programs, base, lora, _, _ = parts(config)
    family, reader = programs.family, RecordReader(config.data, "test")
    evaluator = run_folder.make_evaluator(config, family, programs.mesh, None)
    batch = task_batches(reader, tasks_per_step=4, seed=0, lengths={"text": config.text_length}).take()
    grid, _ = build.sampler_grid(config)
    rows = np.arange(4)
    keys = sampling.sample_keys(jax.random.key(config.seed), rows)
    for text, weights, scale in (("task", lora, ROLLED), ("solution", None, SHOWN)):
        negative = evaluator.negative(reader, text)
        clips = evaluator.clips(batch, base, weights, text=text, rows=rows, negative=negative)
        condition = jax.tree.map(jnp.asarray, batch.condition(text))
        latents = sampling.rollout(
            one_stream(by_hand(family, scale, config.text_length)), base, weights, condition, keys, times=grid,
            streams=family.latents, keep_states=False,
        ).latents  # fmt: skip
        assert np.abs(clips.astype(int) - np.asarray(family.codec.decode(base, latents))).max() <= 1
    plain = run_folder.make_evaluator(small_config(config_folder(config), **VARIANTS["distill"], **{"model.depth": 1}),
                                family, programs.mesh, None)  # fmt: skip
    assert plain.negative(reader, "solution") is None


def config_folder(config):
    return RecordReader(config.data, "test").index_path.parents[2]


def states_of(config, *workdirs):
    """Every array of each folder's newest checkpoint."""
    mesh, found = build.start_devices(config), []
    for workdir in workdirs:
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            state, _, _ = checkpointer.restore_latest(make_programs(config, mesh).state)
        found.append(jax.device_get(state.replace(key=jax.random.key_data(state.key))))
    return found


def test_a_guided_run_goes_on_bit_for_bit(run, tmp_path):
    config, folder = run
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("2"))
    train.train(config, tmp_path / "run")
    one, other = states_of(config, folder, tmp_path / "run")
    assert one.step == other.step == 2
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_two_devices_train_like_one_and_send_no_rows(run, inputs, tmp_path):
    alone, folder = run
    config = small_config(inputs, **GUIDED | {"host_devices": 2})
    train.train(config, tmp_path)
    [one], [two] = states_of(alone, folder), states_of(config, tmp_path)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), one.lora, two.lora)
    assert any(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(one.lora))
    programs, base, _, _, negative = parts(config)
    tasks = task_batches(
        RecordReader(config.data, "train"), tasks_per_step=4, seed=0, lengths={"text": config.text_length}
    )
    collector = Collector(programs, judge=None, cache=None, rubric=None, negative=negative)
    state = programs.init(base, 0)
    pending = collector.begin(state.lora, base, collector.draw(tasks, 0), jax.random.key(0), 0)
    rows = batch_sharding(programs.mesh)
    weighed = jax.device_put({"advantages": np.zeros(8, np.float32), "valid": np.ones(8, bool)}, rows)
    step = programs.update[programs.objective.phase(0)]
    compiled = step.lower(state, base, pending.batch.replace(**weighed)).compile()
    assert cycles.estimate(compiled.as_text()).counts.keys() == {"all-reduce"}


def test_training_stops_before_it_starts_where_the_records_have_another_text(inputs, tmp_path):
    shutil.copytree(inputs / "data", tmp_path / "data")
    config = small_config(inputs, **GUIDED)
    config.data = str(tmp_path / "data")
    negative_path(config.data, "train").unlink()
    with pytest.raises(RecordError, match=r"there is no .*train\.negative: call `world-distill encode`"):
        train.train(config, tmp_path / "a")
    other = small_config(inputs, **GUIDED | {"demonstrator.negative": "a blur"})
    with pytest.raises(
        RecordError, match="negative text 'nothing moves', and config.demonstrator.negative is 'a blur'"
    ):
        train.train(other, tmp_path / "b")
    # The validation set is asked for its own before the first step, too.
    shutil.copy(inputs / "data" / "train.negative", config.data)
    negative_path(config.data, "validation").unlink()
    with config.unlocked():
        config.evaluate_every = 1
    with pytest.raises(RecordError, match=r"validation\.negative"):
        train.train(config, tmp_path / "c")
    assert not list(tmp_path.glob("*/checkpoints/[0-9]*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.beta_d": ((0, 0.0),)}, r"demonstrator\.guidance has no effect"),
        (VARIANTS["flow_grpo"], r"rollout\.guidance above 1 does not go with"),
        ({"demonstrator.guidance": 0.5}, r"demonstrator\.guidance must be at least 1"),
        ({"demonstrator.guidance": 1.0, "rollout.guidance": 1.0}, "no effect without guidance"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train(small_config(inputs, **GUIDED | changes), tmp_path)


# ---- The renoised anchor, through a small network


class Network:
    """As much of `interfaces.ModelFamily` as a training step sees; the text counts where its mask says so."""

    latents = video((2, 2, 2, 3), [0, 1])

    def denoise(self, base, lora, x_t, t, condition):
        mask = condition.text["text"].mask[..., None]
        hint = (condition.text["text"].states * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
        out = base if lora is None else base + lora
        h = jnp.tanh(x_t["video"] + t[:, None, None, None, None] + hint[:, None, None, None])
        return {"video": (h @ out) * self.latents["video"].moves[:, None, None, None]}


def test_the_renoised_anchor_is_the_gradient_to_the_guided_demonstrator(monkeypatch):
    family, rows, scale, grid = Network(), 4, 3.0, flow.sampling_times(3, 3.0)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    scene, mask = draw(rows, 1, 2, 2, 3), jnp.asarray(rng.random((rows, 5)) < 0.5).at[:, 0].set(True)
    task, solution = (told(draw(rows, 5, 3), mask, scene) for _ in range(2))
    negative = tokens(draw(5, 3), jnp.asarray([True, True, False, False, False]))
    batch = TrainBatch(
        task,
        solution,
        {"video": draw(rows, 2, 2, 2, 3)},
        None,
        None,
        None,
        jnp.zeros(rows),
        jnp.ones(rows, bool),
        negative,
    )
    base, lora = draw(3, 3), 0.3 * draw(3, 3)
    settings = {"objective.rl": "none", "objective.anchor_states": "renoised", "objective.beta_d": ((0, 1.0),),
                "objective.updates": 1, "objective.minibatches": 1}  # fmt: skip
    objective = section(load_config("sandbox", SMALL | settings).objective, Objective)
    seen = []
    real = flow.interpolate

    def spy(clean, eps, t):
        jax.debug.callback(lambda x, y: seen.append((x["video"], y)), real(clean, eps, t), t)
        return real(clean, eps, t)

    monkeypatch.setattr(flow, "interpolate", spy)
    optimizer = optax.sgd(1.0)
    step = jax.jit(steps.make_train_step(family, objective, optimizer, grid, guidance=scale))
    copy = lambda: jnp.copy(lora)  # noqa: E731
    state = steps.TrainState(jnp.zeros((), jnp.int32), copy(), copy(), copy(), optimizer.init(lora), jax.random.key(9))
    after, metrics = step(state, base, batch)
    jax.effects_barrier()
    [(x_t, t)] = seen
    x_t = jnp.concatenate([scene, jnp.asarray(x_t)[:, 1:]], axis=1)
    other = solution.replace(text=jax.tree.map(lambda x: jnp.stack([x] * rows), negative))
    shown, untold = (velocity_of(family)(base, None, x_t, t, c) for c in (solution, other))

    def loss(lora):
        v = velocity_of(family)(base, lora, x_t, t, task)
        return jnp.mean((v - (untold + scale * (shown - untold)))[:, 1:] ** 2)

    value, gradient = jax.value_and_grad(loss)(lora)
    np.testing.assert_allclose(after.lora, lora - gradient, atol=1e-5)
    assert float(metrics["train/anchor"]) == pytest.approx(float(value), rel=1e-4) and np.abs(gradient).max() > 0.01
