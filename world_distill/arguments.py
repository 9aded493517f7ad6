"""Flags that several verbs share, and the JSON that they write.

A verb's `add_arguments(parser)` calls the `add_*` functions here for what it takes. `--config.key=value`
is not a flag of argparse: `take_overrides` collects it first, and `config_from` applies it.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

LOG_LEVELS = ("debug", "info", "warning", "error")


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
    return pathlib.Path(text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, where the verb's figures go besides the terminal."""
    parser.add_argument(
        "--json",
        metavar="PATH",
        type=pathlib.Path,
        help="also write the figures to this file, as JSON",
    )


def add_seed(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """`--seed`. With a config and no default it is short for `--config.seed`."""
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=default,
        help="seed of all that is random in this run" + _default(default),
    )


def add_logging(parser: argparse.ArgumentParser) -> None:
    """`--log-level` and `--verbose`; every verb has them."""
    text = "of this program and of Orbax, which has much to say (default: warning)"
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help=text)
    parser.add_argument("--verbose", action="store_true", help="on an error, show the traceback as well")


def start_logging(level: str) -> None:
    """Sends absl's log to stderr from `level` on. Programs silence it on processes other than 0."""
    from absl import logging

    logging.use_absl_handler()
    logging.set_verbosity(level)
    logging.set_stderrthreshold(level)


def take_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits argv into what argparse reads and the `--config.KEY=VALUE` or `--config.KEY VALUE` pairs.

    Raises:
      UserError: a key without a value.
    """
    from world_distill.config import UserError

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
            if value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
        overrides[key] = value
    return rest, overrides


def config_from(args: argparse.Namespace) -> Any:
    """The locked ConfigDict that `--config`, its overrides and `--seed` describe.

    Raises:
      UserError: see `load_config`; or `--seed` and `--config.seed` were both given.
    """
    from world_distill.config import UserError, load_config

    overrides = dict(args.overrides)
    if getattr(args, "seed", None) is not None:
        if "seed" in overrides:
            raise UserError("give either --seed or --config.seed, not both")
        overrides["seed"] = str(args.seed)
    return load_config(args.config, overrides)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON in one step: a reader sees the old file or the whole new one.

    Takes arrays, dataclasses and paths too. Numbers that JSON lacks (NaN, infinities) become null.
    """
    write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file in one step, making its folder if need be. Raises OSError naming the path."""
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, since a rename is atomic within one file system only.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            temporary = pathlib.Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # it is born readable by its owner alone
        temporary.replace(path)
    except BaseException as e:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            e.filename = str(path)  # not the temporary name; a full disk says none at all
        raise


def say(text: str = "") -> None:
    """A line for the person at the terminal, on stdout: results, not progress. A job says it once."""
    hosts = sys.modules.get("world_distill.hosts")  # where it has not been imported, there is no job
    if hosts is not None and not hosts.is_main():
        return
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _default(default: object) -> str:
    return "" if default is None else f" (default: {default})"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and array scalars of numpy and JAX
        return _plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
