"""The command line: help, verbs, flags, and what an error looks like from outside."""

import argparse
import json
import pathlib
import subprocess
import sys
import types

import pytest

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


def test_no_verb_is_a_call_for_help(capsys):
    assert cli.main([]) == 0
    assert "usage: world-distill VERB" in capsys.readouterr().out


def test_help_of_a_verb_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: world-distill fake" in out and "Example:\n  world-distill fake --do nothing" in out
    assert "--log-level" in out and "(default: runs/fake)" in out


def test_help_of_a_verb_loads_no_jax():
    code = """
import sys
from world_distill.cli import command
for name in command.VERBS:
    try:
        command.main([name, "--help"])
    except SystemExit:
        pass
    assert "jax" not in sys.modules, name
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


def test_interrupt(config):
    assert cli.main(["fake", "--config", config, "--do", "interrupt"]) == 130


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
