"""The command line: help, verbs, flags, and what an error looks like from outside."""

import argparse
import importlib
import inspect
import json
import pathlib
import shlex
import subprocess
import sys
import types

import pytest
from absl import logging

from world_distill import cli
from world_distill.cli import arguments, command
from world_distill.errors import UserError

CONFIG = """
from ml_collections import ConfigDict
def get_config(arg):
    return ConfigDict({"seed": 1, "train": {"steps": 10, "arg": arg}})
"""

VERB = '''
"""A verb for the tests."""
import pathlib
from world_distill.cli import arguments
from world_distill.storage import atomic

HELP = """
Does what the test asks for: 100% of it.

Example:
  world-distill fake --do nothing
"""

def add_arguments(parser):
    arguments.add_config(parser)
    arguments.add_workdir(parser, "runs/fake")
    arguments.add_json(parser)
    arguments.add_seed(parser)
    parser.add_argument("--do", default="nothing")

def run(args):
    if args.do == "value":
        raise ValueError("the value is wrong")
    if args.do == "read":
        pathlib.Path("no/such/file").read_text()
    if args.do == "diverge":
        raise FloatingPointError("loss is nan at step 3")
    if args.do == "interrupt":
        raise KeyboardInterrupt
    if args.do == "bug":
        raise KeyError("a bug")
    config = arguments.config_from(args)
    if args.json:
        atomic.write_json(args.json, config.to_dict() | {"workdir": args.workdir})
    return 3 if args.do == "fail" else None
'''


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(CONFIG)
    return str(file)


@pytest.fixture(autouse=True)
def verbs(tmp_path, monkeypatch):
    module = types.ModuleType("world_distill.cli.fake")
    exec(VERB, module.__dict__)
    monkeypatch.setitem(sys.modules, "world_distill.cli.fake", module)
    monkeypatch.setitem(command.VERBS, "fake", "a fake")
    monkeypatch.setitem(command.VERBS, "absent", "not there")
    monkeypatch.chdir(tmp_path)


def settings(capsys, *argv):
    """The config that `fake` ends up with."""
    assert cli.main(["fake", "--json", "out.json", *argv]) == 0, capsys.readouterr().err
    return json.loads(pathlib.Path("out.json").read_text())


def error(capsys, *argv):
    """What the call says on stderr, having failed with exit code 2 and nothing on stdout."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def call(*argv):
    root = pathlib.Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, *argv], cwd=root, capture_output=True, text=True)


# ---- Help


def test_overview_names_every_verb_and_imports_nothing_heavy():
    code = "import sys; from world_distill.cli.command import main; main(['--help']); print('jax' in sys.modules)"
    done = call("-c", code)
    assert done.returncode == 0
    for name, summary in command.VERBS.items():
        if name not in ("fake", "absent"):
            assert f"  {name} " in done.stdout and summary in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_runs_as_a_module():
    done = call("-m", "world_distill", "--version")
    assert done.returncode == 0 and done.stdout.startswith("world-distill ")
    done = call("-m", "world_distill", "trian")
    assert done.returncode == 2 and done.stderr == "error: unknown verb 'trian'; did you mean 'train'?\n"


@pytest.mark.parametrize("argv", [[], ["help"], ["-h"], ["--help"]])
def test_no_verb_is_a_call_for_help(capsys, argv):
    assert cli.main(argv) == 0
    assert "usage: world-distill VERB" in capsys.readouterr().out


def test_help_of_a_verb_by_its_name_and_the_short_flag_of_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["help", "fake"])
    assert stop.value.code == 0 and "usage: world-distill fake" in capsys.readouterr().out
    assert error(capsys, "help", "fak") == "unknown verb 'fak'; did you mean 'fake'?"
    assert cli.main(["-V"]) == 0 and capsys.readouterr().out.startswith("world-distill ")


def test_help_of_a_verb_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: world-distill fake" in out and "Example:\n  world-distill fake --do nothing" in out
    assert "--log-level" in out and "(default: runs/fake)" in out


def test_help_of_a_verb_loads_nothing_heavy():
    code = """
import sys
heavy = {"jax", "torch", "tensorboardX", "transformers", "PIL", "orbax", "grain", "tqdm", "ml_collections"}
from world_distill.cli import command
for name in command.VERBS:
    try:
        command.main([name, "--help"])
    except SystemExit:
        pass
    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))
