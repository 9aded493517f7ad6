"""The family of `two_streams.py` goes through the whole method on 8 devices: what the interface promises holds."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small import PATTERN, check_advantages, small_config
from two_streams import GLYPHS_LENGTH

from world_distill import build
from world_distill.core import sampling
from world_distill.data.records.batches import fixed_batches, task_batches
from world_distill.data.records.reader import RecordReader
from world_distill.programs import evaluate, generate, notebook, prepare, probe, train
from world_distill.storage.checkpoints import Checkpointer
from world_distill.storage.weight_files import save_weights
from world_distill.training.collect import Collector
from world_distill.training.step_losses import in_shape
from world_distill.training.step_programs import make_programs
from world_distill.weights import base_model

OFF_POLICY = {"objective.rl": "none", "objective.beta_d": ((0, 1.0),), "rollout.role": "demonstrator"}
GUIDED = {"demonstrator.guidance": 2.0, "demonstrator.negative": "a blur"}
VARIANTS = {
    "awm": {"rollout.weights.distill": 1.0},
    "awm_guided": GUIDED | {"objective.anchor_states": "renoised"},
    "nft": {"objective.rl": "nft"},
    "flow_grpo": {"objective.rl": "flow_grpo", "sampler.eta": 0.7, "objective.grpo_beta": 0.1},
    "off_policy": OFF_POLICY | {"rollout.spread": False},
    "full_weights": {"executor.rank": 0, "objective.rl": "none", "objective.beta_d": ((0, 1.0),)},
}  # fmt: skip
EIGHT = {"host_devices": 8, "mesh.fsdp": 4, "mesh.tensor": 2}


def config_of(folder, **changes):
    config = small_config(
        folder, **{"executor.targets": ".*", "evaluate_batch": 4, "judge.factory": PATTERN} | EIGHT | changes
    )
    with config.unlocked():
        config.model = ConfigDict({"family": "two_streams:build", "width": 32})
    return config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    config = config_of(folder, **VARIANTS["awm_guided"])  # so that the negative text is encoded, too
    family = build.make_family(config)
    save_weights(folder / "base.safetensors", jax.jit(family.init_base)(jax.random.key(3)), {"note": "random"})
    prepare.make_records(config, folder / "data")
    return folder


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """(config, folder) of a finished run of a variant."""

    @functools.cache
    def make(variant, **changes):
        config, folder = config_of(inputs, **VARIANTS[variant] | changes), tmp_path_factory.mktemp(variant)
        train.train(config, folder)
        return config, folder

    return make


def state_of(config, folder):
    programs = make_programs(config, build.start_devices(config))
    with Checkpointer(folder / "checkpoints") as checkpointer:
        state, _, _ = checkpointer.restore_latest(programs.state)
    return programs, state


def host(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def test_records_hold_arrays_by_name_and_a_scene_once(inputs):
    reader = RecordReader(inputs / "data", "train")
    assert len(reader) > len({r.image_id for r in reader})  # some images have two tasks
    record = reader[0]
    assert {name: x.shape for name, x in record.scene.items()} == {
        "first": (1, 5, 5, 8),
        "glance": (4, 6),
        "audio": (1, 4),
    }
    assert record.task_states["glyphs"].dtype == jnp.bfloat16 and set(record.solution_states) == {"words", "glyphs"}
    assert reader.metadata["scene.first"] == "1x5x5x8" and reader.longest_texts["glyphs"]["length"] <= GLYPHS_LENGTH


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_executor_learns_on_8_devices(runs, variant):
    config, folder = runs(variant)
    programs, state = state_of(config, folder)
    assert int(state.step) == config.steps
    kernel = state.lora["full"]["told"]["kernel"] if variant == "full_weights" else state.lora["told"]["a"]
    assert len(kernel.sharding.device_set) == 8
    fresh = programs.init(base_model.load_base(programs.family, config, programs.mesh), config.seed)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), state.lora, fresh.lora)
    if variant == "full_weights":
        moved = {name: layer["kernel"] for name, layer in moved["full"].items()}
    else:
        moved = {name: layer["b"] for name, layer in moved.items()}
    assert min(moved.values()) > 1e-5, moved  # both streams' layers, and what reads the scene and the texts
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["train/gradient_norm"]) for line in lines)
    if programs.objective.rl != "none":
        check_advantages(config, folder)


def test_a_run_goes_on_bit_for_bit(runs, tmp_path):
    config, folder = runs("awm")
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns(str(config.steps)))
    train.train(config, tmp_path / "run")
    one, other = host(state_of(config, folder)[1]), host(state_of(config, tmp_path / "run")[1])
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("variant", ["awm", "flow_grpo"])
def test_one_device_trains_like_eight(runs, variant):
    many = host(state_of(*runs(variant))[1])
    one = host(state_of(*runs(variant, host_devices=1, **{"mesh.fsdp": 1, "mesh.tensor": 1}))[1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5), many.lora, one.lora)


def begun(inputs, variant):
    """(family, base, Executor, a step's batch on its way, Eq. 9's reward) with random LoRA."""
    config = config_of(inputs, **VARIANTS[variant])
    mesh = build.start_devices(config)
    programs = make_programs(config, mesh)
    base = base_model.load_base(programs.family, config, mesh)
    state = programs.init(base, 0)
    lora = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), state.lora)
    reader, lengths = RecordReader(inputs / "data", "train"), build.text_lengths(programs.family, config)
    assert lengths == {"words": config.text_length, "glyphs": GLYPHS_LENGTH}
    collector = Collector(programs, judge=None, cache=None, rubric=None)
    tasks = collector.draw(task_batches(reader, tasks_per_step=4, seed=0, lengths=lengths), 0)
    return programs, base, lora, collector.begin(lora, base, tasks, jax.random.key(5), 0)


def test_rollouts_pin_move_and_count_as_the_streams_say(inputs):
    """Flow-GRPO: the picture's first frame is generated without noise, the sound's first moment is the scene's."""
    programs, base, lora, pending = begun(inputs, "flow_grpo")
    family, batch = programs.family, jax.device_get(pending.batch)
    states = in_shape(batch.states, family.latents)
    grid, g = build.sampler_grid(config_of(inputs, **VARIANTS["flow_grpo"]))
    np.testing.assert_array_equal(states["audio"][:, :, :1], np.broadcast_to(batch.task.scene["audio"], (4, 8, 1, 4)))
    assert np.ptp(states["video"][:, :, 0], axis=0).min() > 0  # the first frame moves
    x, t = {name: x[0] for name, x in states.items()}, jnp.full(8, grid[0])
    v = jax.device_get(family.denoise(jax.device_get(base), jax.device_get(lora), x, t, batch.task))
    euler = states["video"][0] + (grid[1] - grid[0]) * v["video"]
    np.testing.assert_allclose(states["video"][1][:, 0], euler[:, 0], atol=1e-4)
    assert g[0] > 0 and np.abs(states["video"][1] - euler)[:, 1:].max() > 0.1
    heard = states["audio"][0] + (grid[1] - grid[0]) * v["audio"]
    assert np.abs(states["audio"][1] - heard)[:, 1:].max() > 0.1


