"""Encoding: every record gets the latent of its own image and the states of its own texts, each computed once."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from world_distill.data.images.png import decode_png, encode_png
from world_distill.data.records.encode import encode_records, fit_image
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordError, RecordReader, write_records

COUNT = 14


def picture(i, size=(8, 12)):
    return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)


def annotated(i, image):
    return AnnotatedRecord(
        id=f"r{i}", image_id=f"i{image}", image_png=encode_png(picture(image)), task=f"task {i}",
        solution="solution " + "x" * i, agent=f"a{i}", kind="k", source={},
    )  # fmt: skip


@pytest.fixture
def reader(tmp_path):
    # Images in runs of three, and the first one once more at the end.
    write_records(tmp_path, "raw", [annotated(i, (i // 3) % 4) for i in range(COUNT)], 2)
    return RecordReader(tmp_path, "raw")


class Encoder:
    def __init__(self):
        self.batches, self.texts = [], []

    def scene(self, images):
        self.batches.append(images.shape)
        return images[:, None, ::2, ::2].astype(ml_dtypes.bfloat16)

    def text(self, texts):
        self.texts.append(len(texts))
        return [np.array([[ord(c), len(t)] for c in t], np.float16) for t in texts]


def run(reader, folder, encoder=None, **changes):
    count(reader, folder, encoder, **changes)
    return RecordReader(folder, changes.get("name", "set"), EncodedRecord)


def count(reader, folder, encoder=None, **changes):
    """The counts of a call that may leave the data set unfinished."""
    encoder = encoder or Encoder()
    options = dict(name="set", encode_scene=encoder.scene, encode_text=encoder.text, batch=2) | changes
    return encode_records(reader, folder, **options)


def contents(folder, name="set"):
    return [record.to_bytes() for record in RecordReader(folder, name, EncodedRecord)]


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
    assert [r.solution_text.shape[0] for r in encoded] == [len(r.solution) for r in records]
    for raw, new in zip(records, encoded, strict=True):
        assert "".join(chr(int(c)) for c in new.task_text[:, 0]) == raw.task


def test_each_record_gets_its_own(reader, tmp_path):
    encoder, seen = Encoder(), []
    encoded = run(reader, tmp_path, encoder, shards=3, metadata={"family": "f"}, progress=lambda *a: seen.append(a))
    assert len(encoded) == COUNT and encoded.metadata == {"family": "f"}
    for raw, new in zip(reader, encoded, strict=True):
        assert (new.id, new.image_id, new.task, new.solution, new.agent, new.kind, new.image_png) == (
            raw.id, raw.image_id, raw.task, raw.solution, raw.agent, raw.kind, raw.image_png,
        )  # fmt: skip
        image = decode_png(raw.image_png)
        assert new.scene.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(new.scene, image[None, ::2, ::2].astype(ml_dtypes.bfloat16))
        for text, states in ((raw.task, new.task_text), (raw.solution, new.solution_text)):
            assert states.dtype == np.float16
            assert "".join(chr(int(c)) for c in states[:, 0]) == text
    # Each shard holds a task of every image, the first and the second two of the fifth run: 5 images, 5 and 4.
    assert encoder.batches == [(2, 8, 12, 3)] * (3 + 3 + 2)  # one shape, so one compilation
    assert sum(encoder.texts) == 2 * COUNT and max(encoder.texts) == 2
    assert seen == [(n, COUNT) for n in (0, 2, 4, 5, 7, 9, 10, 12, 14)]


def test_an_image_is_encoded_once_for_its_neighbouring_tasks(reader, tmp_path):
    encoder = Encoder()
    run(reader, tmp_path, encoder, batch=1)
    assert encoder.batches == [(1, 8, 12, 3)] * 5  # 5 runs of one image, 14 records


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
    with pytest.raises(RecordError, match=r"encode_scene returned shape \(2, 4, 6, 3\) for 2 images"):
        run(reader, tmp_path, name="x", encode_scene=lambda images: encoder.scene(images)[:, 0])
    with pytest.raises(RecordError, match="encode_text returned shapes"):
        run(reader, tmp_path, name="x", encode_text=lambda texts: encoder.text(texts)[1:])
    odd = AnnotatedRecord("o", "odd", encode_png(picture(0, (8, 8))), "t", "s", "a", "k", {})
    write_records(tmp_path, "mixed", [annotated(0, 0), odd])
    with pytest.raises(RecordError, match="images of different sizes .* give `size`"):
        run(RecordReader(tmp_path, "mixed"), tmp_path, name="x")
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob(".x*"))


# ---- Shard after shard


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
    assert counts == {"records": 14, "encoded": 9, "shards": 3, "shards_kept": 1, "shards_missing": 0}
    assert sum(encoder.texts) == 2 * 9 and seen[0] == (5, 14) and seen[-1] == (14, 14)
    assert contents(tmp_path) == whole


def test_each_shard_by_a_call_of_its_own_in_any_order(reader, whole, tmp_path):
    for shard, left in ((2, 2), (0, 1), (1, 0)):
        with pytest.raises(RecordError, match="no readable index"):
            RecordReader(tmp_path, "set")
        counts = count(reader, tmp_path, shards=3, only=shard)
        assert (counts["encoded"], counts["shards_missing"]) == ([5, 5, 4][shard], left)
    assert contents(tmp_path) == whole
    assert RecordReader(tmp_path, "set").longest_text == RecordReader(tmp_path / "whole", "set").longest_text


def test_what_is_complete_is_left_alone(reader, tmp_path):
    run(reader, tmp_path, shards=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    encoder = Encoder()
    counts = count(reader, tmp_path, encoder, shards=2)
    assert counts == {"records": 14, "encoded": 0, "shards": 2, "shards_kept": 2, "shards_missing": 0}
    assert not encoder.texts and not encoder.batches
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "set.json").unlink()  # a job that died between the last note and the index
    assert count(reader, tmp_path, shards=2, only=0)["encoded"] == 0
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
    counts = count(reader, tmp_path, **options, only=0)
    assert counts["shards_kept"] == 0 and counts["shards_missing"] == options["shards"] - 1
    with pytest.raises(RecordError, match="no readable index"):  # nor is the old set mixed with the new shard
        RecordReader(tmp_path, "set")
    count(reader, tmp_path, **options)
    encoded = RecordReader(tmp_path, "set")
    encoded.verify()
    assert encoded.metadata == options["metadata"]
    assert [r.id for r in encoded] == [r.id for r in reader]
    assert len(list(tmp_path.glob("set-*"))) == 2 * options["shards"]  # shards and notes of no other number


def test_shards_have_to_be_among_those_there_are(reader, tmp_path):
    for only in (-1, 3):
        with pytest.raises(RecordError, match=f"no shard {only} among 3: they are counted from 0 to 2"):
            count(reader, tmp_path, shards=3, only=only)


def test_more_shards_than_records(reader, tmp_path):
    assert len(run(reader, tmp_path, shards=COUNT + 2)) == COUNT
    assert count(reader, tmp_path, shards=COUNT + 2)["encoded"] == 0
