"""Values that settings may have: one table for configs, dataclasses and flags."""

import argparse
import dataclasses

import pytest

from world_distill.cli import arguments
from world_distill.errors import SettingError, UserError
from world_distill.settings import ranges
from world_distill.settings.defaults import SECTIONS
from world_distill.settings.loading import leaves, load_config, need, override, packaged_configs
from world_distill.settings.objective import Objective


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("steps", "-4", "at least 1, not -4"),
        ("steps", "0", "at least 1, not 0 (default: --config.steps=100)"),
        ("log_every", "0", "at least 1"),
        ("save_every", "0", "at least 1"),
        ("pretrain.log_every", "0", "at least 1"),
        ("evaluate_every", "-1", "at least 0"),
        ("seed", "-1", "at least 0 and below 4294967296"),
        ("sampler.steps", "0", "at least 1"),
        ("sampler.shift", "0", "above 0"),
        ("sampler.shift", "nan", "above 0, not nan"),
        ("sampler.sde", "CPS", "one of flow_grpo, cps"),
        ("executor.alpha", "inf", "above 0, not inf"),
        ("rollout.weights.task", "-1", "at least 0"),
        ("rollout.micro_batch", "-2", "at least 0"),
        ("mesh.fsdp", "0", "at least 1, or -1"),
        ("judge.keep_clips", "1.5", "at least 0 and at most 1"),
        ("optimizer.learning_rate", "((0, 1e-3), (9, -1e-3))", "at least 0, not -0.001"),
        ("optimizer.b2", "1.0", "below 1"),
        ("optimizer.name", "adma", "did you mean 'adam'?"),
        ("objective.rl", "grpo", "did you mean 'flow_grpo'?"),
        ("scenes.train", "-5", "at least 0"),
        ("model.frames", "0", "at least 1"),
    ],
)
def test_a_config_refuses_a_value_out_of_range_before_anything_begins(key, value, allowed):
    with pytest.raises(SettingError) as caught:
        load_config("sandbox", {key: value})
    assert str(caught.value).startswith(f"config key {key} must be ") and allowed in str(caught.value)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


def test_all_wrong_values_are_named_at_once_also_those_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from world_distill.config import default_config\n\n\ndef get_config():\n"
                    "    c = default_config()\n    c.steps, c.rollout.group = 0, -3\n    return c\n")  # fmt: skip
    with pytest.raises(SettingError, match=r"rollout\.group must be .*(\n.*)steps must be"):
        load_config(str(file))
    assert load_config(str(file), {"steps": 5, "rollout.group": 2}).steps == 5  # which an override mends


def test_settings_check_themselves_by_the_same_table():
    with pytest.raises(SettingError, match=r"objective\.updates must be at least 1, not 0"):
        Objective(updates=0)
    with pytest.raises(SettingError, match=r"objective\.beta_d must be at least 0, not -0\.1"):
        Objective(beta_d=((0, 0.1), (5, -0.1)))


def test_the_table_names_keys_that_exist_and_holds_their_defaults():
    sections = {f"{section}.{f.name}".lstrip(".") for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    for key in ranges.RANGES:
        section, _, name = key.rpartition(".")
        assert key in sections or section in ("model", "rollout.weights") or name == "*", key
    for name in packaged_configs():
        config = load_config(name)  # checks
        assert not [key for key, value in leaves(config).items() if ranges.problem(key, value)]


def test_a_flag_is_read_by_a_range():
    assert arguments.COUNT("3") == 3 and arguments.SHARE("0.5") == 0.5 and arguments.LIMIT("0") == 0
    for kind, text, message in (
        (arguments.COUNT, "0", "must be at least 1, not 0"), (arguments.COUNT, "2.5", "a whole number, at least 1"),
        (arguments.LIMIT, "-1", "at least 0"), (arguments.PART, "0", "above 0"), (arguments.SEED, "-1", "at least 0"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            kind(text)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.learning_rate", "1e-3", ((0, 1e-3),)),
        ("objective.beta_d", "0", ((0, 0.0),)),
        ("optimizer.learning_rate", "((0, 1e-3), (50, 1e-4))", ((0, 1e-3), (50, 1e-4))),
        ("steps", "1e3", 1000),
        ("steps", "10_000", 10_000),
        ("data", "~/records", None),
    ],
)
def test_a_value_is_understood_in_the_forms_that_people_write(key, text, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = leaves(load_config("sandbox", {key: text}))[key]
    assert found == ("/home/me/records" if value is None else value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optimizer.learning_rate", "fast", r"a number, or points \(\(step, value\), \.\.\.\)"),
        ("steps", "2.5", "expected int, got '2.5'"),
    ],
)
def test_a_value_that_is_not_understood_is_refused_with_the_form(key, text, message):
    with pytest.raises(UserError, match=message):
        load_config("sandbox", {key: text})


@pytest.mark.parametrize(
    ("spec", "meant"), [("sandbox:wmds", "wmsd"), ("wan22_5b:debgu", "debug"), ("sandboks", "sandbox")]
)
def test_a_variant_or_config_that_is_not_there_says_which_was_meant(spec, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        load_config(spec)


def test_only_what_is_set_now_is_checked_on_a_config_that_was_kept():
    config = load_config("sandbox")
    with config.unlocked():
        config.steps = 0  # as an earlier version let it be
    override(config, {"log_every": "2"})
    with pytest.raises(SettingError, match="log_every"):
        override(config, {"log_every": "0"})


def test_a_stage_that_a_config_has_not_is_named_with_a_config_that_has_it():
    with pytest.raises(UserError, match=r"pretrain reads the config's section 'pretrain'.*--config sandbox"):
        need(load_config("wan22_5b:debug"), "pretrain", "clips", what="pretrain")
    need(load_config("sandbox"), "pretrain", "clips", what="pretrain")