"""
    done = call("-c", code)
    assert done.returncode == 0, done.stderr


# ---- Flags


def test_config_overrides_in_both_forms(capsys, config):
    got = settings(capsys, f"--config={config}:tall", "--config.seed=3", "--config.train.steps", "-5")
    assert got == {"seed": 3, "train": {"steps": -5, "arg": "tall"}, "workdir": "runs/fake"}


def test_last_override_counts_and_values_may_hold_anything(capsys, config):
    flags = ["--config.train.arg=x", "--config.train.arg=a=b --c", "--workdir", "elsewhere"]
    got = settings(capsys, "--config", config, *flags)
    assert got["train"]["arg"] == "a=b --c" and got["workdir"] == "elsewhere"


def test_a_bucket_is_no_workdir_but_there_are_settings_for_one(capsys, config):
    with pytest.raises(SystemExit):
        cli.main(["fake", "--config", config, "--workdir", "gs://bucket/run"])
    assert "set --config.checkpoints=gs://bucket/run (and --config.judge.cache" in capsys.readouterr().err


def test_seed_is_short_for_the_configs_seed(capsys, config):
    assert settings(capsys, "--config", config, "--seed", "9")["seed"] == 9
    message = error(capsys, "fake", "--config", config, "--seed", "9", "--config.seed=8")
    assert message == "give either --seed or --config.seed, not both"


def test_exit_code_of_the_verb_is_the_commands(config):
    assert cli.main(["fake", "--config", config, "--do", "fail"]) == 3


def test_abbreviated_and_unknown_flags_are_refused(capsys, config):
    for flag in ("--work=x", "--what"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["fake", "--config", config, flag])
        assert stop.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_a_pattern_that_the_shell_took_apart_is_told_of_quotes(capsys, tmp_path):
    files = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for file in files:
        file.touch()
    with pytest.raises(SystemExit):
        cli.main(["annotate", "--images", *map(str, files), "--out", "data"])
    assert "a pattern of files stands in quotes" in capsys.readouterr().err


def test_a_flag_that_is_like_no_other_is_not_guessed_at(capsys):
    with pytest.raises(SystemExit):
        cli.main(["encode", "--config", "wan22_5b:debug", "--records", "data", "--out", "data2"])
    err = capsys.readouterr().err
    assert "unrecognized arguments: --out data2 (" in err and "did you mean" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "4"], "a value of the config is set with --config.train.steps=4"),
        (["--steps=4"], "--config.train.steps=4"),
        (["--stepz", "4"], "did you mean --config.train.steps=4?"),
        (["--sed", "4"], "did you mean --seed?"),
        (["--seed", "-1"], "argument --seed: must be at least 0"),
        (["—seed", "4"], "the dash is one of typography, as web pages have it; type --seed"),
        (["-–seed", "4"], "type --seed"),
        (["--do=“nothing”"], "the quotes are those of typography"),
        ([" ", "--seed", "3"], "a backslash that continues a line has to be the last character"),
        (["--log-level", "wraning"], "--log-level wraning: did you mean 'warning'? (there are debug, info"),
    ],
)
def test_a_flag_that_is_not_there_says_what_was_meant(capsys, config, flags, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--config", config, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and "world-distill fake --help" in err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--config.train.steps", "=", "4"], ["--config.train.steps", "=4"]])
def test_spaces_around_the_sign_are_named(capsys, config, flags):
    assert "without spaces around the =" in error(capsys, "fake", "--config", config, *flags)


def test_a_home_folder_behind_an_equals_sign_is_the_home_folder(capsys, config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert settings(capsys, "--config", config, "--workdir=~/runs/mine")["workdir"] == "/home/me/runs/mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--config", "wan22_5b:debug", "--topology", "local", "--phases", "decod"], "did you mean 'decode'?"),
        (["evaluate", "--workdir", "x", "--roles", "bas"], "did you mean 'base'?"),
        (["pretrain", "--config", "wan22_5b:debug", "--workdir", "x"], "section 'pretrain', which this config has not"),
        (["scenes", "--config", "wan22_5b", "--out", "x"], "section 'scenes'"),
        (["quickstart", "--config", "wan22_5b", "--workdir", "x"], "section 'scenes'"),
        (["pretrain", "--workdir", "x", "--config.pretrain.log_every=0"], "pretrain.log_every must be at least 1"),
        (["train", "--config", "sandbox", "--workdir", "x", "--config.steps=-4"], "steps must be at least 1"),
    ],
)
def test_a_wrong_choice_or_value_ends_a_verb_before_it_does_anything(capsys, tmp_path, argv, message):
    before = set(tmp_path.iterdir())
    assert message in error(capsys, *argv)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--out", "x", "--steps", "0"], ["generate", "--out", "x", "--count", "0"],
        ["scenes", "--out", "x", "--count", "0"], ["evaluate", "--workdir", "x", "--limit", "-1"],
        ["evaluate", "--workdir", "x", "--clips", "-1"], ["evaluate", "--workdir", "x", "--clips", "some"],
        ["benchmark", "--repeats", "0"], ["probe", "--workdir", "x", "--clips", "0"],
        ["plan", "--config", "sandbox", "--topology", "local", "--utilisation", "0"],
        ["generate", "--out", "x", "--guidance", "0.5"], ["judgments", "x", "--flips", "-1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_by_the_flag(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and " must be " in capsys.readouterr().err


# Verbs whose last lines say what they made, where and what comes next.
FINISHING = set(command.VERBS) - {"completion"}


@pytest.mark.parametrize("name", sorted(FINISHING))
def test_a_verb_ends_with_what_it_made(name):
    source = inspect.getsource(importlib.import_module(f"world_distill.cli.{name.replace('-', '_')}"))
    assert "console.finish(" in source


def test_completion_knows_verbs_flags_and_choices(capsys, monkeypatch):
    pytest.importorskip("shtab")
    monkeypatch.delitem(command.VERBS, "absent")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("quickstart", "import-tasks", "--workdir", "merged", "doctor"))


def test_completion_without_its_package_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert error(capsys, "completion", "zsh") == "shtab is not installed; install it: pip install shtab"


def test_overrides_stop_at_two_dashes():
    assert arguments.take_overrides(["--config.a=1", "--", "--config.b=2"]) == (["--", "--config.b=2"], {"a": "1"})


# ---- Errors


def test_unknown_verb(capsys):
    assert error(capsys, "quikstart") == "unknown verb 'quikstart'; did you mean 'quickstart'?"
    assert "the verbs are" in error(capsys, "xyzzy")
    assert error(capsys, "absent") == "the verb 'absent' is not part of this installation"


def test_unknown_key_and_missing_file(capsys, config):
    message = error(capsys, "fake", "--config", config, "--config.train.stepz=5")
    assert message == "unknown config key 'train.stepz'; did you mean 'train.steps'?"
    assert "no.py: no such config file" in error(capsys, "fake", "--config", "no.py")


@pytest.mark.parametrize("flags", [["--config.train.steps"], ["--config.train.steps", "--seed", "3"]])
def test_key_without_a_value(capsys, config, flags):
    assert "--config.train.steps needs a value" in error(capsys, "fake", "--config", config, *flags)


def test_override_of_a_verb_that_reads_no_config(capsys):
    assert (
        error(capsys, "report", "--workdir", "x", "--config.a=1")
        == "report reads no config, so --config.a means nothing"
    )


@pytest.mark.parametrize(
    "do, message",
    [
        ("value", "the value is wrong"),
        ("read", "no/such/file: No such file or directory"),
        ("diverge", "loss is nan at step 3"),
    ],
)
def test_errors_that_explain_themselves_are_one_line(capsys, config, do, message):
    assert error(capsys, "fake", "--config", config, "--do", do) == message
    assert cli.main(["fake", "--config", config, "--do", do, "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bugs_keep_their_traceback(config):
    with pytest.raises(KeyError):
        cli.main(["fake", "--config", config, "--do", "bug"])


def test_ctrl_c_says_how_to_go_on_where_a_verb_does(config, capsys, monkeypatch):
    call = ["fake", "--config", config, "--do", "interrupt"]
    assert cli.main(call) == 130
    assert capsys.readouterr().err == "\nstopped\n"
    monkeypatch.setattr(command, "RESUMES", {"fake"})
    assert cli.main([*call, "--workdir", "my runs"]) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "stopped; the same command goes on from here:"
    assert shlex.split(said[2]) == ["world-distill", *call, "--workdir", "my runs"]


def test_a_warning_is_a_sentence_and_not_a_line_of_absl(config, capfd):
    arguments.start_logging("warning")
    logging.warning("clips %s", "flicker")
    assert capfd.readouterr().err == "warning: clips flicker\n"


def test_config_is_required_unless_it_has_a_default():
    parser = argparse.ArgumentParser(exit_on_error=False)
    arguments.add_config(parser, "sandbox")
    assert parser.parse_args([]).config == "sandbox"
    with pytest.raises(UserError):
        arguments.take_overrides(["--config.x"])


def test_the_bar_starts_where_the_work_does(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with arguments.progress_bar("record") as show:
        for done in (4, 6, 9):
            show(done, 10)
        bar = show.__self__._bar
    assert (bar.initial, bar.n, bar.total) == (4, 9, 10)
