"""Clips of records: kept beside them, read only where they are asked for, once for each video."""

import dataclasses
import json

import numpy as np
import pytest

from world_distill.data.records import record_format
from world_distill.data.records.reader import EncodedRecord, RecordError, RecordReader, write_records
from world_distill.data.records.record_format import read_clip
from world_distill.data.records.resumable import ResumableSet

SHAPE = (3, 2, 2, 4)


def record(i, image=None, clip=None):
    rng = np.random.default_rng(i)
    image = i // 2 if image is None else image
    states = {"text": rng.normal(size=(2 + i % 3, 5)).astype(np.float32)}
    scene = {"video": np.random.default_rng(image).normal(size=(1, 2, 2, 4)).astype(np.float32)}
    clip = np.random.default_rng(100 + image).normal(size=SHAPE).astype(np.float32) if clip is None else clip
    return EncodedRecord(
        f"r{i}", f"i{image}", f"task {i}", "solution", "a", "k", scene, states, states, bytes([image]), {"video": clip}
    )


def without(of):
    return dataclasses.replace(of, clip={})


def written(folder, records, shards=1, **options):
    write_records(folder, "set", records, shards, **options)
    return RecordReader(folder, "set", clips=True)


@pytest.mark.parametrize("shards", [1, 3])
def test_records_come_back_with_their_own_clips(tmp_path, shards):
    records = [record(i) for i in range(7)]
    reader = written(tmp_path, records, shards)
    assert len(reader) == 7 and reader.has_clips
    for given, found in zip(records, reader, strict=True):
        assert found.to_bytes() == given.to_bytes()
        assert found.clip["video"].dtype == np.float32
        np.testing.assert_array_equal(found.clip["video"], given.clip["video"])
    assert reader.heads().id == [f"r{i}" for i in range(7)]
    assert reader.without_scene(1).task == "task 1" and reader[1].image_png == bytes([0])
    reader.verify()


def test_who_does_not_ask_for_clips_does_not_read_them(tmp_path, monkeypatch):
    written(tmp_path, [record(i) for i in range(4)], 2)
    monkeypatch.setattr(record_format, "read_clip", None)
    reader = RecordReader(tmp_path, "set")
    rows = []
    monkeypatch.setattr(reader, "_shards", [Noted(shard, rows) for shard in reader._shards])
    assert [r.clip for r in reader] == [{}] * 4 and [r.task for r in reader] == [f"task {i}" for i in range(4)]
    assert rows and all(row % 2 == 0 for row in rows)


class Noted:
    def __init__(self, shard, rows):
        self.shard, self.rows = shard, rows

    def __getitem__(self, row):
        self.rows.append(row)
        return self.shard[row]


def test_records_of_one_video_share_its_clip(tmp_path):
    def size(count):
        big = np.random.default_rng(0).normal(size=(64, 32, 32, 4)).astype(np.float32)
        written(tmp_path, [record(i, 0, big) for i in range(count)])
        [shard] = tmp_path.glob("set-*.arrayrecord")
        return shard.stat().st_size

    one, four = size(1), size(4)
    assert one > 1 << 20 and four - one < 1 << 18
    assert all(
        np.array_equal(r.clip["video"], record(0, 0).clip["video"])
        for r in written(tmp_path, [record(0, 0), record(1, 0)])
    )


def test_clips_of_one_image_may_differ(tmp_path):
    clips = [np.full(SHAPE, i, np.float32) for i in (1, 2, 2)]
    reader = written(tmp_path, [record(i, 0, clip) for i, clip in enumerate(clips)])
    for found, clip in zip(reader, clips, strict=True):
        np.testing.assert_array_equal(found.clip["video"], clip)


def test_a_narrower_type_rounds_clips_and_scenes_and_keeps_their_own(tmp_path):
    found = written(tmp_path, [record(0)], scene_dtype="bfloat16")[0]
    for name in ("scene", "clip"):
        array, given = getattr(found, name)["video"], getattr(record(0), name)["video"]
        assert array.dtype == np.float32 and 0 < np.abs(array - given).max() < 0.02
    with pytest.raises(RecordError, match="record 'r0': clip 'video' has values that are not finite in float16"):
        written(tmp_path, [record(0, clip=np.full(SHAPE, 1e6, np.float32))], scene_dtype="float16")
    with pytest.raises(RecordError, match="clip 'video' has values that are not finite"):
        written(tmp_path, [record(0, clip=np.full(SHAPE, np.nan, np.float32))])


