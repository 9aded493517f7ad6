"""What names a video in records."""

import os
import pathlib

from world_distill.data.records.shard_files import sha256


def file_digest(path: str | os.PathLike) -> str:
    """The image id of a video's records: the beginning of its file's hash. Raises OSError."""
    return sha256(pathlib.Path(path))[:16]
