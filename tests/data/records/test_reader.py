"""Records and data sets: what goes in comes out, and what is damaged in any way is refused with its name."""

import dataclasses
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from world_distill.data.images.png import ImageError, decode_png, encode_png
from world_distill.data.records import reader as records_module
from world_distill.data.records import record_format
from world_distill.data.records.heads import Heads
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordError, RecordReader, write_records

ROOT = pathlib.Path(__file__).resolve().parents[3]


def annotated(i=0, **changes):
    fields = dict(
        id=f"r{i}", image_id=f"i{i // 2}", image_png=bytes([i % 256]) * 40, task=f"[Bär {i}]: go.",
        solution="It goes.\nÜber {x}.", agent=f"Bär {i}", kind="move", source={"file": "ä.png"},
    )  # fmt: skip
    return AnnotatedRecord(**fields | changes)


def encoded(i=0, length=3, dtype=np.float32, **changes):
    rng = np.random.default_rng(i)
    fields = dict(
        id=f"r{i}", image_id="i", task="t", solution="s", agent="a", kind="k", image_png=b"",
        scene={"video": rng.normal(size=(1, 2, 3, 4)).astype(dtype)},
        task_states={"text": rng.normal(size=(length, 5)).astype(dtype)},
        solution_states={"text": rng.normal(size=(length + 2, 5)).astype(dtype)},
    )  # fmt: skip
    return EncodedRecord(**fields | changes)


def test_annotated_record_round_trip():
    record = annotated(7)
    assert AnnotatedRecord.from_bytes(record.to_bytes()) == record


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_encoded_record_round_trip_keeps_dtype_and_bits(dtype):
    record = encoded(3, dtype=dtype)
    record = dataclasses.replace(
        record, scene={"video": record.scene["video"].transpose(0, 2, 1, 3)}
    )  # memory out of order
    back = EncodedRecord.from_bytes(record.to_bytes())
    for field in dataclasses.fields(record):
        old, new = getattr(record, field.name), getattr(back, field.name)
        if isinstance(old, dict):
            assert new.keys() == old.keys()
            for key, array in old.items():
                assert new[key].dtype == array.dtype and new[key].shape == array.shape
                assert new[key].tobytes() == array.tobytes()
        else:
            assert new == old


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: annotated(task=""), "task is empty"),
        (lambda: annotated(solution=None), "solution is a NoneType"),
        (lambda: annotated(source={"n": 3}), "source has entries that are not text"),
        (lambda: encoded(scene={}), "scene holds no arrays by name"),
        (lambda: encoded(scene=np.zeros(3)), "scene is a ndarray, not dict"),
        (lambda: encoded(scene={"video": [1.0]}), "scene 'video' is a list, not an array"),
        (
            lambda: encoded(scene={"video": np.zeros((0, 2))}),
            r"scene 'video' has shape \(0, 2\), not axes with content",
        ),
        (lambda: encoded(task_states={"text": np.zeros((0, 5))}), "task_states 'text' has shape"),
        (lambda: encoded(task_states={"text": np.zeros((2, 5, 1))}), "task_states 'text' has shape .*, not 2 axes"),
        (lambda: encoded(task_states={"text": np.zeros((2, 5), int)}), "task_states 'text' is int64"),
        (lambda: encoded(task_states={"text": np.full((2, 5), np.nan)}), "'text' has values that are not finite"),
        (
            lambda: encoded(task_states={"clip": np.zeros((2, 5))}),
            r"task states are \['clip'\], solution states \['text'\]",
        ),
        (lambda: encoded(scene={"video": np.full((1, 1), np.inf, ml_dtypes.bfloat16)}), "scene 'video' has values"),
    ],
)
def test_bad_records_are_not_written(make, message):
    with pytest.raises(RecordError, match=message):
        make().to_bytes()


@pytest.mark.parametrize("record", [annotated(), encoded()], ids=["annotated", "encoded"])
def test_every_truncation_of_a_record_is_refused(record):
    data = record.to_bytes()
    for length in range(len(data)):
        with pytest.raises(RecordError):
            type(record).from_bytes(data[:length])
    with pytest.raises(RecordError):
        type(record).from_bytes(data + b"\0")


def test_other_type_version_or_magic_is_refused():
    data = annotated().to_bytes()
    with pytest.raises(RecordError, match="this is a AnnotatedRecord, not the EncodedRecord"):
        EncodedRecord.from_bytes(data)
    with pytest.raises(RecordError, match="format version 9"):
        AnnotatedRecord.from_bytes(data[:5] + b"\x09" + data[6:])
    with pytest.raises(RecordError, match="not a world_distill record"):
        AnnotatedRecord.from_bytes(b"x" + data)


