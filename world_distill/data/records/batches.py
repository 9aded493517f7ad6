"""From encoded records to batches: endless and resumable for training, one pass for evaluation.

Training order. The data set is shuffled anew each epoch and repeated without end; draw s is the s-th `tasks_per_step`
records of that order. So the tasks of a step do not depend on the number of processes, and one number says where to go
on. A process reads only the records that it names as needed.
"""

import dataclasses
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np

from world_distill.data.records.reader import EncodedRecord, RecordError, RecordReader
from world_distill.data.records.record_format import without_solution
from world_distill.structs import Condition, Texts, Tokens

ROLES = ("task", "solution")  # the text that the Executor is told, and the one for the Demonstrator
Role = Literal["task", "solution"]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class TaskBatch:
    """Tasks with their scenes and texts, on the host.

    Attributes:
      ids, image_ids, task, solution, agent, kind: [b] of the records.
      image_png: [b] the scenes' picture files: PNG, or as they came (JPEG).
      scene: [b ...] by name, in the type of the records.
      texts: padded states of each role's text.
      numbers: [b] which of the step's or the whole batch's tasks these are, rising.
      count: tasks of the step or the whole batch, with those that other processes have read.
      weight: [b] float32, 0 on rows that fill up the last batch (one pass).
      clip: [b n ...] latents of the records' clips by stream; {} where they are not read.
    """

    ids: list[str]
    image_ids: list[str]
    task: list[str]
    solution: list[str]
    agent: list[str]
    kind: list[str]
    image_png: list[bytes]
    scene: Arrays
    texts: dict[str, Texts]
    numbers: np.ndarray
    count: int
    weight: np.ndarray
    clip: Arrays = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def condition(self, role: Role) -> Condition:
        """The scenes and one text of each; arrays on the host."""
        return Condition(self.texts[role], dict(self.scene))

    def check_solutions(self) -> None:
        """Raises RecordError, naming the record, if one has no solution to tell the Demonstrator."""
        for record, solution in zip(self.ids, self.solution, strict=True):
            if not solution:
                raise without_solution(record)


def collate(records: Sequence[EncodedRecord], lengths: Mapping[str, int]) -> TaskBatch:
    """Records to one batch, texts padded with zeros to `lengths`, by the name of the states.

    Raises RecordError naming the record whose text is longer (a cut text would be another task), or that has other
    arrays.
    """
    texts = {}
    for role in ROLES:
        states = [getattr(r, f"{role}_states") for r in records]
        for record, of_record in zip(records, states, strict=True):
            if of_record.keys() != lengths.keys():
                raise RecordError(
                    f"record {record.id!r} has text states {sorted(of_record)}, this model reads {sorted(lengths)}:"
                    " encode the records for it"
                )
            for name, text in of_record.items():
                if len(text) > lengths[name]:
                    raise _too_long(record.id, len(text), lengths[name])
        texts[role] = pad(states, lengths)
    return TaskBatch(
        ids=[r.id for r in records],
        image_ids=[r.image_id for r in records],
        task=[r.task for r in records],
        solution=[r.solution for r in records],
        agent=[r.agent for r in records],
        kind=[r.kind for r in records],
        image_png=[r.image_png for r in records],
        scene=stack_scenes([r.scene for r in records]),
        texts=texts,
        numbers=np.arange(len(records)),
        count=len(records),
        weight=np.ones(len(records), np.float32),
        clip=stack_scenes([r.clip for r in records]),
    )


def stack_scenes(scenes: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """The arrays [b ...] of several scenes, by name."""
    return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}


