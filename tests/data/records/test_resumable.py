"""Notes beside shards: believed where everything fits, and never otherwise."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from world_distill.data.records import shard_files
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordError, RecordReader
from world_distill.data.records.resumable import ResumableSet

COUNT, SHARDS = 7, 2


def make(i, generation="0"):
    return AnnotatedRecord(f"r{i}", f"i{i}", b"png", f"task {i}", "s", "a", "k", {"generation": generation})


def encoded(i, length=3, width=4, dtype=np.float32):
    text, scene = {"text": np.ones((length, width), dtype)}, {"video": np.ones((1, 2, 2, 1), np.float32)}
    return EncodedRecord(f"r{i}", "i", "t", "s", "a", "k", scene, text, text, b"")


def part(shard, generation="0"):
    return [make(i, generation) for i in range(shard, COUNT, SHARDS)]


def target(folder, **request):
    return ResumableSet(folder, "set", SHARDS, request=request, metadata={"a": "b"})


def finish(folder, generation="0"):
    """Writes what is missing of a generation."""
    writer = target(folder, generation=generation)
    for shard in range(SHARDS):
        if writer.note(shard) is None:
            writer.write(shard, part(shard, generation))
    return writer.join()


def test_round_trip(tmp_path):
    assert finish(tmp_path) == []
    reader = RecordReader(tmp_path, "set")
    reader.verify()
    assert list(reader) == [make(i) for i in range(COUNT)] and reader.metadata == {"a": "b"}


def test_join_names_what_is_missing(tmp_path):
    writer = target(tmp_path)
    assert writer.join() == [0, 1]
    writer.write(1, part(1))
    assert writer.join() == [0] and not (tmp_path / "set.json").exists()
    writer.write(0, part(0))
    assert writer.join() == [] == target(tmp_path).join() and len(RecordReader(tmp_path, "set")) == COUNT


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 0xFF])


@pytest.mark.parametrize(
    "file, change",
    [
        ("arrayrecord", flip),
        ("arrayrecord", lambda data: data[:-1]),
        ("note", lambda data: data[: len(data) // 2]),
        ("note", lambda data: b"[]"),
        ("note", lambda data: b"{}"),
        ("note", lambda data: data.replace(b"00001-of", b"00000-of")),
    ],
)
def test_a_shard_that_is_not_its_notes_is_written_anew(tmp_path, file, change):
    finish(tmp_path)
    path = next(tmp_path.glob(f"set-00001-*.{file}"))
    path.write_bytes(change(path.read_bytes()))
    writer = target(tmp_path, generation="0")
    assert writer.note(0) is not None and writer.note(1) is None and writer.join() == [1]
    assert finish(tmp_path) == []
    RecordReader(tmp_path, "set").verify()


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    def join(*shards):
        writer = target(tmp_path)
        for shard, records in enumerate(shards):
            writer.write(shard, records)
        writer.join()

    with pytest.raises(RecordError, match="two records have the id 'r0'"):
        join([make(0)], [make(0)])
    with pytest.raises(RecordError, match=r"00000-of-00002.arrayrecord has 1 of 3 records, which is not its share"):
        join([make(0)], [make(1), make(2)])
    with pytest.raises(RecordError, match="holds EncodedRecords of shapes"):
        join([make(0)], [encoded(1)])
    for other in (encoded(1, width=5), encoded(1, dtype=ml_dtypes.bfloat16)):
        with pytest.raises(RecordError, match="00001-of-00002.arrayrecord holds .* one family at one resolution"):
            join([encoded(0)], [other])
    with pytest.raises(RecordError, match="no records to write"):
        join([], [])
    assert not (tmp_path / "set.json").exists()
    join([encoded(0, 3)], [encoded(1, 9)])
    assert RecordReader(tmp_path, "set").longest_texts == {"text": {"length": 9, "id": "r1"}}


def test_bad_names_are_refused(tmp_path):
    for name, shards in (("../x", 1), ("x", 0)):
        with pytest.raises(RecordError, match="will not do"):
            ResumableSet(tmp_path, name, shards, request={})


def generation_in(folder):
    """The generation that a reader sees, of which every record must be; None where it refuses to read."""
    try:
        reader = RecordReader(folder, "set")
    except RecordError:
        return None
    reader.verify()
    (generation,) = {record.source["generation"] for record in reader}
    return generation


@pytest.mark.parametrize("function", ["replace", "fsync", "unlink"])
def test_failure_at_each_call_of_the_disk(tmp_path, monkeypatch, function):
    """The n-th call of one system function fails, for every n: never a mixture, and the next call goes on."""
    real, seen = getattr(os, function), set()
    for fail_at in range(1, 40):
        finish(tmp_path, "old")
        calls = 0

        def failing(*args, fail_at=fail_at, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(shard_files.os, function, failing)
            try:
                finish(tmp_path, str(fail_at))
            except (RecordError, OSError) as error:
                assert "No space left" in str(error)
        seen.add(generation_in(tmp_path))
        assert seen <= {"old", None, *map(str, range(fail_at + 1))}
        assert finish(tmp_path, str(fail_at)) == [] and generation_in(tmp_path) == str(fail_at)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") and function != "unlink"]
        if calls < fail_at:
            break
    assert calls < fail_at and str(fail_at) in seen and len(seen) > 1


def test_what_a_killed_writer_left_is_cleared_away_by_the_next_of_that_shard(tmp_path):
    names = [f".set-0000{i}-of-00002.arrayrecord.1-killed.tmp" for i in range(2)]
    for name in names:
        (tmp_path / name).touch()
    target(tmp_path).write(1, part(1))
    assert not (tmp_path / names[1]).exists() and (tmp_path / names[0]).exists()  # another machine may be at work on it


def test_notes_are_json_for_people(tmp_path):
    finish(tmp_path)
    note = json.loads(next(tmp_path.glob("set-00000-*.note")).read_bytes())
    assert note["request"] == {"generation": "0", "shards": 2, "metadata": {"a": "b"}}
    assert note["ids"] == ["r0", "r2", "r4", "r6"] and note["count"] == 4
