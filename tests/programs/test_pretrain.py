"""Pretraining learns, resumes bit for bit, and writes weights that the rest of the project loads."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict
from small import small_config
from streams import video

from world_distill import build
from world_distill.errors import UserError
from world_distill.programs import pretrain
from world_distill.settings.loading import load_config
from world_distill.storage.weight_files import load_weights
from world_distill.weights import base_model


def pretrain_config(tmp_path, steps, **overrides):
    changes = {"pretrain.steps": steps, "pretrain.batch": 4, "pretrain.log_every": 8, "pretrain.save_every": 10}
    return small_config(tmp_path, **changes | {"pretrain.warmup": 2} | overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, folder, summary) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    config = pretrain_config(folder, 24)
    return config, folder / "run", pretrain.pretrain(config, folder / "run", command="test")


def test_brief_training_learns(tmp_path):
    """The model begins by showing the scene, still; a few clips seen again and again soon move."""
    config = pretrain_config(tmp_path, 64)
    mesh = build.start_devices(config)
    family = build.make_family(config, mesh)
    state, step = pretrain.make_training(config, family, mesh)
    batch = pretrain.load_batch(config, family, build.make(config, "clips"), 0)
    errors = []
    for _ in range(64):
        state, metrics = step(state, *batch, jax.random.key(0))
        errors.append(metrics["clean_error"])
    assert np.mean(errors[-8:]) < 0.85 * np.mean(errors[:8])


def test_log_and_weights_are_written(whole, tmp_path):
    _, run, summary = whole
    lines = [json.loads(line) for line in (run / "pretrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8, 25, 8))
    assert summary["loss"] == pytest.approx(lines[-1]["loss"])
    weights, metadata = load_weights(run / "base.safetensors")
    assert metadata["command"] == "test" and metadata["seed"] == "0"
    config = pretrain_config(tmp_path, 24, base=str(run / "base.safetensors"))
    base = base_model.load_base(build.make_family(config), config, build.start_devices(config))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), weights)


@pytest.mark.once
def test_resumed_pretraining_equals_uninterrupted(whole, tmp_path, monkeypatch):
    config, run, _ = whole

    class Stop(Exception):
        pass

    save = pretrain.Checkpointer.save

    def stopping(self, step, *args, **kwargs):
        if step == 13:
            raise Stop
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Checkpointer, "save", stopping)
        with pytest.raises(Stop):
            pretrain.pretrain(config, tmp_path, command="test")
    pretrain.pretrain(config, tmp_path, command="test")
    one, other = (load_weights(folder / "base.safetensors")[0] for folder in (run, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("power, by_hand", [(0.0, lambda t: 1), (1.0, lambda t: t), (2.0, lambda t: t**2)])
def test_the_loss_weighs_times_by_the_power(power, by_hand):
    """A model that always sees the clean latents 1 too high has |v error|^2 = 1 / t^2."""

    class Off:
        latents = video((2, 1, 1, 3), [0, 1])
        encoders = types.SimpleNamespace(scenes={"video": np.zeros((1, 1, 1, 3))})
        codec = types.SimpleNamespace(encode=lambda base, clips: {"video": jnp.asarray(clips, jnp.float32)})

        def denoise(self, weights, lora, x_t, t, condition):
            times.append(t)
            return {"video": weights + (x_t["video"] - 1.0) / t[:, None, None, None, None]}

    times = []
    optimizer = optax.sgd(0.0)
    settings = FrozenConfigDict({"shift": 4.0, "plain_every": 2, "loss_power": power, "ema_decay": 0.9})
    weights = jnp.zeros(())
    state = pretrain.PretrainState(jnp.zeros((), jnp.int32), weights, weights, optimizer.init(weights))
    with jax.disable_jit():
        step = pretrain.make_step(Off(), optimizer, settings)
        _, metrics = step(state, np.zeros((4, 2, 1, 1, 3)), None, jax.random.key(0))
    (t,) = jax.tree.map(np.asarray, [jax.lax.stop_gradient(x) for x in times])
    assert np.ptp(t) > 0.3
    assert metrics["loss"] == pytest.approx(np.mean(by_hand(t) / t**2), rel=1e-4)
    assert metrics["clean_error"] == pytest.approx(1.0, rel=1e-4)
    # Each row pulls as it weighs: d/dw of t^p |w + 1 / t|^2 at w = 0.
    assert metrics["gradient_norm"] == pytest.approx(np.mean(2 * by_hand(t) / t), rel=1e-4)


def test_captions_are_dropped_as_often_as_asked_and_the_same_again(tmp_path):
    captions = [f"word{i}" for i in range(400)]
    dropped = pretrain.drop_captions(captions, 0.1, 0, 5)
    assert 20 < dropped.count("") < 60
    assert all(new in ("", old) for new, old in zip(dropped, captions, strict=True))
    assert dropped == pretrain.drop_captions(captions, 0.1, 0, 5)
    assert dropped != pretrain.drop_captions(captions, 0.1, 0, 6) != pretrain.drop_captions(captions, 0.1, 1, 6)
    assert pretrain.drop_captions(captions, 0.0, 0, 5) == captions

    config = pretrain_config(tmp_path, 64, **{"pretrain.drop_text": 0.5, "pretrain.batch": 16})
    family, source = build.make_family(config), build.make(config, "clips")
    clips, texts = pretrain.load_batch(config, family, source, 3)
    text, lengths = texts["text"].states, texts["text"].mask.sum(-1)
    assert 0 < np.sum(lengths == 1) < 16 and lengths.min() == 1  # the empty text is one token
    empty = family.encoders.text([""])["text"][0]
    np.testing.assert_array_equal(text[lengths == 1][:, 0], empty.repeat((lengths == 1).sum(), 0))
    config.pretrain.drop_text = 0.0
    whole = pretrain.load_batch(config, family, source, 3)
    np.testing.assert_array_equal(whole[0], clips)
    assert whole[1]["text"].mask.sum(-1).min() > 1


def test_training_starts_from_a_file_but_for_what_begins_anew(whole, tmp_path):
    _, run, _ = whole
    start = run / "base.safetensors"
    config = pretrain_config(tmp_path, 64, **{"pretrain.start": str(start), "pretrain.fresh": r"head\..*"})
    mesh, family = build.start_devices(config), build.make_family(config)
    state, _ = pretrain.make_training(config, family, mesh)
    loaded, metadata = load_weights(start)
    assert np.abs(loaded["head"]["kernel"]).max() > 0 and not np.any(state.weights["head"]["kernel"])
    for weights in (state.weights, state.average):
        weights = dict(jax.device_get(weights))
        assert not np.any(weights.pop("head")["bias"])
        jax.tree.map(np.testing.assert_array_equal, weights, {k: v for k, v in loaded.items() if k != "head"})
    facts = pretrain.describe(config, family, "second")
    assert facts["command"] == "second" and json.loads(facts["start"]) == metadata
    assert "start" not in pretrain.describe(pretrain_config(tmp_path, 64), family, "first")
    config = pretrain_config(tmp_path, 64, **{"pretrain.start": str(start), "pretrain.fresh": "tail"})
    with pytest.raises(UserError, match="'tail' matches no weight; there are: .*head.kernel"):
        pretrain.make_training(config, build.make_family(config), mesh)


def test_captions_of_pretraining_are_no_tasks():
    config = load_config("sandbox")
    _, captions = build.make(config, "clips").batch(0, 0, 64)
    assert not any(order in caption for caption in captions for order in ("[", "Go ", "Stop ", "Push "))