def scene_problem(scene: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> str | None:
    """How a record's scene differs from what a model reads (`Encoders.scenes`); None: it does not."""
    have = {name: array.shape for name, array in scene.items()}
    want = {name: tuple(array.shape) for name, array in expected.items()}
    if have == want:
        return None
    return (
        f"scenes are {have}, and this model and size read {want}: encode the records for it, or take the size that they"
        " were encoded for"
    )


def pad(states: Sequence[Mapping[str, np.ndarray]], lengths: Mapping[str, int]) -> Texts:
    """Texts, each as states [l d] by name, as padded `Tokens` by name; see `pad_texts`."""
    return {name: pad_texts([text[name] for text in states], length) for name, length in lengths.items()}


def pad_texts(texts: Sequence[np.ndarray], length: int) -> Tokens:
    """States [b length d] in the texts' own type, zero behind each text's end, and the mask [b length] of real ones.

    Raises ValueError if a text is longer.
    """
    longest = max(map(len, texts))
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit into {length}")
    dtype = np.result_type(*{text.dtype for text in texts})
    padded: Any = np.zeros((len(texts), length, texts[0].shape[1]), dtype)
    mask: Any = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
        mask[row, : len(text)] = True
    return Tokens(padded, mask)


class TaskBatches:
    """Endless draws of tasks for training; see `task_batches`."""

    def __init__(
        self,
        records: grain.MapDataset,
        identity: dict[str, Any],
        tasks_per_step: int,
        lengths: Mapping[str, int],
        solutions: bool = True,
    ):
        self._records, self._identity, self._solutions = records, identity, solutions
        self.tasks_per_step, self._lengths = tasks_per_step, lengths
        self._next = 0  # draws so far

    def take(self, needed: Sequence[int] | np.ndarray | None = None, *, draws: int = 1) -> TaskBatch:
        """The tasks of the next `draws` draws, one draw after the other, as one batch.

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
        batch = collate(records, self._lengths)
        if self._solutions:
            batch.check_solutions()
        self._next += draws
        return dataclasses.replace(batch, numbers=numbers, count=count)

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


def task_batches(
    reader: RecordReader, *, tasks_per_step: int, seed: int, lengths: Mapping[str, int], solutions: bool = True
) -> TaskBatches:
    """Endless, deterministic draws of tasks.

    Args:
      reader: encoded records.
      tasks_per_step: tasks of a draw, those of all processes together.
      seed: of the shuffling, in [0, 2**32).
      lengths: tokens to pad to, by the name of the text states.
      solutions: whether each task has to have one, to tell the Demonstrator.

    Raises:
      ValueError: an argument out of its range.
      RecordError: not encoded records, or a text longer than `lengths`.
    """
    if tasks_per_step < 1:
        raise ValueError(f"a step of {tasks_per_step} tasks")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is not in [0, 2**32)")
    _check_reader(reader, lengths)
    identity = {
        "data": reader.fingerprint, "records": len(reader), "seed": seed, "tasks_per_step": tasks_per_step,
    }  # fmt: skip
    records = grain.MapDataset.source(reader).shuffle(seed=seed).repeat()
    return TaskBatches(records, identity, tasks_per_step, lengths, solutions)


def fixed_batches(
    reader: RecordReader,
    batch_size: int,
    *,
    lengths: Mapping[str, int],
    indices: Sequence[int] | None = None,
    needed: Sequence[int] | np.ndarray | None = None,
) -> Iterator[TaskBatch]:
    """One pass in order, in batches of one size, each with its `weight`.

    `indices` are the records to take, all without it. The last batch repeats the last record to be full; `weight` is 1
    on real rows and 0 on repeated ones. `needed` are the rows of each batch that this process reads, in
    [0, batch_size): its `numbers`; None reads all. Raises like `task_batches`, before the first batch is asked for.
    """
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} tasks")
    _check_reader(reader, lengths)
    chosen = range(len(reader)) if indices is None else indices
    numbers = np.arange(batch_size) if needed is None else np.unique(np.asarray(needed))

    def batches() -> Iterator[TaskBatch]:
        for start in range(0, len(chosen), batch_size):
            places = start + numbers
            batch = collate([reader[chosen[min(int(i), len(chosen) - 1)]] for i in places], lengths)
            weight = (places < len(chosen)).astype(np.float32)
            yield dataclasses.replace(batch, weight=weight, numbers=numbers, count=batch_size)

    return batches()


def _check_reader(reader: RecordReader, lengths: Mapping[str, int]) -> None:
    """Raises before a long job starts what would otherwise stop it at some later step."""
    if reader.record_type is not EncodedRecord:
        raise RecordError(f"{reader} has not been encoded for a model; encode it first")
    for name, longest in reader.longest_texts.items():
        if longest["length"] > lengths.get(name, longest["length"]):
            raise _too_long(longest["id"], longest["length"], lengths[name])


def _too_long(record: str, length: int, limit: int) -> RecordError:
    return RecordError(
        f"record {record!r} has a text of {length} tokens, and texts are padded to {limit}: raise config.text_length,"
        " or encode the records again with this config, which leaves such texts out"
    )