def test_whole_bytes_with_wrong_contents_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(record_format, "_check", lambda record, scene_row=None: None)
        data = annotated(task=3).to_bytes()
    with pytest.raises(RecordError, match="record 'r0': task is a int, not str"):
        AnnotatedRecord.from_bytes(data)


def test_png_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    np.testing.assert_array_equal(decode_png(encode_png(image)), image)
    with pytest.raises(ImageError, match="damaged PNG"):
        decode_png(encode_png(image)[:100])


# ---- Data sets


@pytest.mark.parametrize("count, shards", [(1, 1), (10, 3), (2, 4)])
def test_data_set_round_trip_in_order(tmp_path, count, shards):
    index = write_records(tmp_path, "set", (annotated(i) for i in range(count)), shards, metadata={"a": "b"})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [index.name, *(f"set-{i:05d}-of-{shards:05d}.arrayrecord" for i in range(shards))]
    )
    reader = RecordReader(tmp_path, "set", AnnotatedRecord)
    assert list(reader) == [annotated(i) for i in range(count)]
    assert reader[-1] == annotated(count - 1) and len(reader) == count and reader.metadata == {"a": "b"}
    for i in (count, -count - 1):
        with pytest.raises(IndexError):
            reader[i]
    reader.verify()


@pytest.mark.parametrize("shards", [1, 3])
def test_records_of_an_image_share_its_picture_in_any_order(tmp_path, shards):
    order = np.random.default_rng(0).permutation(40)
    records = [annotated(int(i), image_id=f"i{i % 5}", image_png=bytes([i % 5]) * 9000) for i in order]
    write_records(tmp_path, "set", records, shards)
    reader = RecordReader(tmp_path, "set")
    assert list(reader) == records
    stored = [record_format.read_stored(AnnotatedRecord, s[row]) for s in reader._shards for row in range(len(s) - 1)]
    assert sum(row is None for _, row in stored) == 5 == sum(len(record.image_png) > 0 for record, _ in stored)
    other = [records[0], dataclasses.replace(records[0], id="other", image_png=b"another picture")]
    write_records(tmp_path, "set", other)
    assert list(RecordReader(tmp_path, "set")) == other  # one name, two pictures


@pytest.mark.parametrize("make, shards", [(annotated, 1), (annotated, 3), (encoded, 2)])
def test_heads_are_read_without_the_records(tmp_path, monkeypatch, make, shards):
    records = [make(i, kind=f"k{i}") for i in range(11)]
    write_records(tmp_path, "set", records, shards)
    with monkeypatch.context() as patch:
        patch.setattr(RecordReader, "_stored", None)
        heads = RecordReader(tmp_path, "set").heads()
    assert heads == Heads.of(records) and len(heads) == 11
    assert heads.characters == [len(r.task) + len(r.solution) for r in records]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-1], "damaged heads"),
        (lambda data: data + b"!", "damaged heads"),
        (lambda data: b"x" + data[1:], "not the heads of records"),
        (lambda data: data.replace(b"kind", b"king"), "damaged heads"),
        (lambda data: Heads.of([annotated()]).to_bytes(), "damaged heads: not those of 2 records"),
        (lambda data: data.replace(b"\xa2r1", b"\x01\x02\x03"), "damaged heads"),
    ],
)
def test_damaged_heads_are_refused(change, message):
    data = Heads.of([annotated(0), annotated(1)]).to_bytes()
    assert Heads.from_bytes(data, 2).id == ["r0", "r1"]
    with pytest.raises(RecordError, match=message):
        Heads.from_bytes(change(data), 2)


def test_reader_survives_pickling_and_threads(tmp_path):
    write_records(tmp_path, "set", (annotated(i) for i in range(30)), 2)
    reader = pickle.loads(pickle.dumps(RecordReader(tmp_path, "set")))
    wrong = []

    def read(offset):
        wrong.extend(i for k in range(200) if reader[i := (k * 7 + offset) % 30] != annotated(i))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_fingerprint_tells_contents_apart(tmp_path):
    for name, first in (("a", 0), ("b", 0), ("c", 1)):
        write_records(tmp_path, name, (annotated(i + first) for i in range(3)))
    a, b, c = (RecordReader(tmp_path, name).fingerprint for name in "abc")
    assert a == b != c


