"""A set of annotated records to encode, and encoders that count what they are given."""

import ml_dtypes
import numpy as np

from world_distill.data.images.png import encode_png
from world_distill.data.records.encode import encode_records
from world_distill.data.records.reader import AnnotatedRecord, EncodedRecord, RecordReader, write_records

COUNT = 14


def picture(i, size=(8, 12)):
    return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)


def annotated(i, image):
    return AnnotatedRecord(
        id=f"r{i}", image_id=f"i{image}", image_png=encode_png(picture(image)), task=f"task {i}",
        solution="solution " + "x" * i, agent=f"a{i}", kind="k", source={},
    )  # fmt: skip


def write_raw(folder):
    """A reader of annotated records. Images come in runs of three, and the first one once more at the end."""
    write_records(folder, "raw", [annotated(i, (i // 3) % 4) for i in range(COUNT)], 2)
    return RecordReader(folder, "raw")


class Encoder:
    def __init__(self):
        self.batches, self.texts = [], []

    def scene(self, images):
        self.batches.append(images.shape)
        glance = images.mean((1, 2)).astype(np.float32)
        return {"video": images[:, None, ::2, ::2].astype(ml_dtypes.bfloat16), "glance": glance}

    def text(self, texts):
        self.texts.append(len(texts))
        states = [np.array([[ord(c), len(t)] for c in t], np.float16) for t in texts]
        return {"text": states, "glyphs": [np.repeat(x, 2, axis=0)[:, ::-1] for x in states]}


def run(reader, folder, encoder=None, **changes):
    count(reader, folder, encoder, **changes)
    return RecordReader(folder, changes.get("name", "set"), EncodedRecord)


def count(reader, folder, encoder=None, **changes):
    """The counts of a call that may leave the data set unfinished."""
    encoder = encoder or Encoder()
    options = dict(name="set", encode_scene=encoder.scene, encode_text=encoder.text, batch=2) | changes
    return encode_records(reader, folder, **options)


def grouped(reader):
    """The records in the order of an encoded set: by image, as each first comes."""
    records = list(reader)
    images = list(dict.fromkeys(record.image_id for record in records))
    return sorted(records, key=lambda record: images.index(record.image_id))


def contents(folder, name="set"):
    return [record.to_bytes() for record in RecordReader(folder, name, EncodedRecord)]
