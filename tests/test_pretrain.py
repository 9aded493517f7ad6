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
    changes = {"pretrain.steps": steps, "pretrain.batch": 16, "pretrain.log_every": 5, "pretrain.save_every": 4}
    return small_config(tmp_path, **changes | {"pretrain.warmup": 2} | overrides)


def test_brief_training_learns(tmp_path):
    config = pretrain_config(tmp_path, 80, **{"pretrain.save_every": 40})
    summary = pretrain.pretrain(config, tmp_path / "run", command="test")
    lines = [json.loads(line) for line in (tmp_path / "run" / "pretrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 81, 5))
    # Copying the scene is the first thing to learn, and lowers the error at once.
    assert lines[-1]["clean_error"] < 0.8 * lines[0]["clean_error"]
    assert summary["loss"] == pytest.approx(lines[-1]["loss"])
    weights, metadata = load_weights(tmp_path / "run" / "base.safetensors")
    assert metadata["command"] == "test" and metadata["seed"] == "0"
    config = pretrain_config(tmp_path, 80, base=str(tmp_path / "run" / "base.safetensors"))
    base = components.load_base(components.make_family(config), config, components.start_devices(config))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), weights)


def test_resumed_pretraining_equals_uninterrupted(tmp_path, monkeypatch):
    config = pretrain_config(tmp_path, 8)
    pretrain.pretrain(config, tmp_path / "whole", command="test")

    class Stop(Exception):
        pass

    save = pretrain.Checkpointer.save

    def stopping(self, step, *args, **kwargs):
        if step == 6:
            raise Stop
        return save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Checkpointer, "save", stopping)
        with pytest.raises(Stop):
            pretrain.pretrain(config, tmp_path / "parts", command="test")
    pretrain.pretrain(config, tmp_path / "parts", command="test")
    whole, parts = (load_weights(tmp_path / run / "base.safetensors")[0] for run in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_captions_of_pretraining_are_no_tasks():
    config = load_config("sandbox")
    _, captions = components.make(config, "clips").batch(0, 0, 64)
    assert not any(order in caption for caption in captions for order in ("[", "Go ", "Stop ", "Push "))
