"""Encoding: every record gets the latent of its own image and the states of its own texts, each computed once."""

import ml_dtypes
import numpy as np
import pytest

from world_distill.data.encode import encode_records, fit_image
from world_distill.data.record_types import decode_png, encode_png
from world_distill.data.records import AnnotatedRecord, EncodedRecord, RecordError, RecordReader, write_records

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
    encoder = encoder or Encoder()
    options = dict(name="set", encode_scene=encoder.scene, encode_text=encoder.text, batch=2) | changes
    encode_records(reader, folder, **options)
    return RecordReader(folder, options["name"], EncodedRecord)


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
    assert encoder.batches == [(2, 8, 12, 3)] * 3  # one shape, so one compilation; 5 runs of one image
    assert sum(encoder.texts) == 2 * COUNT and max(encoder.texts) == 2
    assert seen == [(6, COUNT), (12, COUNT), (14, COUNT)]


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