def test_longest_text_is_in_the_index(tmp_path):
    write_records(tmp_path, "set", [encoded(0, 3), encoded(1, 8), encoded(2, 4)])
    assert RecordReader(tmp_path, "set").longest_texts == {"text": {"length": 10, "id": "r1"}}


@pytest.mark.parametrize(
    "records, message",
    [
        ([], "no records to write"),
        ([annotated(0), annotated(0)], "two records have the id 'r0'"),
        ([annotated(0), encoded(1)], "one record type"),
        ([encoded(0), encoded(1, scene={"video": np.zeros((1, 2, 2, 4), np.float32)})], "record 'r1': scene shape"),
        (
            [encoded(0, solution_states={"text": np.zeros((2, 6), np.float32)})],
            "record 'r0': scene shapes and text widths",
        ),
    ],
)
def test_refused_data_sets_leave_the_old_one(tmp_path, records, message):
    write_records(tmp_path, "set", [annotated(5)])
    with pytest.raises(RecordError, match=message):
        write_records(tmp_path, "set", records, 2)
    assert list(RecordReader(tmp_path, "set")) == [annotated(5)]
    assert len(list(tmp_path.iterdir())) == 2


def test_error_of_the_source_passes_through(tmp_path):
    def broken():
        yield annotated(0)
        raise KeyError("from the source")

    with pytest.raises(KeyError, match="from the source"):
        write_records(tmp_path, "set", broken(), 2)
    assert list(tmp_path.iterdir()) == []


def test_bad_names_and_folders(tmp_path):
    for name in ("", "../x", "a/b", ".x"):
        with pytest.raises(RecordError, match="will not do"):
            write_records(tmp_path, name, [annotated()])
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file/sub: cannot write records"):
        write_records(tmp_path / "file/sub", "set", [annotated()])


def test_replacing_with_fewer_shards_removes_the_others(tmp_path):
    write_records(tmp_path, "set-2", [annotated(1)])
    write_records(tmp_path, "set", (annotated(i) for i in range(9)), 3)
    (tmp_path / ".set-00000-of-00003.arrayrecord.1-killed.tmp").write_text("left by a killed writer")
    write_records(tmp_path, "set", [annotated(8)])
    assert len(list(tmp_path.iterdir())) == 4
    assert list(RecordReader(tmp_path, "set")) == [annotated(8)]
    assert list(RecordReader(tmp_path, "set-2")) == [annotated(1)]


# ---- Damage


@pytest.fixture
def small_set(tmp_path):
    index = write_records(tmp_path, "set", (annotated(i) for i in range(8)), 2)
    return index, tmp_path / "set-00001-of-00002.arrayrecord"


def test_every_truncation_of_a_shard_is_refused_by_name(small_set):
    index, shard = small_set
    data = shard.read_bytes()
    rng = np.random.default_rng(0)
    for length in [0, 1, 64, 65536, len(data) - 1, *rng.integers(2, len(data) - 1, 20)]:
        shard.write_bytes(data[:length])
        with pytest.raises(RecordError, match=f"{shard.name} has {length} bytes"):
            RecordReader(index.parent, "set")


def test_damage_that_keeps_the_size_is_found_or_harmless(small_set):
    index, shard = small_set
    data = shard.read_bytes()
    end = max(data.rfind(annotated(i).to_bytes()) for i in range(8)) + 100
    rng, found = np.random.default_rng(0), 0
    for offset in rng.integers(0, end, 60):
        shard.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        try:
            assert list(RecordReader(index.parent, "set")) == [annotated(i) for i in range(8)]
        except RecordError as error:
            assert shard.name in str(error)
            found += 1
    assert found > 30


def test_verify_finds_what_reading_does_not(small_set):
    index, shard = small_set
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 0xFF]))  # in the padding
    reader = RecordReader(index.parent, "set")
    assert list(reader) == [annotated(i) for i in range(8)]
    with pytest.raises(RecordError, match=f"shards \\['{shard.name}'\\] are not the ones written"):
        reader.verify()


