"""The command `world-distill VERB [flags]`.

A verb is a module with three members, imported only when the verb is called:

    HELP                    what it does, in a few lines, with examples
    add_arguments(parser)   its flags, on an `argparse` parser; the shared ones are in `arguments`
    run(args) -> int        does it; returns the exit code

`args.overrides` holds the `--config.KEY=VALUE` pairs; `arguments.config_from(args)` applies them. A verb's module
imports inside `run` whatever loads JAX, so that `--help` is quick.

Exit codes: 0 done, 2 a wrong call or an error that the user can mend, 69 another process of the job was lost, 75 told
to stop and saved, 130 interrupted.
"""

import argparse
import importlib
import sys
import traceback
import types
from collections.abc import Callable, Sequence

import world_distill
from world_distill import console, errors
from world_distill.cli import arguments
from world_distill.cli.parser import Parser
from world_distill.errors import UserError, did_you_mean

# Verb -> one line about it, in the order in which a project calls them. Verb `a-b` is the module `cli/a_b.py`.
VERBS = {
    "quickstart": "the whole method in a small world, in minutes on a CPU",
    "scenes": "collect or draw scene images",
    "annotate": "have a VLM write tasks and solutions for images",
    "import-tasks": "read the authors' WorldTasks, or a data set like it",
    "import-videos": "read videos with captions or tasks, to fine-tune on their clips",
    "encode": "turn images and texts into the records that training reads",
    "inspect": "show the records of a set, with pictures",
    "convert": "turn published PyTorch weights into a checkpoint",
    "inspect-weights": "say what a file of weights is, and what each tool would do with it",
    "pretrain": "train the sandbox's base model",
    "probe": "before training, ask the judge whether the Demonstrator is better at all",
    "demonstrate": "give records the Demonstrator's clips, to fine-tune on them",
    "train": "train an Executor: distillation, RL, or both (WMSD)",
    "generate": "make clips from images and texts",
    "export": "write the trained Executor as LoRA or weights for diffusers and ComfyUI",
    "evaluate": "score models on held-out tasks",
    "judgments": "audit the judge: count, compare, export, merge and repeat its answers",
    "report": "make one HTML page of a run, with its clips",
    "ablate": "train the paper's variants and compare them",
    "reproduce": "fill the rows of the paper's table: base, captioned, fine-tuned, distilled, WMSD",
    "plan": "say whether a config fits a TPU slice, without having one",
    "benchmark": "measure the speed of every part of the loop",
    "doctor": "check this installation, in words with remedies",
    "completion": "print what completes verbs and flags in your shell",
}
# Verbs that go on where they stopped when they are called again.
RESUMES = {
    "quickstart", "annotate", "encode", "pretrain", "probe", "demonstrate", "train", "generate", "evaluate",
    "judgments", "ablate", "reproduce",
}  # fmt: skip

_OVERVIEW = """\
usage: world-distill VERB [flags]

World Model Self-Distillation: teach a video model to solve tasks, with no videos of tasks.

verbs:
{verbs}

  world-distill help VERB       explains a verb, its flags and its results
  world-distill --version       or -V

start here:
  world-distill quickstart

settings:
  --config FILE.py[:ARG] names a config file, or a packaged config by its bare name. Any value in
  it is set with --config.KEY=VALUE:
  world-distill train --config sandbox --config.seed=3 --workdir runs/three
  --help-config explains all keys of a config, --config.KEY=? one key or section.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code. Help and flag errors raise SystemExit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {name:<{width}}  {summary}" for name, summary in VERBS.items()]
        console.say(_OVERVIEW.format(verbs="\n".join(lines)).rstrip())
        return 0
    if argv[0] in ("-V", "--version"):
        console.say(f"world-distill {world_distill.__version__}")
        return 0
    name, *flags = argv
    if name not in VERBS:
        near = did_you_mean(name, VERBS)
        return _fail(f"unknown verb {name!r}; {near.replace('there are', 'the verbs are', 1)}")
    try:
        return _run(name, flags)
    except KeyboardInterrupt:
        goes_on = f"; the same command goes on from here:\n  {console.command(*argv)}" if name in RESUMES else ""
        sys.stderr.write(f"\nstopped{goes_on}\n")
        return 130
    except Exception as e:
        errors.report_failure()
        message = _explain(e)
        if (code := getattr(e, "exit_code", None)) is not None:
            return _fail(str(e), code)
        if message is None:
            raise
        if "--verbose" in flags:
            traceback.print_exc()
        return _fail(message)


def members(name: str) -> tuple[str, Callable, Callable]:
    """A verb's help text, `add_arguments` and `run`. Imports its module."""
    module: types.ModuleType = importlib.import_module(_module(name))
    return module.HELP, module.add_arguments, module.run


def parser_of(name: str) -> tuple[Parser, Callable]:
    """The parser of a verb's flags, and its `run`.

    Raises:
      UserError: this installation lacks the verb's module.
    """
    try:
        help_text, add_arguments, run = members(name)
    except ModuleNotFoundError as e:
        if e.name != _module(name):
            raise
        raise UserError(f"the verb {name!r} is not part of this installation") from e
    parser = Parser(name, help_text)
    add_arguments(parser)
    arguments.add_logging(parser)
    return parser, run


def _keys(args: argparse.Namespace) -> dict:
    """The values of the config that the flags name, by key, to say which of them was meant."""
    from world_distill.settings.loading import leaves, load_config

    return leaves(load_config(args.config)) if getattr(args, "config", None) else {}


def _module(name: str) -> str:
    return f"world_distill.cli.{name.replace('-', '_')}"


def _run(name: str, flags: list[str]) -> int:
    flags, overrides = arguments.take_overrides(flags)
    parser, run = parser_of(name)
    asked = [key for key, value in overrides.items() if value == "?"]
    if asked or arguments.HELP_CONFIG in flags:
        return _explain_config(name, parser, flags, overrides, asked)
    args = parser.parse(flags, _keys)
    if overrides and not hasattr(args, "config"):
        raise UserError(f"{name} reads no config, so --config.{next(iter(overrides))} means nothing")
    args.overrides = overrides
    arguments.start_logging(args.log_level)
    return run(args) or 0


def _explain_config(
    name: str, parser: argparse.ArgumentParser, flags: list[str], overrides: dict[str, str], asked: list[str]
) -> int:
    """Prints what the keys `asked` mean, or without any all keys of the config that the flags name."""
    from world_distill.cli import config_help
    from world_distill.settings.loading import load_config

    default = parser.get_default("config")
    if "--config" not in parser.format_usage():
        raise UserError(f"{name} reads no config, so there is nothing to explain")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=default)
    chosen = finder.parse_known_args(flags)[0].config
    if chosen is None:
        raise UserError(f"--config is needed: of which config? (such as --config sandbox {arguments.HELP_CONFIG})")
    config = load_config(chosen, {key: value for key, value in overrides.items() if key not in asked})
    for prefix in asked or [""]:
        for line in config_help.lines(config, prefix):
            console.say(line)
    return 0


def _explain(error: Exception) -> str | None:
    """One line for an error that says enough without a traceback; None for any other."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    # FloatingPointError is how training stops on a loss that is not finite.
    if isinstance(error, (UserError, ValueError, OSError, FloatingPointError)):
        return str(error) or type(error).__name__
    return None


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code
