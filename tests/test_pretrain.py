"""Pretraining learns, resumes bit for bit, and writes weights that the rest of the project loads."""

import json

import jax
import numpy as np
import pytest
from small import small_config

from world_distill import components, pretrain
from world_distill.checkpoints import load_weights
from world_distill.config import load_config


def pretrain_config(tmp_path, steps, **overrides):
    changes = {"pretrain.steps": steps, "pretrain.batch": 4, "pretrain.log_every": 8, "pretrain.save_every": 20}
    return small_config(tmp_path, **changes | {"pretrain.warmup": 2} | overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, folder, summary) of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    config = pretrain_config(folder, 64)
    return config, folder / "run", pretrain.pretrain(config, folder / "run", command="test")


def test_brief_training_learns(whole, tmp_path):
    _, run, summary = whole
    lines = [json.loads(line) for line in (run / "pretrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8, 65, 8))
    # Copying the scene is the first thing to learn, and lowers the error at once.
    assert lines[-1]["clean_error"] < 0.8 * lines[0]["clean_error"]
    assert summary["loss"] == pytest.approx(lines[-1]["loss"])
    weights, metadata = load_weights(run / "base.safetensors")
    assert metadata["command"] == "test" and metadata["seed"] == "0"
    config = pretrain_config(tmp_path, 64, base=str(run / "base.safetensors"))
    base = components.load_base(components.make_family(config), config, components.start_devices(config))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), weights)


@pytest.mark.once
def test_resumed_pretraining_equals_uninterrupted(whole, tmp_path, monkeypatch):
    config, run, _ = whole

    class Stop(Exception):
        pass

    save = pretrain.Checkpointer.save

    def stopping(self, step, *args, **kwargs):
        if step == 25:
            raise Stop
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Checkpointer, "save", stopping)
        with pytest.raises(Stop):
            pretrain.pretrain(config, tmp_path, command="test")
    pretrain.pretrain(config, tmp_path, command="test")
    one, other = (load_weights(folder / "base.safetensors")[0] for folder in (run, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_captions_of_pretraining_are_no_tasks():
    config = load_config("sandbox")
    _, captions = components.make(config, "clips").batch(0, 0, 64)
    assert not any(order in caption for caption in captions for order in ("[", "Go ", "Stop ", "Push "))
