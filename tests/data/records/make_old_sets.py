"""Made old_sets.tar.xz with the program of November 2026: annotated records of version 1, encoded ones of version 2.

python tests/data/records/make_old_sets.py FOLDER      # in a checkout of that time
tar cJf old_sets.tar.xz -C FOLDER .
"""

import pathlib
import sys

import numpy as np

from world_distill.data.images.png import encode_png
from world_distill.data.records.encode import encode_records
from world_distill.data.records.reader import AnnotatedRecord, RecordReader, write_records


def annotated(i, image):
    picture = encode_png(np.full((8, 12, 3), 10 * image, np.uint8))
    return AnnotatedRecord(f"r{i}", f"i{image}", picture, f"task {i}", "solution " + "x" * i, f"a{i}", "k", {})


def scene(images):
    return {"video": images[:, None, ::2, ::2].astype(np.float32)}


def text(texts):
    return {"text": [np.array([[ord(c), len(t)] for c in t], np.float16) for t in texts]}


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    write_records(out, "train_annotated", [annotated(i, i // 3) for i in range(9)], 2)  # images stand together
    write_records(out, "mixed_annotated", [annotated(i, i % 3) for i in range(9)], 2)  # they do not
    for name in ("train", "mixed"):
        reader = RecordReader(out, f"{name}_annotated")
        options = dict(encode_scene=scene, encode_text=text, shards=3, batch=2, metadata={"family": "f"})
        encode_records(reader, out, name=name, **options)
        encode_records(reader, out, name=f"{name}_half", only=1, **options)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
