"""The journal of an annotation: every answer, on the disk as soon as it is there.

NAME.journal.jsonl has one JSON line an answer, under the image's hash. A job that does a part of a data set writes a
journal of its own and reads those of all others, so no change in how the work is split asks anything twice.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from world_distill.data.records.reader import RecordError
from world_distill.interfaces import TaskPair


class Journal:
    """Answers by image hash. A context manager, in which no other process can write this journal."""

    def __init__(self, folder: pathlib.Path, name: str, request: Mapping[str, Any], *, part: str = ""):
        """`name` of the data set, `part` what follows it where a part is done; only answers to `request` count."""
        self.answers: dict[str, list[TaskPair]] = {}
        self._name, self._path, self._request = name, folder / f"{name}{part}.journal.jsonl", dict(request)
        self._lock = threading.Lock()

    def __enter__(self) -> "Journal":
        with contextlib.ExitStack() as stack:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context(open(self._path, "a+b"))
            except OSError as error:
                raise RecordError(f"{self._path}: cannot be written ({error})") from error
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecordError(f"{self._path}: another process is annotating this data set") from error
            except OSError:
                logging.warning("%s: this file system has no locks; run one annotation at a time", self._path)
            self.load_others()
            self._file.seek(0)
            # A line without its end was being written when the job was killed: that answer is lost.
            self._file.truncate(self._load(self._path, self._file.read()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def load_others(self) -> None:
        """Reads the answers that other jobs of this data set have by now."""
        pattern = re.compile(re.escape(self._name) + r"(-\d{5}-of-\d{5})?\.journal\.jsonl")
        for path in sorted(self._path.parent.iterdir()):
            if pattern.fullmatch(path.name) and path != self._path:
                self._load(path, path.read_bytes())

    def _load(self, path: pathlib.Path, data: bytes) -> int:
        """Takes the answers from a journal's whole lines; returns their length in bytes."""
        length = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:length].split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                pairs = [TaskPair(**pair) for pair in entry["pairs"]]
                if entry["request"] == self._request:
                    self.answers[entry["image"]] = pairs
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(f"{path}, line {number}: damaged ({error}): delete the line") from error
        return length

    def add(self, digest: str, pairs: Sequence[TaskPair]) -> None:
        """Keeps an answer; may be called by several threads. Raises RecordError if the disk refuses."""
        entry = {"image": digest, "request": self._request, "pairs": [dataclasses.asdict(p) for p in pairs]}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace")
        with self._lock:
            try:
                self._file.write(line + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise RecordError(f"{self._path}: cannot be written ({error})") from error
            # Read back from JSON on purpose: a restarted job must see the same answer.
            self.answers[digest] = [TaskPair(**pair) for pair in json.loads(line)["pairs"]]
