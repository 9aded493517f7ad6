"""Flags that several verbs share, and how their values are read.

A verb's `add_arguments(parser)` calls the `add_*` functions here for what it takes. `--config.key=value`
is not a flag of argparse: `take_overrides` collects it first, and `config_from` applies it.
"""

import argparse
import contextlib
import logging as python_logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from world_distill import console
from world_distill.errors import UserError, did_you_mean
from world_distill.settings import ranges

HELP_CONFIG = "--help-config"  # `command` looks for it before it parses the other flags
LOG_LEVELS = ("debug", "info", "warning", "error")


def number(allowed: ranges.Range, kind: type = int) -> Callable[[str], Any]:
    """The `type` of a flag that takes a number of a range, of `settings.ranges`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, {allowed}, not {text!r}") from error
        if not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    return parse


# Types of flags that take a number.
COUNT = number(ranges.ONE)
LIMIT = number(ranges.SOME)
SEED = number(ranges.SEED)
PART = number(ranges.PART, float)
SHARE = number(ranges.SHARE, float)
SCALE = number(ranges.SCALE, float)
POSITIVE = number(ranges.POSITIVE, float)
ALPHA = number(ranges.SOME, float)  # of a LoRA file that does not say it; 0: what the file says


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--config`, required where there is no default; the verb then takes `--config.key` as well."""
    parser.add_argument(
        "--config",
        metavar="FILE.py[:ARG]",
        default=default,
        required=default is None,
        help="config file, or the bare name of a packaged config; "
        "any of its leaves is set with --config.KEY=VALUE" + _default(default),
    )
    parser.add_argument(HELP_CONFIG, action="store_true", help="explain all keys of the config; --config.KEY=?: one")


