"""Batches: the same for ever, whatever the processes and the interruptions."""

import dataclasses
import json

import grain
import jax
import ml_dtypes
import numpy as np
import pytest

from world_distill.data.records.batches import collate, fixed_batches, task_batches
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordError, RecordReader, write_records

COUNT, LONGEST = 11, 6


LENGTHS = {"text": LONGEST, "glyphs": 2 * LONGEST}


def states(rng, length):
    """States of two encoders, of which one takes two tokens for one of the other's."""
    return {
        "text": rng.normal(size=(length, 4)).astype(np.float32),
        "glyphs": rng.normal(size=(2 * length, 3)).astype(ml_dtypes.bfloat16),
    }


def make(i):
    rng = np.random.default_rng(i)
    return EncodedRecord(
        id=f"r{i}", image_id=f"i{i}", task=f"task {i}", solution=f"solution {i}", agent=f"a{i}", kind="k",
        scene={"video": rng.normal(size=(1, 2, 2, 3)).astype(np.float16), "glance": rng.normal(size=(5, 2))},
        task_states=states(rng, 1 + i % 3), solution_states=states(rng, 2 + i % 5), image_png=bytes([i]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    write_records(folder, "set", (make(i) for i in range(COUNT)), 3)
    return RecordReader(folder, "set")


def start(reader, **changes):
    return task_batches(reader, **dict(tasks_per_step=4, seed=5, lengths=LENGTHS) | changes)


def taken(tasks, steps):
    return [tasks.take() for _ in range(steps)]


def assert_same(a, b):
    a, b = (jax.tree.flatten(dataclasses.asdict(batch) | {"texts": batch.texts}) for batch in (a, b))
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0], strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


def test_contents_of_a_batch(reader):
    batch = start(reader).take()
    assert batch.scene["video"].shape == (4, 1, 2, 2, 3) and batch.scene["video"].dtype == np.float16
    assert len(batch) == 4 and batch.count == 4
    for row, name in enumerate(batch.ids):
        record = make(int(name[1:]))
        for role in ("task", "solution"):
            told = batch.condition(role)
            for key, array in record.scene.items():
                np.testing.assert_array_equal(told.scene[key][row], array)
            for key, length in LENGTHS.items():
                states, padded = getattr(record, f"{role}_states")[key], told.text[key]
                assert padded.states.dtype == states.dtype and padded.mask.dtype == bool
                mask = padded.mask[row]
                assert mask.tolist() == [True] * len(states) + [False] * (length - len(states))
                np.testing.assert_array_equal(padded.states[row][mask], states)
                assert not padded.states[row][~mask].any()
        for key in ("task", "solution", "agent", "kind", "image_png", "image_id"):
            assert getattr(batch, key + "s" * (key == "image_id"))[row] == getattr(record, key)


def test_every_epoch_has_every_task_once_in_another_order(reader):
    rows = [i for batch in taken(start(reader), COUNT) for i in batch.ids]  # 4 epochs of 11
    epochs = [tuple(rows[k : k + COUNT]) for k in range(0, len(rows), COUNT)]
    assert len(set(epochs)) == 4
    assert all(sorted(e) == sorted(f"r{i}" for i in range(COUNT)) for e in epochs)


def test_seed_decides_the_order(reader):
    ids = [[b.ids for b in taken(start(reader, seed=s), 4)] for s in (5, 5, 6)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("stop_at", [0, 1, 7])
def test_resume_is_exact(reader, stop_at):
    first = start(reader)
    taken(first, stop_at)
    state = first.get_state()
    expected = taken(first, 5)
    second = start(reader)
    taken(second, 2)  # one that was used can be set too
    second.set_state(state)
    assert second.get_state() == state
    for batch in expected:
        assert_same(second.take(), batch)


def test_state_is_that_of_earlier_versions(reader):
    """They kept Grain's own iterator over batches."""
    tasks = start(reader)
    taken(tasks, 3)
    assert json.loads(tasks.get_state())["iterator"] == {"next_index": 3}
    old = grain.MapDataset.source(reader).shuffle(seed=5).repeat().batch(4, batch_fn=lambda rows: [r.id for r in rows])
    assert [batch.ids for batch in taken(tasks, 4)] == [old[i] for i in range(3, 7)]


@pytest.mark.parametrize("needed", [[0, 1], [3], [2, 1, 2]])
def test_a_process_reads_the_tasks_that_it_needs(reader, needed):
    read, alone, share = [], start(reader), start(reader)
    share._records = share._records.map(lambda record: read.append(record.id) or record)
    for _ in range(4):
        whole, part = alone.take(), share.take(needed)
        own = sorted(set(needed))
        assert part.numbers.tolist() == own and part.count == whole.count == 4
        assert part.ids == read == [whole.ids[i] for i in own]
        np.testing.assert_array_equal(part.scene["video"], whole.scene["video"][own])
        assert share.get_state() == alone.get_state()
        read.clear()


def test_several_draws_are_the_ones_that_come_next(reader):
    single, several = start(reader), start(reader)
    ids = [name for batch in taken(single, 3) for name in batch.ids]
    both = several.take(draws=2)
    assert both.ids == ids[:8] and both.count == 8
    assert several.take([0, 3]).ids == [ids[8], ids[11]]
    with pytest.raises(IndexError, match="tasks 0 to 4 of a step that has 4"):
        several.take([0, 4])
    assert several.get_state() == single.get_state()  # what failed has drawn nothing


def test_state_of_another_order_is_refused(reader, tmp_path):
    state = start(reader).get_state()
    with pytest.raises(ValueError, match=r"seed 5 -> 6, tasks_per_step 4 -> 2"):
        start(reader, seed=6, tasks_per_step=2).set_state(state)
    write_records(tmp_path, "other", (make(i) for i in range(COUNT - 1)))
    with pytest.raises(ValueError, match=r"data \w+ -> \w+, records 11 -> 10"):
        start(RecordReader(tmp_path, "other")).set_state(state)
    for nonsense in (b"", b"[]", b"{}", b"3"):
        with pytest.raises(ValueError, match="not the state"):
            start(reader).set_state(nonsense)


def test_arguments_are_checked_before_the_first_batch(reader, tmp_path):
    with pytest.raises(
        RecordError, match="record 'r4' has a text of 6 tokens, and texts are padded to 5: raise config.text"
    ):
        start(reader, lengths=LENGTHS | {"text": 5})
    with pytest.raises(RecordError, match="'r4' has a text of 12 tokens"):
        fixed_batches(reader, 4, lengths=LENGTHS | {"glyphs": 11})
    for changes in ({"tasks_per_step": 0}, {"seed": -1}, {"seed": 2**32}):
        with pytest.raises(ValueError):
            start(reader, **changes)
    record = AnnotatedRecord("r", "i", b"p", "t", "s", "a", "k", {})
    write_records(tmp_path, "raw", [record])
    with pytest.raises(RecordError, match="encode it first"):
        start(RecordReader(tmp_path, "raw"))


def test_text_states_stay_in_bfloat16_up_to_the_device(tmp_path):
    write_records(tmp_path, "set", (make(i) for i in range(4)), 2)
    batch = next(fixed_batches(RecordReader(tmp_path, "set"), 4, lengths={"text": 512, "glyphs": 512}))
    for role in ("task", "solution"):
        text, mask = batch.texts[role]["glyphs"].states, batch.texts[role]["glyphs"].mask
        assert text.shape == (4, 512, 3) and text.dtype == jax.device_put(text).dtype == ml_dtypes.bfloat16
        for i in range(4):
            assert text[i][mask[i]].tobytes() == getattr(make(i), f"{role}_states")["glyphs"].tobytes()
        assert not text[~mask].view(np.uint16).any()  # +0, bit for bit: some networks attend to what is behind the end


def test_collate_never_cuts():
    with pytest.raises(RecordError, match="record 'r2' has a text of 4 tokens"):
        collate([make(0), make(2)], LENGTHS | {"text": 3})


def test_records_of_another_encoder_are_refused():
    with pytest.raises(
        RecordError, match=r"record 'r0' has text states \['glyphs', 'text'\], this model reads \['text'\]"
    ):
        collate([make(0)], {"text": LONGEST})


def test_damage_met_on_the_way_is_a_record_error(tmp_path):
    write_records(tmp_path, "set", (make(i) for i in range(3)))
    reader = RecordReader(tmp_path, "set")
    shard = tmp_path / "set-00000-of-00001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[data.index(b"task 1")] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(RecordError, match=r"arrayrecord, row 1: .*damaged"):
        start(reader, tasks_per_step=3).take()


@pytest.mark.parametrize("batch_size, processes", [(4, 1), (11, 1), (16, 1), (4, 2), (8, 4)])
def test_fixed_batches_visit_each_record_once_in_order(reader, batch_size, processes):
    rows = np.split(np.arange(batch_size), processes)
    passes = [list(fixed_batches(reader, batch_size, lengths={"text": 8, "glyphs": 16}, needed=own)) for own in rows]
    real = []
    for parts in zip(*passes, strict=True):
        ids = [i for part in parts for i in part.ids]
        weight = np.concatenate([part.weight for part in parts])
        assert len(ids) == batch_size and weight.dtype == np.float32
        assert np.concatenate([part.numbers for part in parts]).tolist() == list(range(batch_size))
        assert {part.count for part in parts} == {batch_size}
        assert all(part.texts["task"]["text"].states.shape == (batch_size // processes, 8, 4) for part in parts)
        assert set(np.array(ids)[weight == 0]) <= {"r10"}
        real += list(np.array(ids)[weight == 1])
    assert real == [f"r{i}" for i in range(COUNT)]


def test_a_task_without_a_solution_is_not_for_training(tmp_path):
    bare = dataclasses.replace(make(1), solution="", solution_states={k: x[:0] for k, x in make(1).task_states.items()})
    write_records(tmp_path, "set", [make(0), bare], 1)
    reader = RecordReader(tmp_path, "set")
    assert reader[1].solution == "" and reader[1].solution_states["text"].shape == (0, 4)
    with pytest.raises(RecordError, match=r"record 'r1' has no solution for the Demonstrator"):
        start(reader, tasks_per_step=2).take()
    (batch,) = fixed_batches(reader, 2, lengths=LENGTHS)  # told the task, models can be evaluated on it
    assert not batch.texts["solution"]["text"].mask[1].any() and batch.texts["task"]["text"].mask[1].any()
    with pytest.raises(RecordError, match=r"record 'r1' has no solution"):
        batch.check_solutions()
    with pytest.raises(RecordError, match="solution_states 'text' has shape"):
        dataclasses.replace(bare, solution="It moves.").to_bytes()
