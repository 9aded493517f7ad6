"""Encoding: every record gets the latent of its own image and the states of its own texts, each computed once."""

import dataclasses
import json
import pathlib
import tarfile

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from tests.data.records.encoding import COUNT, Encoder, annotated, contents, count, grouped, picture, run, write_raw
from world_distill.data.images.png import decode_png, encode_png
from world_distill.data.records import record_format
from world_distill.data.records.encode import encode_records
from world_distill.data.records.encoder_calls import fit_image
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordError, RecordReader, write_records
from world_distill.data.records.resumable import ResumableSet


@pytest.fixture
def reader(tmp_path):
    return write_raw(tmp_path)


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


class Mortal(Encoder):
    """Dies at the text with number `last`, from 0."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def text(self, texts):
        if sum(self.texts) + len(texts) > self.last:
            raise Killed
        return super().text(texts)


def test_a_task_without_a_solution_is_encoded_without_one(tmp_path):
    records = [annotated(0, 0), dataclasses.replace(annotated(1, 0), solution=""), annotated(2, 0)]
    write_records(tmp_path, "bare", records, 1)
    encoded = list(run(RecordReader(tmp_path, "bare"), tmp_path))
    assert [r.solution_states["text"].shape[0] for r in encoded] == [len(r.solution) for r in records]
    for raw, new in zip(records, encoded, strict=True):
        assert "".join(chr(int(c)) for c in new.task_states["text"][:, 0]) == raw.task


def test_each_record_gets_its_own(reader, tmp_path):
    encoder, seen = Encoder(), []
    encoded = run(reader, tmp_path, encoder, shards=3, metadata={"family": "f"}, progress=lambda *a: seen.append(a))
    assert len(encoded) == COUNT and encoded.metadata == {"family": "f"}
    for raw, new in zip(grouped(reader), encoded, strict=True):
        assert (new.id, new.image_id, new.task, new.solution, new.agent, new.kind, new.image_png) == (
            raw.id, raw.image_id, raw.task, raw.solution, raw.agent, raw.kind, raw.image_png,
        )  # fmt: skip
        image = decode_png(raw.image_png)
        assert new.scene["video"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(new.scene["glance"], image.mean((0, 1)).astype(np.float32))
        np.testing.assert_array_equal(new.scene["video"], image[None, ::2, ::2].astype(ml_dtypes.bfloat16))
        for text, states in ((raw.task, new.task_states), (raw.solution, new.solution_states)):
            assert states["text"].dtype == np.float16
            assert "".join(chr(int(c)) for c in states["text"][:, 0]) == text
            assert "".join(chr(int(c)) for c in states["glyphs"][::2, 1]) == text
    # Shards of whole images: one of five records, two of three each, and one of three.
    assert encoder.batches == [(2, 8, 12, 3)] * 3  # one shape, so one compilation
    assert sum(encoder.texts) == 2 * COUNT and max(encoder.texts) == 2
    assert seen == [(n, COUNT) for n in (0, 5, 11, 14)]


@pytest.mark.parametrize("shards", [1, 3, 16])
@pytest.mark.parametrize("order", ["given", "shuffled"])
def test_an_image_is_encoded_and_stored_once(reader, tmp_path, shards, order):
    """Whatever the order of the records and the number of shards."""
    if order == "shuffled":
        records = np.random.default_rng(0).permutation(np.array(list(reader), object))
        write_records(tmp_path, "shuffled", records, 5)
        reader = RecordReader(tmp_path, "shuffled")
    encoder = Encoder()
    encoded = run(reader, tmp_path, encoder, batch=1, shards=shards)
    assert encoder.batches == [(1, 8, 12, 3)] * 4
    assert [r.id for r in encoded] == [r.id for r in grouped(reader)]
    for folder in (encoded, reader):  # annotated records share their picture, too
        assert sum(stored_whole(folder)) == 4
    assert {r.id: r.image_png for r in encoded} == {r.id: encode_png(picture(int(r.image_id[1:]))) for r in reader}


def stored_whole(reader):
    """Of each row of each shard, whether it has picture and scene itself."""
    return [
        record_format.read_stored(reader.record_type, shard[row])[1] is None
        for shard, count in zip(reader._shards, reader._counts, strict=True)
        for row in range(count)
    ]


def test_images_are_brought_to_size(reader, tmp_path):
    encoder = Encoder()
    encoded = run(reader, tmp_path, encoder, size=(4, 4))
    assert set(encoder.batches) == {(2, 4, 4, 3)}
    np.testing.assert_array_equal(decode_png(encoded[0].image_png), fit_image(picture(0), (4, 4)))


def test_fit_image_keeps_the_proportions():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255  # the middle third is what a square cut shows
    assert (fit_image(image, (10, 10)) == 255).all()
    assert fit_image(image, (10, 30)) is image
    assert fit_image(image, (20, 40)).shape == (20, 40, 3)


def test_mistakes_are_named(reader, tmp_path):
    encoder = Encoder()
    encoded = run(reader, tmp_path)
    with pytest.raises(RecordError, match="encoded already"):
        run(encoded, tmp_path, name="again")
    with pytest.raises(RecordError, match="would replace the annotated one"):
        run(reader, tmp_path, name="raw")
    assert len(reader) == len(RecordReader(tmp_path, "raw")) == COUNT
    with pytest.raises(RecordError, match=r"encode_scene returned 'video' of shape \(1, 1, 4, 6, 3\) for 2 images"):
        run(reader, tmp_path, name="x", encode_scene=lambda images: encoder.scene(images[1:]))
    with pytest.raises(RecordError, match="encode_text returned 'text' of shapes"):
        run(reader, tmp_path, name="x", encode_text=lambda texts: encoder.text(texts[1:]))
    odd = AnnotatedRecord("o", "odd", encode_png(picture(0, (8, 8))), "t", "s", "a", "k", {})
    write_records(tmp_path, "mixed", [annotated(0, 0), odd])
    with pytest.raises(RecordError, match="images of different sizes .* give `size`"):
        run(RecordReader(tmp_path, "mixed"), tmp_path, name="x")
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob(".x*"))


# ---- Shard after shard

NOTHING = {"records": 14, "encoded": 0, "left_out": 0, "bytes": 0, "shards": 2, "shards_kept": 2, "shards_missing": 0}


@pytest.fixture
def whole(reader, tmp_path):
    """What the set of three shards has to hold."""
    run(reader, tmp_path / "whole", shards=3)
    return contents(tmp_path / "whole")


def test_a_killed_job_goes_on_at_the_first_unfinished_shard(reader, whole, tmp_path):
    with pytest.raises(Killed):
        count(reader, tmp_path, Mortal(2 * 5 + 4), shards=3)  # in the second shard
    with pytest.raises(RecordError, match="shards are there, so its writing was cut off"):
        RecordReader(tmp_path, "set")
    encoder, seen = Encoder(), []
    counts = count(reader, tmp_path, encoder, shards=3, progress=lambda *a: seen.append(a))
    size = sum(path.stat().st_size for path in tmp_path.glob("set-0000[12]*.arrayrecord"))
    assert counts == NOTHING | {"encoded": 9, "bytes": size, "shards": 3, "shards_kept": 1}
    assert sum(encoder.texts) == 2 * 9 and seen[0] == (5, 14) and seen[-1] == (14, 14)
    assert contents(tmp_path) == whole


def test_each_shard_by_a_call_of_its_own_in_any_order(reader, whole, tmp_path):
    for shard, left in ((2, 2), (0, 1), (1, 0)):
        with pytest.raises(RecordError, match="no readable index"):
            RecordReader(tmp_path, "set")
        counts = count(reader, tmp_path, shards=3, only=[shard])
        assert (counts["encoded"], counts["shards_missing"]) == ([5, 6, 3][shard], left)
    assert contents(tmp_path) == whole
    assert RecordReader(tmp_path, "set").longest_texts == RecordReader(tmp_path / "whole", "set").longest_texts


def test_what_is_complete_is_left_alone(reader, tmp_path):
    run(reader, tmp_path, shards=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    encoder = Encoder()
    counts = count(reader, tmp_path, encoder, shards=2)
    assert counts == NOTHING
    assert not encoder.texts and not encoder.batches
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "set.json").unlink()  # a job that died between the last note and the index
    assert count(reader, tmp_path, shards=2, only=[0])["encoded"] == 0
    assert len(RecordReader(tmp_path, "set")) == COUNT


@pytest.mark.parametrize("change", ["size", "metadata", "annotated", "shards"])
def test_shards_of_another_request_are_not_taken(reader, tmp_path, change):
    count(reader, tmp_path, shards=3, metadata={"weights": "a"})
    options = {"shards": 3, "metadata": {"weights": "a"}}
    if change == "annotated":
        write_records(tmp_path, "raw", [annotated(i, i) for i in range(COUNT)], 2)
        reader = RecordReader(tmp_path, "raw")
    else:
        options[change] = {"size": (4, 4), "metadata": {"weights": "b"}, "shards": 2}[change]
    counts = count(reader, tmp_path, **options, only=[0])
    assert counts["shards_kept"] == 0 and counts["shards_missing"] == options["shards"] - 1
    with pytest.raises(RecordError, match="no readable index"):  # nor is the old set mixed with the new shard
        RecordReader(tmp_path, "set")
    count(reader, tmp_path, **options)
    encoded = RecordReader(tmp_path, "set")
    encoded.verify()
    assert encoded.metadata == options["metadata"]
    assert [r.id for r in encoded] == [r.id for r in grouped(reader)]
    assert len(list(tmp_path.glob("set-*"))) == 2 * options["shards"]  # shards and notes of no other number


def test_shards_have_to_be_among_those_there_are(reader, tmp_path):
    for only in (-1, 3):
        with pytest.raises(RecordError, match=f"no shard {only} among 3: they are counted from 0 to 2"):
            count(reader, tmp_path, shards=3, only=[only])


def test_more_shards_than_records(reader, tmp_path):
    assert len(run(reader, tmp_path, shards=COUNT + 2)) == COUNT
    assert count(reader, tmp_path, shards=COUNT + 2)["encoded"] == 0


# ---- Scenes that records share


def test_the_tasks_of_an_image_share_its_scene_on_disk(reader, tmp_path):
    run(reader, tmp_path, shards=2, name="together")
    encoded = RecordReader(tmp_path, "together")
    # Two whole images are nearest to a half of the records: of five and three, and of three and three.
    assert np.flatnonzero(stored_whole(encoded)).tolist() == [0, 5, 8, 11]
    for raw, new in zip(grouped(reader), encoded, strict=True):
        assert new.image_png == raw.image_png and set(new.scene) == {"video", "glance"}
        np.testing.assert_array_equal(new.scene["video"], decode_png(raw.image_png)[None, ::2, ::2])
    apart = [dataclasses.replace(r, id=f"{i}", image_id=f"{i}") for i, r in enumerate(encoded)]
    write_records(tmp_path, "apart", apart, 2)
    sizes = [
        sum(len(shard[row]) for shard in RecordReader(tmp_path, name)._shards for row in range(len(shard)))
        for name in ("together", "apart")
    ]
    assert sizes[0] < 0.75 * sizes[1]


@pytest.mark.parametrize("change", ["scene", "image_png", "image_id"])
def test_a_scene_is_shared_only_if_it_is_the_same(reader, tmp_path, change):
    first, second, *_ = run(reader, tmp_path)
    other = {
        "scene": first.scene | {"glance": first.scene["glance"] + 1}, "image_png": first.image_png + b"!",
        "image_id": "other",
    }[change]  # fmt: skip
    write_records(tmp_path, "two", [first, dataclasses.replace(second, **{change: other})])
    found = RecordReader(tmp_path, "two")
    assert stored_whole(found) == [True, True]
    np.testing.assert_equal(getattr(found[1], change), other)


def test_a_wrong_row_of_a_scene_is_damage(reader, tmp_path):
    first, second, third, *_, other = run(reader, tmp_path)
    for rows, record, message in (
        ([first.to_bytes(), second.to_bytes(1)], 1, "row 1: its scene is said to be in row 1"),
        ([first.to_bytes(), second.to_bytes(0), third.to_bytes(1)], 2, "row 1 does not hold the scene"),
        ([first.to_bytes(), other.to_bytes(0)], 1, f"does not hold the scene of image '{other.image_id}'"),
    ):
        write_records(tmp_path, "set", [first])
        found = RecordReader(tmp_path, "set")
        found._shards, found._counts, found._count, found._ends = [rows], [len(rows)], len(rows), [len(rows)]
        with pytest.raises(RecordError, match=message):
            found[record]


# ---- Narrower scenes


class Wide(Encoder):
    def scene(self, images):
        self.batches.append(images.shape)
        return {"video": images[:, None, ::2, ::2] / np.float32(7), "glance": images.mean((1, 2)).astype(np.float16)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scenes_are_stored_in_a_type_and_read_in_their_own(reader, tmp_path, dtype):
    whole, narrow = run(reader, tmp_path, Wide(), name="whole"), run(reader, tmp_path, Wide(), scene_dtype=dtype)
    assert narrow.metadata == {"scene_dtype": dtype} and whole.metadata == {}
    for own, stored in zip(whole, narrow, strict=True):
        assert stored.scene["video"].dtype == np.float32 and stored.scene["glance"].dtype == np.float16
        np.testing.assert_array_equal(stored.scene["video"], own.scene["video"].astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(stored.scene["glance"], own.scene["glance"])  # it is no wider
    bytes_of = [len(bytes(r._shards[0][0])) for r in (whole, narrow)]
    assert (bytes_of[0] - bytes_of[1] > 100) is (dtype != "float32")
    assert count(reader, tmp_path, Wide(), scene_dtype="float32")["encoded"] == (0 if dtype == "float32" else 14)


def test_values_that_a_narrow_type_cannot_hold_are_refused(reader, tmp_path):
    def scene(images):
        return {"video": images[:, None] * np.float32(1000)}

    with pytest.raises(RecordError, match="'video' has values that are not finite in float16: choose bfloat16"):
        count(reader, tmp_path, encode_scene=scene, scene_dtype="float16")


# ---- What it says


def test_the_estimate_is_near(tmp_path):
    def make(i, length):
        image = encode_png(picture(i // 8, (64, 96)))
        return AnnotatedRecord(f"r{i}", f"i{i // 8}", image, "task", "x" * length, "a", "k", {})

    write_records(tmp_path, "raw", map(make, range(160), np.random.default_rng(0).integers(300, 600, 160)))
    said, encoder = [], Wide()
    scenes = {"video": np.zeros((1, 32, 48, 3), np.float32), "glance": np.zeros(3, np.float16)}
    counts = count(RecordReader(tmp_path, "raw"), tmp_path, encoder, shards=2, scenes=scenes, say=said.append)
    assert counts["bytes"] == pytest.approx(counts["estimated_bytes"], rel=0.15)
    assert said[0].startswith("set: about ") and "for 20 images and 160 records (scenes 369 kB, pictures 37" in said[0]
    assert len(encoder.batches) == 10  # no scene is encoded for it
    more, again = [], Wide()
    count(RecordReader(tmp_path, "raw"), tmp_path, again, shards=2, size=(8, 8), scenes=scenes, say=more.append)
    assert more[0] == "finished shards of set are of another request and are written anew: size None -> [8, 8]"


def test_a_full_disk_is_seen_before(reader, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    count(reader, tmp_path / "new" / "folder", scenes={}, say=said.append)
    assert said[1] == f"warning: {tmp_path / 'new' / 'folder'} has 1 kB free, and 131 kB are needed: make room first"


# ---- What earlier versions wrote


@pytest.fixture
def old_sets(tmp_path):
    """Made by `make_old_sets.py` in November 2026: annotated records of version 1, encoded ones of version 2."""
    with tarfile.open(pathlib.Path(__file__).with_name("old_sets.tar.xz")) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def old_scene(images):
    return {"video": images[:, None, ::2, ::2].astype(np.float32)}


def old_text(texts):
    return {"text": [np.array([[ord(c), len(t)] for c in t], np.float16) for t in texts]}


@pytest.mark.parametrize("name", ["train", "mixed"])  # whose images stand together, and do not
def test_sets_of_the_version_before_open_and_go_on(old_sets, name):
    options = dict(encode_scene=old_scene, encode_text=old_text, shards=3, batch=2, metadata={"family": "f"})
    annotated, before = RecordReader(old_sets, f"{name}_annotated"), RecordReader(old_sets, name)
    before.verify()
    assert not annotated.has_heads and [r.id for r in annotated] == [f"r{i}" for i in range(9)] == annotated.heads().id
    assert encode_records(annotated, old_sets, name=name, **options)["encoded"] == 0
    half = f"{name}_half"  # of which one shard of three was written
    said, images = [], []

    def scene(batch):
        images.append(batch)
        return old_scene(batch)

    counts = encode_records(annotated, old_sets, name=half, **options | {"encode_scene": scene, "say": said.append})
    assert (counts["encoded"], counts["shards_kept"]) == (6, 1)
    assert ("going on in its order" in " ".join(said)) is (name == "mixed")
    found = RecordReader(old_sets, half)
    found.verify()
    assert [r.to_bytes() for r in found] == [r.to_bytes() for r in before]
    assert found.heads() == before.heads() == annotated.heads() and not found.has_heads
    if name == "mixed":  # begun anew, each image is encoded once
        for path in old_sets.glob("mixed_half*"):
            path.unlink()
        assert encode_records(annotated, old_sets, name=half, **options)["encoded"] == 9
        assert sum(stored_whole(RecordReader(old_sets, half))) == 3


def old_bytes(record):
    """The record as version 1 wrote it."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    fields["scene"] = fields["scene"]["video"]
    for role in ("task", "solution"):
        fields[f"{role}_text"] = fields.pop(f"{role}_states")["text"]
    return b"WDREC\x01" + serialization.msgpack_serialize({"type": "EncodedRecord", "fields": fields})


