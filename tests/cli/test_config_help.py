"""Every key of every shipped config is explained where it is defined, and can be asked for."""

import pytest

from world_distill import cli
from world_distill.cli.config_help import documented, explain, lines
from world_distill.errors import UserError
from world_distill.settings.defaults import SECTIONS
from world_distill.settings.loading import load_config

SHIPPED = (
    "sandbox", "sandbox:wmsd_guided", "wan22_5b", "wan22_5b:wmsd", "wan22_5b:debug", "wan_sizes:14b", "ltx2",
    "ltx2:debug",
)  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_config_is_explained(name):
    config = load_config(name)
    found = {key: text for key, _, text in explain(config)}
    assert len(found) > 100
    assert [key for key, text in found.items() if len(text) < 5] == []


def test_texts_come_from_the_docstrings():
    assert documented(SECTIONS["sampler"])["shift"].startswith("shift of the uniform grid of times")
    texts = {key: text for key, _, text in explain(load_config("wan22_5b:wmsd"))}
    assert texts["judge.options.min_mass"] == "probability that yes and no together need, or the answer does not count."
    assert texts["held_out.options.min_mass"] == texts["judge.options.min_mass"]  # without a factory of its own
    assert texts["model.vae.decoder_width"].startswith("channels of the decoder")
    assert texts["rollout.weights.task"].startswith("lambda of each reward (Eq. 10)")


def test_one_key_a_section_and_the_value_that_was_given(capsys):
    flags = ["train", "--config", "sandbox", "--config.sampler.steps=8"]
    assert cli.main([*flags, "--config.sampler=?"]) == 0
    out = capsys.readouterr().out
    assert "--config.sampler.steps=8  (default: 12)" in out and "--config.sampler.shift=3.0  (default: 5.0)" in out
    assert "sampler steps of a rollout" in out and "rollout.group" not in out


def test_a_verb_needs_none_of_its_other_flags_for_that(capsys):
    assert cli.main(["plan", "--config", "wan22_5b", "--help-config"]) == 0
    assert "--config.objective.beta_d=" in capsys.readouterr().out
    assert cli.main(["encode", "--config.mesh=?"]) == 0  # its own default config
    assert "devices along the batch rows" in capsys.readouterr().out


def test_what_cannot_be_explained_is_refused(capsys):
    assert cli.main(["report", "--help-config"]) == 2
    assert "report reads no config" in capsys.readouterr().err
    assert cli.main(["train", "--help-config"]) == 2
    assert "--config is needed" in capsys.readouterr().err
    with pytest.raises(UserError, match="'sampler.step'"):
        list(lines(load_config("sandbox"), "sampler.step"))
