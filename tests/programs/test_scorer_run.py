"""A run whose reward and whose held-out judge are learned rewards."""

import json

import pytest
from ml_collections import ConfigDict
from small import make_inputs, small_config

from world_distill import build
from world_distill.errors import UserError
from world_distill.programs import train
from world_distill.settings.loading import from_json, to_json

FACTORY = "world_distill.judges:ScorerJudge"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def config_of(inputs, **overrides):
    """Reward: the scorer's VQ, as `quality`. Held out: both of its numbers, one with a threshold."""
    changes = {"steps": 2, "evaluate_every": 2, "objective.updates": 1, "objective.minibatches": 1, "rollout.clip": 0.0}
    config = small_config(inputs, **changes | overrides)
    with config.unlocked():
        for section in ("judge", "held_out"):
            config[section].factory = FACTORY
            config[section].options = ConfigDict({"scorer": "tests.judges.scorers:Several"})
        config.judge.options.measures = {"quality": "VQ"}
        config.held_out.options.measures = {"quality": "VQ", "length": "TA"}
        config.held_out.options.thresholds = {"length": 20.0}
        config.rollout.weights = ConfigDict({"quality": 1.0, "distill": 0.0})
    return config


def test_a_run_with_learned_rewards(inputs, tmp_path):
    config = config_of(inputs)
    assert to_json(from_json(to_json(config))) == to_json(config)
    train.train(config, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = log[0], log[-1]
    assert 0 < first["reward/quality"] < 255 and first["judge/invalid"] == 0 and first["reward/zero_std_ratio"] == 0
    assert "rate/quality" not in first  # it has no threshold
    assert last["held_out/quality"] is None and 0 <= last["held_out/length"] <= 1
    assert last["held_out/quality/correlation"] == pytest.approx(1)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"rollout.clip": 3.0}, "rollout.clip = 3 is in log-odds"),
        ({"judge.rubric": "1"}, "the rubric 1 has no effect with a learned reward"),
        ({"weights": {"task": 1.0}}, "rollout.weights has task, and the judge .* is asked for quality"),
    ],
)
def test_settings_of_a_judge_of_questions_are_refused(inputs, tmp_path, change, text):
    weights = change.pop("weights", None)
    config = config_of(inputs, **change)
    if weights is not None:
        config.rollout.weights = ConfigDict(weights)
    with pytest.raises(UserError, match=text):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_options_are_explained(inputs):
    from world_distill.cli.config_help import explain

    config = config_of(inputs)
    texts = {key: text for key, _, text in explain(config, "judge.options")}
    assert texts["judge.options.scorer"].startswith("address `package:function`")
    assert build.make(config, "judge").measures == {"quality": "VQ"}
