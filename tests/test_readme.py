"""README.md's commands are well formed as they stand; `programs/test_quickstart` runs those about own pictures."""

import pathlib
import re
import shlex

import pytest

from world_distill.cli import arguments, command
from world_distill.settings.loading import load_config

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
VALIDATION = "--validation"


def commands(text):
    """The calls of world-distill in a piece of Markdown, each as its words behind `world-distill`."""
    blocks = re.findall(r"```sh\n(.+?)```", text, re.DOTALL)
    inline = re.findall(r"`(world-distill [^`]+)`", re.sub(r"```.+?```", "", text, flags=re.DOTALL))
    lines = [line for block in [*blocks, *inline] for line in block.replace("\\\n", " ").splitlines()]
    calls = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    # `train --config sandbox:VARIANT` stands for calls of several kinds.
    return [words[1:] for words in calls if words[:1] == ["world-distill"] and "VARIANT" not in " ".join(words)]


# Not those that only name a verb.
CALLS = [words for words in commands(README) if words[0] in command.VERBS and len(words) > 1]


def own_pictures():
    return commands(README[README.index("<!-- own -->") :].partition("```\n\n")[0] + "```\n")


def test_the_commands_are_found():
    assert {words[0] for words in CALLS} >= {"quickstart", "import-tasks", "encode", "train", "convert", "plan"}
    verbs = ["import-tasks", "inspect", "encode", "train", "train", "generate", "export"]
    assert [words[0] for words in own_pictures()] == verbs


@pytest.mark.parametrize("name", command.VERBS)
def test_every_verb_stands_in_the_table(name):
    assert re.search(rf"^\| `.*(world-distill |`){name}`.* \|", README, re.MULTILINE)


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_a_command_has_flags_and_keys_that_exist(words):
    flags, overrides = arguments.take_overrides(words[1:])
    parser, _ = command.parser_of(words[0])
    args = parser.parse(flags, lambda args: {})  # ends the test on a flag that is unknown or missing
    if getattr(args, "config", None):
        load_config(args.config, overrides)