def test_a_set_has_clips_of_one_shape_or_none(tmp_path):
    for other in (without(record(2)), record(2, clip=np.zeros((2, 2, 2, 4), np.float32))):
        with pytest.raises(RecordError, match="record 'r2': scene shapes and text widths, and clip shapes,"):
            written(tmp_path, [record(0), other])
    write_records(tmp_path, "bare", [without(record(0))])
    assert not RecordReader(tmp_path, "bare").has_clips
    with pytest.raises(RecordError, match=r"bare.json holds no clips to learn from: `world-distill import-videos`"):
        RecordReader(tmp_path, "bare", clips=True)


def test_sets_without_clips_are_written_as_before(tmp_path):
    index = json.loads(write_records(tmp_path, "bare", [without(record(0))]).read_text())
    assert index["version"] == 3 and "clips" not in index["shards"][0]
    index = json.loads(write_records(tmp_path, "set", [record(0)]).read_text())
    assert index["version"] == 4 and index["shards"][0]["clips"] is True  # which earlier programs say they cannot read


def test_shards_with_clips_are_resumed_and_joined(tmp_path):
    def target():
        return ResumableSet(tmp_path, "set", 2, request={"a": 1}, sequential=True)

    target().write(0, [record(0), record(1)])
    assert target().join() == [1] and target().note(0)["clips"] is True
    target().write(1, [record(2)])
    assert target().join() == []
    assert [r.clip["video"][0, 0, 0, 0] for r in RecordReader(tmp_path, "set", clips=True)] == [
        record(i).clip["video"][0, 0, 0, 0] for i in range(3)
    ]
    target().write(1, [without(record(2))])
    with pytest.raises(RecordError, match="one family at one resolution"):
        target().join()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index | {"version": 3}, "clips, or the version says otherwise"),
        (lambda index: index | {"shards": [{**index["shards"][0], "clips": False}]}, "or the version says otherwise"),
        (lambda index: index | {"shards": [{**index["shards"][0], "clips": 1}]}, "another type"),
        (lambda index: index | {"version": 5}, "of a later version of world-distill"),
    ],
)
def test_an_index_that_contradicts_itself_about_clips_is_refused(tmp_path, change, reason):
    path = write_records(tmp_path, "set", [record(0)])
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(RecordError, match=reason):
        RecordReader(tmp_path, "set")


def test_damaged_clips_are_refused(tmp_path):
    data = record(0).clip_to_bytes()
    np.testing.assert_array_equal(read_clip(data, "r0")["video"], record(0).clip["video"])
    assert read_clip(record(0).clip_to_bytes(3), "r0") == 3
    for bad, name, reason in (
        (data, "r1", "said to be that of 'r0'"),
        (data[:-5], "r0", "damaged clip"),
        (b"WDCLIP\x02" + data[7:], "r0", "of a later version"),
        (record(0).to_bytes(), "r0", "not a clip"),
        (without(record(0)).clip_to_bytes(), "r0", "damaged clip"),
    ):
        with pytest.raises(RecordError, match=reason):
            read_clip(bad, name)


def test_a_clip_is_taken_from_an_earlier_record_of_its_own_image_only(tmp_path, monkeypatch):
    for row, reason in ((1, "said to be beside record 1"), (0, "does not hold the clip of image 'i1'")):
        with monkeypatch.context() as patch:
            patch.setattr(EncodedRecord, "shares_clip", lambda self, other: True)
            to_bytes = EncodedRecord.clip_to_bytes

            def elsewhere(self, at=None, *, to_bytes=to_bytes, row=row, **options):
                return to_bytes(self, None if at is None else row, **options)

            patch.setattr(EncodedRecord, "clip_to_bytes", elsewhere)
            write_records(tmp_path, "set", [record(0, 0), record(1, 1)])
        with pytest.raises(RecordError, match=reason):
            RecordReader(tmp_path, "set", clips=True)[1]
