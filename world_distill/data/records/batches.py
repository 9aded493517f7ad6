"""From encoded records to batches: endless and resumable for training, one pass for evaluation.

Training order. The data set is shuffled anew each epoch and repeated without end; step s takes the s-th
`tasks_per_step` rows of that order, and process p of n the p-th n-th of them. So the tasks of a step do not depend on
the number of processes, and what has to be remembered to go on is one number.
"""

import json
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


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, in order."""
    first = batches[0]
    join = {name: np.concatenate if isinstance(value, np.ndarray) else _chain for name, value in first.items()}
    return {name: join[name]([batch[name] for batch in batches]) for name in first}


def _chain(lists: Sequence[list]) -> list:
    return [item for part in lists for item in part]


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


class TaskBatches(Iterator[Batch]):
    """Endless batches for training; see `task_batches`."""

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any]):
        self._iterator = iter(dataset)
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> bytes:
        """Where the iterator stands: JSON, the same on every process, to be kept in the checkpoint."""
        return json.dumps(self._identity | {"iterator": self._iterator.get_state()}, sort_keys=True).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to where `get_state` was called; the batches that follow are the same, bit for bit.

        Raises ValueError, listing what differs, for a state of other data, another seed or batch size.
        """
        try:
            left: Any = json.loads(state)
            iterator = left.pop("iterator")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"not the state of a data iterator: {state!r}") from error
        keys = sorted(k for k in left.keys() | self._identity.keys() if left.get(k) != self._identity.get(k))
        if keys:
            changes = ", ".join(f"{k} {left.get(k)} -> {self._identity.get(k)}" for k in keys)
            raise ValueError(f"this data order is not the one that was left ({changes}): going on would repeat or skip")
        self._iterator.set_state(iterator)

    def close(self) -> None:
        """Stops the reading threads."""
        self._iterator.close()


def task_batches(
    reader: RecordReader,
    *,
    tasks_per_step: int,
    seed: int,
    text_length: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 0,
    prefetch: int = 16,
) -> TaskBatches:
    """Endless, deterministic batches of this process's share of each step's tasks.

    Args:
      reader: encoded records.
      tasks_per_step: tasks of all processes together; a multiple of `process_count`.
      seed: of the shuffling, in [0, 2**32).
      text_length: tokens to pad to.
      process_index: which share, in [0, process_count).
      process_count: number of shares.
      num_threads: that read ahead; 0 reads when asked. The batches are the same.
      prefetch: batches to read ahead, with threads.

    Raises:
      ValueError: an argument out of its range.
      RecordError: not encoded records, or a text longer than `text_length`; while reading, a record without a solution.
    """
    rows = _rows(tasks_per_step, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is not in [0, 2**32)")
    _check_reader(reader, text_length)
    # Nothing remains of an endless order; without drop_remainder Grain's count of batches overflows for rows of 1.
    dataset = (
        grain.MapDataset.source(reader)
        .shuffle(seed=seed)
        .repeat()
        .batch(rows, drop_remainder=True, batch_fn=lambda records: with_solutions(collate(records, text_length)))
    )
    # Every n-th small batch from the p-th on: process p's contiguous part of each step's rows.
    shares = dataset[process_index::process_count]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    identity = {
        "data": reader.fingerprint, "records": len(reader), "seed": seed, "tasks_per_step": tasks_per_step,
    }  # fmt: skip
    return TaskBatches(shares.to_iter_dataset(options), identity)


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