def add_workdir(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--workdir`, a path; required where there is no default."""
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=_local_folder,
        default=pathlib.Path(default) if default else None,
        required=default is None,
        help="folder of this run; an interrupted run continues from what it finds there" + _default(default),
    )


def _local_folder(text: str) -> pathlib.Path:
    if "://" in text:  # a path would make one slash of the two, and then a folder of it
        raise argparse.ArgumentTypeError(
            f"{text} is an address, and this is a folder of a file system. To keep what matters in a bucket, take a"
            f" folder and set --config.checkpoints={text} (and --config.judge.cache={text.rstrip('/')}/judgments)"
        )
    return path(text)


def path(text: str) -> pathlib.Path:
    """The `type` of a flag that takes a path. A shell leaves the ~ of `--out=~/clips` as it is."""
    return pathlib.Path(text).expanduser()


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, where the verb's figures go besides the terminal."""
    parser.add_argument(
        "--json",
        metavar="PATH",
        type=path,
        help="also write the figures to this file, as JSON",
    )


def add_seed(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """`--seed`. With a config and no default it is short for `--config.seed`."""
    parser.add_argument(
        "--seed",
        metavar="N",
        type=SEED,
        default=default,
        help="seed of all that is random in this run" + _default(default),
    )


def chosen(flag: str, text: str, allowed: Iterable[str]) -> tuple[str, ...]:
    """The words of a flag that takes some of those allowed, with commas between; all of them for "".

    Raises:
      UserError: a word that is not allowed; the message says which one it is like.
    """
    allowed = tuple(allowed)
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if unknown := [word for word in words if word not in allowed]:
        raise UserError(f"{flag} {text}: {unknown[0]!r} is unknown; {did_you_mean(unknown[0], allowed)}")
    return words or allowed


def one_each(flag: str, values: Sequence[Any], of: str, count: int, default: Any) -> tuple[Any, ...]:
    """The values of a repeatable flag, one for each of `count`: the one that was given, or the default, for all.

    Raises:
      UserError: another number of values.
    """
    if len(values) not in (0, 1, count):
        raise UserError(f"{len(values)} {flag} for {count} {of}: give one, or one for each")
    return tuple(values) if len(values) == count else tuple(values or (default,)) * count


def seeds(text: str) -> list[int]:
    """The seeds of `--seeds`.

    Raises:
      UserError: not whole numbers with commas between, one that a run cannot have, or one named twice.
    """
    try:
        found = [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text}: not whole numbers with commas between") from error
    if wrong := [seed for seed in found if not ranges.SEED.holds(seed)]:
        raise UserError(f"--seeds {text}: a seed must be {ranges.SEED}, not {wrong[0]}")
    if len(set(found)) < len(found):
        raise UserError(f"--seeds {text}: names a seed twice")
    return found


def add_logging(parser: argparse.ArgumentParser) -> None:
    """`--log-level` and `--verbose`; every verb has them."""
    text = "of this program and of Orbax, which has much to say (default: warning)"
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help=text)
    parser.add_argument("--verbose", action="store_true", help="on an error, show the traceback as well")


def start_logging(level: str) -> None:
    """Sends absl's log to stderr from `level` on. Programs silence it on processes other than 0."""
    from absl import logging

    logging.set_verbosity(level)
    logging.set_stderrthreshold(level)
    root = python_logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Sentences)]:
        root.removeHandler(handler)
    # Whoever looks for a mistake wants the time and the line; anyone else, a sentence.
    if level in ("debug", "info"):
        logging.use_absl_handler()
    else:
        root.removeHandler(logging.get_absl_handler())
        root.addHandler(_Sentences())


class _Sentences(python_logging.Handler):
    """Writes a log's line as a sentence: "warning: ..."."""

    def emit(self, record: python_logging.LogRecord) -> None:
        sys.stderr.write(f"{record.levelname.lower()}: {record.getMessage()}\n")


def take_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits argv into what argparse reads and the `--config.KEY=VALUE` or `--config.KEY VALUE` pairs.

    Raises:
      UserError: a key without a value.
    """
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        if word == "--":
            return [*rest, word, *words], overrides
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith(("--", "=")):
                raise UserError(f"{word} needs a value: {word}=VALUE, without spaces around the =")
        overrides[key] = value
    return rest, overrides


def config_from(args: argparse.Namespace, *, needs: Sequence[str] = (), verb: str = "this verb") -> Any:
    """The locked ConfigDict that `--config`, its overrides and `--seed` describe.

    `needs` are sections that most configs do not have and that this verb reads.

    Raises:
      UserError: see `load_config`; or `--seed` and `--config.seed` were both given; or a section is missing.
    """
    from world_distill.settings.loading import load_config, need

    overrides = dict(args.overrides)
    if getattr(args, "seed", None) is not None:
        if "seed" in overrides:
            raise UserError("give either --seed or --config.seed, not both")
        overrides["seed"] = str(args.seed)
    if needs:  # before the overrides, which may be of just these sections
        need(load_config(args.config), *needs, what=verb)
    if not any(".options." in key or key.endswith(".factory") for key in overrides):
        return load_config(args.config, overrides)
    from world_distill import build  # which loads JAX

    return build.load(args.config, overrides)


def _default(default: object) -> str:
    return "" if default is None else f" (default: {default})"


def parse_shard(text: str) -> tuple[int, int]:
    """(shard, shards) from "I/N".

    Raises:
      UserError: not two numbers, or I is not in 0 ... N - 1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(f"--shard {text}: give I/N, such as 0/4 for the first of four")
    shard, shards = int(match[1]), int(match[2])
    if shard >= shards:
        raise UserError(f"--shard {text}: shards are counted from 0, so N = {shards} has {_span(shards)}")
    return shard, shards


def _span(shards: int) -> str:
    return f"0/{shards} to {shards - 1}/{shards}" if shards else "none"


def parse_steps(text: str) -> frozenset[int]:
    """The steps that "3", "3:5" (3, 4 and 5) or "3,7" names; "" names none.

    Raises:
      UserError: anything else.
    """
    steps: set[int] = set()
    for part in filter(None, text.split(",")) if text else ():
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"--profile {text}: {part!r} is not a step, from 1 on, or a range such as 3:5")
        steps |= set(range(first, last + 1))
    if text and not steps:
        raise UserError(f"--profile {text}: names no step")
    return frozenset(steps)


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, all) that shows progress; what is done at its first call costs no time."""
    with console.Progress(unit) as progress:
        yield progress.at