def test_equation_9_counts_both_streams(inputs):
    programs, base, lora, pending = begun(inputs, "awm")
    family, batch = programs.family, jax.device_get(pending.batch)
    base, lora = jax.device_get((base, lora))
    states, grid = in_shape(batch.states, family.latents), build.sampler_grid(config_of(inputs, **VARIANTS["awm"]))[0]
    expected = 0.0
    for i in range(len(grid) - 1):
        x, t = {name: x[i] for name, x in states.items()}, jnp.full(8, grid[i])
        v, v_d = (family.denoise(base, w, x, t, c) for w, c in ((lora, batch.task), (None, batch.solution)))
        square = {name: (np.asarray(v[name]) - np.asarray(v_d[name])) ** 2 for name in v}
        counted = [square["video"][:, 1:].reshape(8, -1), square["audio"][:, 1:].reshape(8, -1)]
        expected = expected - (grid[i] - grid[i + 1]) * np.concatenate(counted, axis=1).mean(1)
    np.testing.assert_allclose(pending.reward, expected, rtol=2e-3)
    assert np.ptp(expected) > 1e-3


def test_evaluation_and_the_probe_run_on_it(runs, inputs, tmp_path):
    config, folder = runs("awm_guided")
    result = evaluate.evaluate(folder, limit=4)
    assert {row["name"]: row["n"] for row in result["rows"]} == {"base": 4, "demonstrator": 4, "executor": 4}
    probed, facts = probe.probe(config, RecordReader(config.data, "test"), tmp_path, limit=2, clips=2)
    assert len(probed.ids) == 2 and facts["misses"] > 0


def test_clips_are_the_samplers_decoded_frame_after_frame(runs, inputs, tmp_path):
    """`generate`, the evaluator and a plain loop make one clip; the codec's state goes from frame to frame."""
    config, folder = runs("awm")
    programs, state = state_of(config, folder)
    family, mesh = programs.family, programs.mesh
    base, lora = (jax.device_get(x) for x in (base_model.load_base(family, config, mesh), state.lora_ema))
    reader = RecordReader(inputs / "data", "test")
    [batch] = fixed_batches(reader, 4, lengths=build.text_lengths(family, config))
    grid, _ = build.sampler_grid(config)
    told = jax.tree.map(lambda x: jnp.asarray(x[:1]), batch.condition("task"))
    x = sampling.initial_noise(sampling.sample_keys(jax.random.key(0), np.arange(1)), told.scene, family.latents)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        v = family.denoise(base, lora, x, jnp.full(1, t), told)
        x = jax.tree.map(lambda x, v: x + (t_next - t) * v, x, v)  # noqa: B023
    plain = np.asarray(family.codec.decode(base, x))[0].astype(int)
    request = generate.Request(out=tmp_path / "clips", records=inputs / "data", limit=1, executors=(folder,))
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):  # before anything is sampled
        patch.setattr(generate, "_sampler", None)
        generate.generate(dataclasses.replace(request, out=tmp_path / "file" / "clips"), config)
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_write", lambda out, job, clip, *rest: kept.update({job.name: clip}))
        assert generate.generate(request, config) == (1, 0)
    (clip,) = kept.values()
    assert np.abs(clip.astype(int) - plain).max() <= 1 and np.ptp(clip) > 20
    other = x | {"video": x["video"].at[:, 0].add(1.0)}
    assert np.abs(np.asarray(family.codec.decode(base, other))[0, -1].astype(int) - plain[-1]).max() > 0


def test_python_tells_it_pictures_and_trains_it(inputs):
    config = config_of(inputs, **{"objective.rl": "none", "objective.beta_d": ((0, 1.0),), "objective.minibatches": 1})
    model = notebook.load(config)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    task, solution = model.tell(image, task="[cup]: Fall."), model.tell(image, solution="The cup falls.")
    assert task.scene["glance"].shape == (4, 6) and task.states["glyphs"].shape == (12, 8)
    clips = notebook.rollout(model, [task] * 8, steps=2)
    assert clips.clips.shape == (8, 9, 30, 30, 3)
    trainer = notebook.Trainer(model)
    state, metrics = trainer.step(trainer.init(), [(task, solution)] * 4)
    assert metrics["train/anchor"] > 0 and int(state.step) == 1
