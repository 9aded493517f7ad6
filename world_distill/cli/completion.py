"""`world-distill completion`."""

import argparse

from world_distill import console
from world_distill.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")

HELP = """\
Print what completes verbs, flags and their choices in a shell. Needs the extra `completion` (shtab).

  world-distill completion bash > ~/.local/share/bash-completion/completions/world-distill
  world-distill completion zsh > ~/.zfunc/_world-distill        # a folder of fpath, before compinit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")


def run(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise UserError("shtab is not installed", remedy="install it", command="pip install shtab") from error
    console.say(shtab.complete(whole_parser(), shell=args.shell).rstrip())
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser with every verb as a subcommand: what completion tools read."""
    from world_distill.cli import arguments, command

    parser = argparse.ArgumentParser(prog="world-distill")
    parser.add_argument("-V", "--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb")
    for name, summary in command.VERBS.items():
        verb = verbs.add_parser(name, help=summary)
        command.members(name)[1](verb)
        arguments.add_logging(verb)
    return parser
