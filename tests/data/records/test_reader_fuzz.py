"""Damaged records, indices and shards: RecordError or the truth, whatever the damage.

WORLD_DISTILL_FUZZ multiplies the number of inputs.
"""

import dataclasses
import json

import numpy as np
import pytest
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.effort import FUZZ
from world_distill.data.records.reader import RecordReader, write_records
from world_distill.data.records.record_format import AnnotatedRecord, EncodedRecord, RecordError, read_clip

TYPES = (AnnotatedRecord, EncodedRecord)


def fuzzed(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples * FUZZ, deadline=None, database=None, derandomize=FUZZ == 1,
                    suppress_health_check=checks)  # fmt: skip


def annotated(i=0):
    return AnnotatedRecord(f"r{i}", "i", bytes([i]) * 30, "[a]: go.", "It goes.", "a", "move", {"file": "ä.png"})


def encoded():
    x = np.arange(24, dtype=np.float32)
    scene, task, solution = {"video": x.reshape(1, 2, 3, 4)}, {"text": x.reshape(6, 4)}, {"text": x.reshape(3, 8)}
    return EncodedRecord("r", "i", "t", "s", "a", "k", scene, task, solution, b"")


WHOLE = [annotated().to_bytes(), encoded().to_bytes()]
changes = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from("=+-")), min_size=1, max_size=6
)


def damage(data, edits):
    data = bytearray(data)
    for where, byte, what in edits:
        where %= len(data) + 1
        data[where : where + (what != "+")] = bytes([] if what == "-" else [byte])
    return bytes(data)


def holds_what_it_says(record):
    """A record that was accepted can be written and read again, with types as declared."""
    for field in dataclasses.fields(record):
        kind = {"str": str, "bytes": bytes}.get(getattr(field.type, "__name__", ""))
        assert kind is None or isinstance(getattr(record, field.name), kind)
    return type(record).from_bytes(record.to_bytes())


def accept(cls, data):
    try:
        record = cls.from_bytes(data)
    except RecordError:
        return
    try:
        holds_what_it_says(record)
    except RecordError as error:
        assert "not finite" in str(error)  # writing checks each number, reading only their kind


@fuzzed(150)
@given(st.sampled_from(WHOLE), changes, st.sampled_from(TYPES))
def test_damaged_record(data, edits, cls):
    accept(cls, damage(data, edits))


CLIP = dataclasses.replace(encoded(), clip={"video": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}).clip_to_bytes()


@fuzzed(150)
@given(changes)
def test_damaged_clip(edits):
    try:
        clip = read_clip(damage(CLIP, edits), "r")
    except RecordError:
        return
    if isinstance(clip, int):
        assert clip >= 0
        return
    try:
        dataclasses.replace(encoded(), clip=clip).clip_to_bytes()
    except RecordError as error:
        assert "not finite" in str(error) or "not axes with content" in str(error)


@fuzzed(50)
@given(st.binary(max_size=60), st.sampled_from(TYPES))
def test_any_bytes_as_a_record(data, cls):
    accept(cls, data)
    for whole in WHOLE:
        accept(cls, whole[:6] + data)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([f.name for f in dataclasses.fields(EncodedRecord)] + ["source", "scene_row", "task_text", "x"])


@fuzzed(150)
@given(
    st.sampled_from([annotated(), encoded()]),
    st.dictionaries(names, values, max_size=3),
    st.sampled_from(TYPES),
    values,
)
def test_record_with_other_values(record, changed, cls, kind):
    fields = vars(record) | changed
    for name in (type(record).__name__, kind):
        for whole in WHOLE:
            accept(cls, whole[:6] + serialization.msgpack_serialize({"type": name, "fields": fields}))


# ---- Sets


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_records(folder, "set", (annotated(i) for i in range(5)), 2, metadata={"a": "b"})
    return folder, {path: path.read_bytes() for path in folder.iterdir()}


def read_all(folder):
    """What a reader sees; None if it refuses."""
    try:
        reader = RecordReader(folder, "set")
        assert isinstance(reader.metadata, dict) and isinstance(reader.longest_texts, dict)
        records = list(reader)
        assert len(records) == len(reader) and len(repr(reader)) > 10 and len(reader.fingerprint) == 16
        reader.verify()
    except RecordError:
        return None
    return records


def check_index(folder, text):
    (folder / "set.json").write_bytes(text)
    records = read_all(folder)
    # Which shards there are, and in which order, is the index's word; what is in them is not.
    assert records is None or sorted(r.id for r in records) == [f"r{i}" for i in range(5)]
    assert records is None or all(r == annotated(int(r.id[1:])) for r in records)


@fuzzed(100)
@given(changes)
def test_damaged_index(whole_set, edits):
    folder, files = whole_set
    check_index(folder, damage(files[folder / "set.json"], edits))


def paths(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(["", "set.json", "../x", "a\0b"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["file", "count", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@fuzzed(150)
@given(st.data(), json_values, st.booleans())
def test_index_with_other_values(whole_set, data, value, sequential):
    folder, files = whole_set
    index = json.loads(files[folder / "set.json"]) | ({"order": "sequential"} if sequential else {})
    path = data.draw(st.sampled_from(list(paths(index))))
    outer = {"index": index}
    place = outer
    for key in ("index", *path)[:-1]:
        place = place[key]
    place[("index", *path)[-1]] = value
    check_index(folder, json.dumps(outer["index"]).encode())


@fuzzed(60)
@given(st.data(), changes)
def test_damaged_shard(whole_set, data, edits):
    folder, files = whole_set
    shard = data.draw(st.sampled_from(sorted(path for path in files if path.suffix == ".arrayrecord")))
    body = files[shard]
    end = body.rstrip(b"\0").__len__() + 50  # most of a small shard is padding
    (folder / "set.json").write_bytes(files[folder / "set.json"])
    try:
        shard.write_bytes(damage(body[:end], edits) + body[end:])
        records = read_all(folder)
        assert records is None or records == [annotated(i) for i in range(5)]
        shard.write_bytes((damage(body[:end], edits) + body[end:])[: len(body)].ljust(len(body), b"\0"))  # of its size
        records = read_all(folder)
        assert records is None or records == [annotated(i) for i in range(5)]
    finally:
        shard.write_bytes(body)
