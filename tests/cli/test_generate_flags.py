"""How `generate` reads its flags, without generating."""

import json

import pytest

from world_distill import cli
from world_distill.errors import UserError
from world_distill.programs import generate
from world_distill.weights import lora_names


@pytest.fixture
def asked(monkeypatch):
    """What `generate` was called with: (request, config)."""
    calls = []
    monkeypatch.setattr(generate, "generate", lambda *args: calls.append(args) or (0, 0))
    return calls


def call(*flags):
    return cli.main(["generate", "--image", "x.png", "--task", "[a]: b.", "--out", "clips", *flags])


def test_the_recipe_is_that_of_the_published_model(asked):
    assert call("--recipe") == 0
    ((request, config),) = asked
    assert tuple(config.model.size) == (704, 1280) and (config.model.frames, config.model.fps) == (121, 24.0)
    assert (config.sampler.steps, config.sampler.shift) == (50, 5.0)
    assert (request.sampler, request.guidance, request.steps, request.shift) == ("unipc", 5.0, 0, None)
    assert request.negative == config.demonstrator.negative and request.negative.startswith("色调艳丽")


def test_flags_win_over_the_recipe_and_nothing_changes_without_it(asked):
    assert call("--recipe", "--guidance", "1", "--sampler", "euler", "--size", "480x832", "--steps", "8") == 0
    assert call("--config", "wan22_5b", "--executor", "a", "--executor", "b", "--strength", "0.5") == 0
    (first, config), (second, other) = asked
    assert (first.guidance, first.sampler, first.steps) == (1.0, "euler", 8) and tuple(config.model.size) == (480, 832)
    assert (second.guidance, second.sampler, second.negative) == (1.0, "euler", "")
    assert [str(path) for path in second.executors] == ["a", "b"] and second.strengths == (0.5,)
    assert tuple(other.model.size) == (480, 832) and other.model.frames == 49


def test_a_folder_is_a_run_or_a_lora(tmp_path):
    kinds = {
        "run": ["config.json"], "empty": [], "peft": ["adapter_model.safetensors", "adapter_config.json"],
        "diffusers": ["pytorch_lora_weights.safetensors"], "other": ["executor.safetensors"],
    }  # fmt: skip
    for name, files in kinds.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    assert {name for name in kinds if generate.is_run(tmp_path / name)} == {"run", "empty"}
    assert not generate.is_run(tmp_path / "run" / "config.json")


def test_strengths_that_do_not_fit_and_unknown_parts_are_explained(asked, capsys):
    assert call("--config", "wan22_5b", "--executor", "a", "--strength", "1", "--strength", "2") == 2
    assert "2 --strength for 1 --executor" in capsys.readouterr().err
    assert call("--config", "wan22_5b", "--executor", "a", "--alpha", "1", "--alpha", "2") == 2
    assert "2 --alpha for 1 --executor" in capsys.readouterr().err
    assert call("--config", "wan22_5b", *["--executor", "a"] * 2, "--alpha", "6", "--alpha", "0") == 0
    assert asked.pop()[0].alphas == (6.0, None)
    for part in lora_names.LEFT_OUT:
        assert call("--config", "wan22_5b", "--without", part) == 0
    with pytest.raises(SystemExit):
        call("--config", "wan22_5b", "--without", "everything")


def test_an_executor_that_is_not_there_is_named_before_the_model_is_asked_for(asked, capsys):
    assert call("--executor", "runs/mnie") == 2
    assert "--executor runs/mnie is not there" in capsys.readouterr().err


def test_clips_of_other_settings_name_the_settings_and_not_whole_sections(tmp_path):
    job = generate.Job("kitchen.base.0", "base", "[a]: b.", 0, {"image": "kitchen.jpg"}, lambda: ({}, {}))
    settings = {"steps": 4, "executor": None, "model": {"width": 32, **{f"k{i}": i for i in range(20)}}}
    assert not generate._is_done(tmp_path, job, settings)
    (tmp_path / "kitchen.base.0.json").write_text(json.dumps(generate._describe(job, settings) | {"later": 1}))
    assert generate._is_done(tmp_path, job, settings)
    with pytest.raises(UserError, match=r"other settings \(steps 4 -> 8, model.width 32 -> 64\); take another"):
        generate._is_done(tmp_path, job, {**settings, "steps": 8, "model": {**settings["model"], "width": 64}})
    with pytest.raises(UserError, match=r"and 13 more\)"):
        generate._is_done(tmp_path, job, {**settings, "model": {}})