def test_missing_parts_are_named(small_set, tmp_path):
    index, shard = small_set
    shard.rename(tmp_path / "away")
    with pytest.raises(RecordError, match=f"missing shards \\['{shard.name}'\\]"):
        RecordReader(tmp_path, "set")
    (tmp_path / "away").rename(shard)
    assert len(RecordReader(tmp_path, "set")) == 8
    index.unlink()
    with pytest.raises(RecordError, match="set.json: no readable index.*cut off"):
        RecordReader(tmp_path, "set")
    with pytest.raises(RecordError, match="other.json: no readable index.*no shards; the sets in that folder are set$"):
        RecordReader(tmp_path, "other")
    with pytest.raises(RecordError, match="no readable index.*no folder .*nowhere$"):
        RecordReader(tmp_path / "nowhere", "set")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[: len(text) // 2], "set.json: the index is damaged"),
        (lambda text: "[]", "is not the index of a data set"),
        (lambda text: text.replace('"version": 2', '"version": 0'), "format version 0, this program reads 1, 2: write"),
        (lambda text: text.replace('"version": 2', '"version": 9'), "version 9 is of a later .*reads 1, 2: update it"),
        (lambda text: text.replace('"count": 8', '"count": 9'), "contradicts itself"),
        (lambda text: text.replace('"sha256"', '"x"'), "lacks 'sha256'"),
        (lambda text: text.replace('"count": 4', '"count": 5').replace('"count": 8', '"count": 10'), "and runs .4, 4"),
        (lambda text: text.replace('"heads": true', '"heads": false'), "has 5 records, its index says 4"),
        (lambda text: text.replace('"heads": true', '"heads": 1'), "a value is of another type"),
        (lambda text: text.replace('"runs": [', '"runs": [[2, 1],'), "a run of 1 records in shard 2"),
        (lambda text: text.replace('"runs": [', '"runs": [[0, 1],'), r"shards have .4, 4. records, and runs .5, 4"),
        (lambda text: text.replace('"runs": [', '"runs": [["a", 1],'), "the index is damaged"),
        (lambda text: text.replace("AnnotatedRecord", "EncodedRecord"), "this is a AnnotatedRecord, not the Enc"),
        (lambda text: text.replace("AnnotatedRecord", "NewRecord"), "holds NewRecords, not records"),
    ],
)
def test_damaged_or_foreign_index(small_set, change, message):
    index, _ = small_set
    index.write_text(change(index.read_text()))
    with pytest.raises(RecordError, match=message):
        RecordReader(index.parent, "set")[0]


def test_empty_set_and_wrong_type(small_set):
    index, _ = small_set
    with pytest.raises(RecordError, match="holds AnnotatedRecords, not EncodedRecord"):
        RecordReader(index.parent, "set", EncodedRecord)
    empty = json.loads(index.read_text()) | {"count": 0, "shards": [], "runs": []}
    index.write_text(json.dumps(empty))
    with pytest.raises(RecordError, match="the data set is empty"):
        RecordReader(index.parent, "set")


# ---- Cut off at any instant


def generation_in(folder):
    """The generation that a reader sees: every record must be of the same one; None where it refuses to read."""
    try:
        generations = [record.source["generation"] for record in RecordReader(folder, "set")]
    except RecordError as error:
        assert "index" in str(error)
        return None
    assert len(generations) == 9 and len(set(generations)) == 1
    return generations[0]


def generation(g):
    return [annotated(i, source={"generation": str(g)}) for i in range(9)]


@pytest.mark.parametrize("function", ["replace", "fsync", "unlink"])
def test_failure_at_each_call_of_the_disk(tmp_path, monkeypatch, function):
    """The n-th call of one system function fails, for every n: the old set, none, or the new one; never a mixture."""
    write_records(tmp_path, "set", generation(0), 2)
    real, seen = getattr(os, function), set()
    for fail_at in range(1, 40):
        calls = 0

        def failing(*args, fail_at=fail_at, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        before = generation_in(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(records_module.os, function, failing)
            try:
                write_records(tmp_path, "set", generation(fail_at), 2)
            except (RecordError, OSError) as error:
                assert "No space left" in str(error)
        after = generation_in(tmp_path)
        assert after in (None, before, str(fail_at))
        seen.add("new" if after == str(fail_at) else "refused" if after is None else "old")
        if calls < fail_at:
            break
        write_records(tmp_path, "set", generation(0), 2)
    assert calls < fail_at and "new" in seen and len(seen) > 1


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_reader import generation, write_records
for g in range(1, 10**6):
    write_records({folder!r}, "set", generation(g), 3)
    print(g, flush=True)
"""


def test_killed_writers_never_leave_a_mixture(tmp_path):
    rng, seen = np.random.default_rng(1), []
    code = WRITER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"1\n"
            time.sleep(rng.uniform(0.0, 0.2))
            writer.send_signal(signal.SIGKILL)
        seen.append(generation_in(tmp_path))
    assert len(seen) == 3
    write_records(tmp_path, "set", generation("last"), 2)  # and what they left does not stand in the way
    assert generation_in(tmp_path) == "last" and len(list(tmp_path.iterdir())) <= 3 + 1
