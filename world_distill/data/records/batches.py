"""From encoded records to batches: endless and resumable for training, one pass for evaluation.

Training order. The data set is shuffled anew each epoch and repeated without end; draw s is the s-th `tasks_per_step`
records of that order. So the tasks of a step do not depend on the number of processes, and one number says where to go
on. A process reads only the records that it names as needed.
"""

import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from world_distill.data.records.reader import EncodedRecord, RecordError, RecordReader

# A batch is a dict of
#   ids image_ids task solution agent kind   [str] * b
#   image_png                                [bytes] * b
#   scene                                    [b 1 h w c] float32
#   task_text solution_text                  [b l d] in the type of the records, zero where the mask is False
#   task_mask solution_mask                  [b l] bool
# and in training
#   numbers                                  [b] which of the step's tasks these are, rising
#   count                                    int, tasks of the step, those that other processes have read too
Batch = dict[str, Any]


def collate(records: Sequence[EncodedRecord], text_length: int) -> Batch:
    """Records to one batch, texts padded with zeros to `text_length`.

    Raises RecordError naming the record whose text is longer: a cut text would be another task.
    """
    batch: Batch = {
        "ids": [r.id for r in records],
        "image_ids": [r.image_id for r in records],
        **{k: [getattr(r, k) for r in records] for k in ("task", "solution", "agent", "kind", "image_png")},
        "scene": np.stack([r.scene for r in records]).astype(np.float32),
    }
    for name in ("task", "solution"):
        texts = [getattr(r, f"{name}_text") for r in records]
        for record, text in zip(records, texts, strict=True):
            if len(text) > text_length:
                raise _too_long(record.id, len(text), text_length)
        padded, mask = pad_texts(texts, text_length)
        batch |= {f"{name}_text": padded, f"{name}_mask": mask}
    return batch


def with_solutions(batch: Batch) -> Batch:
    """The batch. Raises RecordError, naming the record, if one of it has no solution to tell the Demonstrator."""
    for record, solution in zip(batch["ids"], batch["solution"], strict=True):
        if not solution:
            raise RecordError(
                f"record {record!r} has no solution for the Demonstrator: it is for evaluating what is told the task"
            )
    return batch


def pad_texts(texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """States [b length d] in the texts' own type, zero behind each text's end, and the mask [b length] of what is real.

    Raises ValueError if a text is longer.
    """
    longest = max(map(len, texts))
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit into {length}")
    dtype = np.result_type(*{text.dtype for text in texts})
    padded = np.zeros((len(texts), length, texts[0].shape[1]), dtype)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
        mask[row, : len(text)] = True
    return padded, mask


class TaskBatches:
    """Endless draws of tasks for training; see `task_batches`."""

    def __init__(self, records: grain.MapDataset, identity: dict[str, Any], tasks_per_step: int, text_length: int):
        self._records, self._identity = records, identity
        self.tasks_per_step, self._text_length = tasks_per_step, text_length
        self._next = 0  # draws so far

    def take(self, needed: Sequence[int] | np.ndarray | None = None, *, draws: int = 1) -> Batch:
        """The tasks of the next `draws` draws, one draw after the other, as one batch; see `Batch`.

        Args:
          needed: numbers of the tasks to read, in [0, draws * tasks_per_step); None reads all. Each process may need
            others: the draws are the same.
          draws: how many.

        Raises:
          RecordError: a record is damaged or has no solution.
          IndexError: a number out of its range.
        """
        count, first = draws * self.tasks_per_step, self._next * self.tasks_per_step
        numbers = np.arange(count) if needed is None else np.unique(np.asarray(needed))
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < count:
            raise IndexError(f"tasks {numbers[0]} to {numbers[-1]} of a step that has {count}")
        records: Any = [self._records[first + int(number)] for number in numbers]
        batch = with_solutions(collate(records, self._text_length))
        self._next += draws
        return batch | {"numbers": numbers, "count": count}

    def get_state(self) -> bytes:
        """Where the iterator stands: JSON, the same on every process, to be kept in the checkpoint."""
        return json.dumps(self._identity | {"iterator": {"next_index": self._next}}, sort_keys=True).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to where `get_state` was called; the draws that follow are the same, bit for bit.

        Raises ValueError, listing what differs, for a state of other data, another seed or batch size.
        """
        try:
            left: Any = json.loads(state)
            at = operator.index(left.pop("iterator")["next_index"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"not the state of a data iterator: {state!r}") from error
        keys = sorted(k for k in left.keys() | self._identity.keys() if left.get(k) != self._identity.get(k))
        if keys:
            changes = ", ".join(f"{k} {left.get(k)} -> {self._identity.get(k)}" for k in keys)
            raise ValueError(f"this data order is not the one that was left ({changes}): going on would repeat or skip")
        self._next = at


def task_batches(reader: RecordReader, *, tasks_per_step: int, seed: int, text_length: int) -> TaskBatches:
    """Endless, deterministic draws of tasks.

    Args:
      reader: encoded records.
      tasks_per_step: tasks of a draw, those of all processes together.
      seed: of the shuffling, in [0, 2**32).
      text_length: tokens to pad to.

    Raises:
      ValueError: an argument out of its range.
      RecordError: not encoded records, or a text longer than `text_length`.
    """
    if tasks_per_step < 1:
        raise ValueError(f"a step of {tasks_per_step} tasks")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is not in [0, 2**32)")
    _check_reader(reader, text_length)
    identity = {
        "data": reader.fingerprint, "records": len(reader), "seed": seed, "tasks_per_step": tasks_per_step,
    }  # fmt: skip
    records = grain.MapDataset.source(reader).shuffle(seed=seed).repeat()
    return TaskBatches(records, identity, tasks_per_step, text_length)


def fixed_batches(
    reader: RecordReader,
    batch_size: int,
    *,
    text_length: int,
    indices: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass in order, in batches of one size, each with a `weight` [b] float32.

    `indices` are the records to take, all without it. The last batch repeats the last record to be full; `weight` is 1
    on real rows and 0 on repeated ones. `batch_size` counts the rows of all processes, of which this one gets its
    contiguous part. Raises like `task_batches`, before the first batch is asked for.
    """
    rows = _rows(batch_size, process_index, process_count)
    _check_reader(reader, text_length)
    chosen = range(len(reader)) if indices is None else indices

    def batches() -> Iterator[Batch]:
        for start in range(0, len(chosen), batch_size):
            places = np.arange(start, start + batch_size)[process_index * rows :][:rows]
            batch = collate([reader[chosen[min(i, len(chosen) - 1)]] for i in places], text_length)
            yield batch | {"weight": (places < len(chosen)).astype(np.float32)}

    return batches()


def _rows(total: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    if total < 1 or total % process_count:
        raise ValueError(f"a batch of {total} tasks cannot be shared out to {process_count} process(es)")
    return total // process_count


def _check_reader(reader: RecordReader, text_length: int) -> None:
    """Raises before a long job starts what would otherwise stop it at some later step."""
    if reader.record_type is not EncodedRecord:
        raise RecordError(f"{reader} has not been encoded for a model; encode it first")
    longest = reader.longest_text
    if longest is not None and longest["length"] > text_length:
        raise _too_long(longest["id"], longest["length"], text_length)


def _too_long(record: str, length: int, text_length: int) -> RecordError:
    return RecordError(f"record {record!r} has a text of {length} tokens, and text_length is {text_length}: raise it")
