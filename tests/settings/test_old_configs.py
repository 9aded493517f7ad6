"""Configs of earlier versions keep their gradient, and are never read in other units without a word."""

import json

import pytest

from world_distill.devices.sharding import make_mesh
from world_distill.settings import old_configs
from world_distill.settings.loading import from_json, load_config, to_json
from world_distill.training.step_programs import make_programs


def old(**objective) -> dict:
    """Today's sandbox config as an earlier version would have written it."""
    config = json.loads(to_json(load_config("sandbox")))
    config["objective"]["awm_temperature"] = config["objective"].pop("awm_ratio_temperature")
    for section, names in {"objective": ("nft_beta", "nft_old"), "rollout": ("distill_min_time", "std_floor")}.items():
        for name in names:
            del config[section][name]
    del config["demonstrator"], config["model"]["add_scene"]
    config["base"] = ""  # the base that shipped
    config["objective"] |= {"rl_weight": [[90, 0.0], [91, 1.0]], "beta_d": [[0, 1.0], [90, 1.0], [91, 2.0]]} | objective
    return config


def test_an_old_run_keeps_the_weights_that_it_had():
    """RL's gradient was divided by the temperature: 1 / .005 is 200, beside an anchor at 2."""
    config = from_json(json.dumps(old()))
    assert config.objective.rl_weight == ((90, 0.0), (91, pytest.approx(200.0)))
    assert config.objective.beta_d == ((0, 1.0), (90, 1.0), (91, 2.0))
    assert config.objective.awm_ratio_temperature == 0.005 and "awm_temperature" not in config.objective
    assert config.rollout.std_floor == 0.0 and config.objective.nft_old == "start"
    assert config.demonstrator.guidance == config.rollout.guidance == 1.0
    assert config.base == "1" and config.model.add_scene is False  # the base that shipped then
    assert from_json(to_json(config)) == config  # once


@pytest.mark.parametrize("rl", ["flow_grpo", "none"])
def test_other_losses_had_no_temperature(rl):
    config = from_json(json.dumps(old(rl=rl)))
    assert config.objective.rl_weight == ((90, 0.0), (91, 1.0))


def test_a_plain_weight_and_the_current_policy():
    config = from_json(json.dumps(old(rl_weight=1.0, awm_old="current")))
    assert config.objective.rl_weight == pytest.approx(200.0) and config.objective.awm_ratio_temperature == 1.0


def test_todays_configs_are_left_alone():
    text = to_json(load_config("sandbox"))
    assert to_json(from_json(text)) == text and not old_configs.is_old(json.loads(text))


def test_a_config_file_in_old_units_is_refused():
    config = load_config("sandbox")
    with config.unlocked():
        config.objective.awm_temperature = 0.005
        del config.objective["awm_ratio_temperature"]
    with pytest.raises(ValueError, match="awm_ratio_temperature, and divide objective.rl_weight"):
        make_programs(config, make_mesh())


def test_a_run_of_the_second_base_keeps_it():
    config = json.loads(to_json(load_config("sandbox")))
    assert from_json(json.dumps(config)).base == "3"
    config["base"] = ""
    assert from_json(json.dumps(config)).base == "2"


def test_keys_that_an_earlier_version_did_not_know_have_their_defaults():
    config = json.loads(to_json(load_config("wan22_5b")))
    del config["objective"]["nft_beta"], config["held_out"], config["train_set"]
    read = from_json(json.dumps(config))
    assert read.objective.nft_beta == 1.0 and read.held_out.factory == "" and read.train_set == "train"
    assert "pretrain" not in read
