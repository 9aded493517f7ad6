"""Files that appear whole or not at all."""

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any


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
        usual_mode(temporary)  # it is born readable by its owner alone
        temporary.replace(path)
    except BaseException as e:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError):
            e.filename = str(path)  # not the temporary name; a full disk says none at all
        raise


def usual_mode(path: pathlib.Path) -> None:
    """Gives a file the mode that `open` would have given it: what the user's umask leaves of rw-rw-rw-."""
    umask = os.umask(0o077)  # it cannot be read without being set
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if tolist := getattr(value, "tolist", None):  # arrays and array scalars of numpy and JAX
        return _plain(tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
