"""Whether a set of encoded records is of the model that is to read it.

`encode` writes into a set's index what the records were encoded for: family, text encoder, size. They are compared
before any array is: an array of another shape would be an error of JAX about broadcasting, steps later.
"""

import pathlib

from world_distill.data.records.reader import RecordReader
from world_distill.data.records.record_format import SCENE, RecordError
from world_distill.interfaces import ModelFamily

_NAMES = {"family": "model family", "text_encoder": "text encoder", "image_size": "image size"}


def identity(family: ModelFamily) -> dict[str, str]:
    """What decides the arrays of records that the family's encoders make, as the index of a set says it."""
    encoders = family.encoders
    found = {
        "family": family.name,
        "text_encoder": pathlib.Path(encoders.name).name,
        # height x width
        "image_size": "x".join(map(str, encoders.image_size)) if encoders.image_size else "as annotated",
    }
    for key, array in encoders.scenes.items():
        # The name and the value that records of version 1 have: h w c of the one latent frame.
        legacy = key == SCENE and array.shape[0] == 1
        found["scene" if legacy else f"scene.{key}"] = "x".join(map(str, array.shape[1:] if legacy else array.shape))
    return found


def check_fit(reader: RecordReader, family: ModelFamily) -> None:
    """Refuses encoded records of another model. What their index does not say is not compared, nor is a text encoder
    that the config does not name: only `encode` needs one.

    Raises:
      RecordError: they differ; the message names in what, and the call that encodes them for this model.
    """
    want, have = identity(family), reader.metadata
    if not want["text_encoder"]:
        want.pop("text_encoder")
    for key, value in want.items():
        if have.get(key, value) != value:
            folder, name = reader.index_path.parent, reader.index_path.stem
            what = _NAMES.get(key, f"arrays {key}")
            raise RecordError(
                f"{reader.index_path} was encoded for {what} {have[key]!r}, and this config has {value!r}: take the"
                " config that the records were encoded with, or encode them for this one: world-distill encode"
                f" --config CONFIG --records {folder} --name {name}"
            )
