"""The command `world-distill VERB [flags]`.

A verb is a module with three members, imported only when the verb is called:

    HELP                    what it does, in a few lines, with examples
    add_arguments(parser)   its flags, on an `argparse` parser; the shared ones are in `arguments`
    run(args) -> int        does it; returns the exit code

`args.overrides` holds the `--config.KEY=VALUE` pairs; `arguments.config_from(args)` applies them. A
module that holds several verbs puts the verb's prefix before each name: `SCENES_HELP`, `scenes_run`.

Exit codes: 0 done, 2 a wrong call or an error that the user can mend, 69 another process of the job was lost, 75 told
to stop and saved, 130 interrupted.
"""

import argparse
import dataclasses
import difflib
import importlib
import sys
import traceback
import types
from collections.abc import Callable, Sequence

import world_distill
from world_distill import arguments


@dataclasses.dataclass(frozen=True)
class Verb:
    """Where a verb lives, and one line about it."""

    module: str
    summary: str
    prefix: str = ""


# In the order in which a project calls them.
VERBS = {
    "quickstart": Verb("world_distill.quickstart", "the whole method in a small world, in minutes on a CPU"),
    "scenes": Verb("world_distill.prepare", "collect or draw scene images", "scenes_"),
    "annotate": Verb("world_distill.prepare", "have a VLM write tasks and solutions for images", "annotate_"),
    "import-tasks": Verb("world_distill.import_tasks", "read the authors' WorldTasks, or a data set like it"),
    "encode": Verb("world_distill.prepare", "turn images and texts into the records that training reads", "encode_"),
    "inspect": Verb("world_distill.inspect_records", "show the records of a set, with pictures"),
    "convert": Verb("world_distill.convert", "turn published PyTorch weights into a checkpoint"),
    "pretrain": Verb("world_distill.pretrain", "train the sandbox's base model"),
    "probe": Verb("world_distill.probe", "before training, ask the judge whether the Demonstrator is better at all"),
    "train": Verb("world_distill.train", "train an Executor: distillation, RL, or both (WMSD)"),
    "generate": Verb("world_distill.generate", "make clips from images and texts"),
    "export": Verb("world_distill.export", "write the trained Executor as LoRA or weights for diffusers and ComfyUI"),
    "evaluate": Verb("world_distill.evaluate", "score models on held-out tasks"),
    "judgments": Verb(
        "world_distill.judgments", "audit the judge: count, compare, export, merge and repeat its answers"
    ),
    "report": Verb("world_distill.report", "make one HTML page of a run, with its clips"),
    "ablate": Verb("world_distill.ablate", "train the paper's variants and compare them"),
    "plan": Verb("world_distill.plan", "say whether a config fits a TPU slice, without having one"),
    "benchmark": Verb("world_distill.benchmark", "measure the speed of every part of the loop"),
}

_OVERVIEW = """\
usage: world-distill VERB [flags]

World Model Self-Distillation: teach a video model to solve tasks, with no videos of tasks.

verbs:
{verbs}

  world-distill VERB --help     explains a verb, its flags and its results
  world-distill --version

start here:
  world-distill quickstart

settings:
  --config FILE.py[:ARG] names a config file, or a packaged config by its bare name. Any value in
  it is set with --config.KEY=VALUE:
  world-distill train --config sandbox --config.seed=3 --workdir runs/three
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code. Help and flag errors raise SystemExit."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
        arguments.say(_OVERVIEW.format(verbs="\n".join(lines)).rstrip())
        return 0
    if argv[0] == "--version":
        arguments.say(f"world-distill {world_distill.__version__}")
        return 0
    name, *flags = argv
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}"
        return _fail(f"unknown verb {name!r}; {hint}")
    try:
        return _run(name, flags)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if (hosts := sys.modules.get("world_distill.hosts")) is not None:  # no verb without JAX needs to load it
            hosts.give_up()
        message = _explain(e)
        if (code := getattr(e, "exit_code", None)) is not None:
            return _fail(str(e), code)
        if message is None:
            raise
        if "--verbose" in flags:
            traceback.print_exc()
        return _fail(message)


def members(verb: Verb) -> tuple[str, Callable, Callable]:
    """A verb's help text, `add_arguments` and `run`. Imports its module."""
    module: types.ModuleType = importlib.import_module(verb.module)
    return (
        getattr(module, f"{verb.prefix}help".upper()),
        getattr(module, f"{verb.prefix}add_arguments"),
        getattr(module, f"{verb.prefix}run"),
    )


def _run(name: str, flags: list[str]) -> int:
    from world_distill.config import UserError

    flags, overrides = arguments.take_overrides(flags)
    try:
        help_text, add_arguments, run = members(VERBS[name])
    except ModuleNotFoundError as e:
        if e.name != VERBS[name].module:
            raise
        raise UserError(f"the verb {name!r} is not part of this installation") from e
    parser = argparse.ArgumentParser(
        prog=f"world-distill {name}",
        description=help_text.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    arguments.add_logging(parser)
    args = parser.parse_args(flags)
    if overrides and not hasattr(args, "config"):
        raise UserError(f"{name} reads no config, so --config.{next(iter(overrides))} means nothing")
    args.overrides = overrides
    arguments.start_logging(args.log_level)
    return run(args) or 0


def _explain(error: Exception) -> str | None:
    """One line for an error that says enough without a traceback; None for any other."""
    from world_distill.config import UserError

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