def test_a_complete_set_of_an_earlier_version_is_kept(reader, tmp_path, monkeypatch):
    """Its records are dealt out to the shards in turn, each with its scene, and runs know their fingerprint."""
    new = list(run(reader, tmp_path / "new"))
    old = ResumableSet(
        tmp_path,
        "set",
        2,
        request={"annotated": reader.fingerprint, "records": COUNT, "size": None},
        metadata={"a": "b"},
    )
    with monkeypatch.context() as patch:
        patch.setattr(EncodedRecord, "to_bytes", lambda record, row, **options: old_bytes(record))
        for shard in range(2):
            old.write(shard, new[shard::2])
        old.join()
    index = json.loads((tmp_path / "set.json").read_text())
    longest = index["longest_text"]["text"]
    (tmp_path / "set.json").write_text(json.dumps(index | {"version": 1, "longest_text": longest}))
    before = RecordReader(tmp_path, "set")
    assert before.longest_texts == {"text": longest} and [r.id for r in before] == [r.id for r in new]
    for ours, theirs in zip(new, before, strict=True):
        np.testing.assert_array_equal(ours.scene["video"], theirs.scene["video"])
        np.testing.assert_array_equal(ours.solution_states["text"], theirs.solution_states["text"])
    encoder = Encoder()
    counts = count(reader, tmp_path, encoder, shards=2, metadata={"a": "b"})
    assert counts == NOTHING
    assert not encoder.texts and RecordReader(tmp_path, "set").fingerprint == before.fingerprint
    assert count(reader, tmp_path, encoder, shards=2, metadata={"a": "c"})["encoded"] == 14
