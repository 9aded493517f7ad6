"""What cannot be encoded is left out and listed, and stops nothing else."""

import dataclasses
import json

import numpy as np
import pytest

from tests.data.records.encoding import COUNT, Encoder, annotated, count, picture, run, write_raw
from world_distill.data.records.reader import RecordError, RecordReader, write_records
from world_distill.interfaces import TextError


@pytest.fixture
def reader(tmp_path):
    return write_raw(tmp_path)


class Strict(Encoder):
    """Refuses texts of more than `most` characters, and names none of them."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def text(self, texts):
        if any(len(text) > self.most for text in texts):
            raise TextError(f"more than {self.most}")
        return super().text(texts)


def listed(folder):
    path = folder / "set.left_out.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    "encoder, lengths, why",
    [
        (Strict(20), None, "more than 20"),
        (Encoder(), {"text": 20}, "21 tokens, and texts are padded to 20: raise config.text_length"),
        (Encoder(), {"text": 99, "glyphs": 40}, "42 tokens, and texts are padded to 40: raise config.text_length"),
    ],
)
def test_a_text_that_is_too_long_is_left_out_and_listed(reader, tmp_path, encoder, lengths, why):
    """Solutions have 9 + i characters, so those of records 12 and 13 have more than 20: one in each of two shards."""
    for shard in (1, 0):
        assert not listed(tmp_path)
        counts = count(reader, tmp_path, encoder, shards=2, lengths=lengths, only=[shard])
    assert (counts["encoded"], counts["left_out"]) == (6, 2)
    encoded = RecordReader(tmp_path, "set")
    assert len(encoded) == 12 and encoded.left_out == 2
    assert {r.id for r in reader} - {r.id for r in encoded} == {"r12", "r13"}
    first, second = listed(tmp_path)
    assert first | {"tokens": 0} == {
        "id": "r12", "image_id": "i0", "what": "solution", "why": why, "text": "solution " + "x" * 12, "tokens": 0,
    }  # fmt: skip
    assert second["id"] == "r13"
    assert count(reader, tmp_path, encoder, shards=2, lengths=lengths)["encoded"] == 0  # nothing is tried again


def test_other_lengths_change_what_is_left_out_and_nothing_else(reader, tmp_path):
    def encoded(length):
        counts = count(reader, tmp_path, shards=2, lengths={"text": length})
        assert len(RecordReader(tmp_path, "set")) == COUNT - len(listed(tmp_path))
        return counts["encoded"], counts["shards_kept"], len(listed(tmp_path))

    assert encoded(30) == (14, 0, 0)
    assert encoded(22) == (0, 2, 0)  # the longest text
    assert encoded(20) == (6, 1, 2)  # both in one shard
    assert encoded(40) == (8, 1, 0) and not (tmp_path / "set.left_out.jsonl").exists()


def test_an_image_without_a_task_that_is_left_is_not_encoded(reader, tmp_path):
    encoder = Encoder()
    run(reader, tmp_path, encoder, batch=1, lengths={"text": 17})  # of images 3 (records 9 to 11): none
    assert len(encoder.batches) == 3 and {line["id"] for line in listed(tmp_path)} == {f"r{i}" for i in range(9, 14)}
    with pytest.raises(RecordError, match=r"no records to write: all 14 were left out, such as .*raise config.text_"):
        count(reader, tmp_path, name="none", lengths={"text": 3})


def test_a_damaged_picture_is_left_out_with_its_tasks(tmp_path):
    records = [annotated(i, i // 2) for i in range(6)]
    records = [
        dataclasses.replace(r, image_png=r.image_png[:50] if r.image_id == "i1" else r.image_png) for r in records
    ]
    write_records(tmp_path, "raw", records)
    encoded = run(RecordReader(tmp_path, "raw"), tmp_path)
    assert [r.id for r in encoded] == ["r0", "r1", "r4", "r5"]
    assert [(x["id"], x["what"], x["why"][:11]) for x in listed(tmp_path)] == [
        ("r2", "picture", "damaged PNG"), ("r3", "picture", "damaged PNG"),
    ]  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_left_out(reader, tmp_path, value):
    """As umT5 in half precision makes it of some texts."""
    encoder = Encoder()

    def text(texts):
        found = encoder.text(texts)
        for words, states in zip(texts, found["text"], strict=True):
            states[-1, 0] = value if words == "task 4" else states[-1, 0]
        return found

    def scene(images):
        found = encoder.scene(images)
        found["video"][(images == picture(3)).all((1, 2, 3))] = value
        return found

    encoded = run(reader, tmp_path, encode_text=text, encode_scene=scene)
    assert [(line["id"], line["what"], line["why"]) for line in listed(tmp_path)] == [
        ("r4", "task", "its states are not finite"),
        *((f"r{i}", "picture", "its latents are not finite") for i in (9, 10, 11)),
    ]
    assert len(encoded) == COUNT - 4


def test_a_set_of_which_nothing_can_be_encoded_stops_early(tmp_path):
    write_records(tmp_path, "raw", (annotated(i, i) for i in range(300)))
    encoder = Encoder()
    with pytest.raises(RecordError, match="none of the first 100 records can be encoded, such as .*text_length"):
        count(RecordReader(tmp_path, "raw"), tmp_path, encoder, lengths={"text": 3})
    assert not encoder.batches and sum(encoder.texts) == 200


def test_two_calls_for_one_shard_are_told(reader, tmp_path):
    class Disturbed(Encoder):
        def text(self, texts):
            for path in tmp_path.glob(".set-*.tmp"):  # as a second call does
                path.unlink()
            return super().text(texts)

    with pytest.raises(RecordError, match="another call has begun to write this shard: let one of them do it"):
        count(reader, tmp_path, Disturbed())


def test_another_error_of_the_encoder_is_not_of_a_text(reader, tmp_path):
    def broken(texts):
        raise ValueError("no text encoder")

    with pytest.raises(ValueError, match="no text encoder"):
        count(reader, tmp_path, encode_text=broken)
