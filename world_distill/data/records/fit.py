"""Whether a set of encoded records is of the model that is to read it.

`encode` writes into a set's index what the records were encoded for: family, text encoder, size. They are compared
before any array is: an array of another shape would be an error of JAX about broadcasting, steps later.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from world_distill.data.records.reader import RecordReader
from world_distill.data.records.record_format import SCENE, RecordError
from world_distill.interfaces import ModelFamily

_NAMES = {
    "family": "model family", "text_encoder": "text encoder", "image_size": "image size",
    "text_weights": "text projection", "clip": "clips of",
}  # fmt: skip
# Why such records cannot be used, where that is not plain.
_REASONS = {
    "text_weights": " (digests of its weights). A distilled model's rows of text are not those of the model that it was"
    " made from"
}
TEXT_WEIGHTS = "text_weights"  # in a set's index, and in the metadata of a converted checkpoint


def identity(family: ModelFamily) -> dict[str, str]:
    """What decides the arrays of records that the family's encoders make, as the index of a set says it."""
    encoders = family.encoders
    found = {
        "family": family.name,
        "text_encoder": pathlib.Path(encoders.name).name,
        # height x width
        "image_size": "x".join(map(str, encoders.image_size)) if encoders.image_size else "as annotated",
    }
    if weights := getattr(encoders, "text_weights", ""):
        found[TEXT_WEIGHTS] = weights
    for key, array in encoders.scenes.items():
        # The name and the value that records of version 1 have: h w c of the one latent frame.
        legacy = key == SCENE and array.shape[0] == 1
        found["scene" if legacy else f"scene.{key}"] = "x".join(map(str, array.shape[1:] if legacy else array.shape))
    return found


def clip_shape(family: ModelFamily) -> tuple[int, int, int]:
    """(frames, height, width) of the clips that a family decodes."""
    latents = {name: jax.ShapeDtypeStruct((1, *spec.shape), jnp.float32) for name, spec in family.latents.items()}
    base = jax.eval_shape(family.init_base, jax.random.key(0)) if family.codec.parts else {}
    _, frames, height, width, _ = jax.eval_shape(family.codec.decode, base, latents).shape
    return frames, height, width


def clip_latents(family: ModelFamily) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of what the family's codec makes of one clip, by stream."""
    base = jax.eval_shape(family.init_base, jax.random.key(0)) if family.codec.parts else {}
    clips = jax.ShapeDtypeStruct((1, *clip_shape(family), 3), jnp.uint8)
    return {
        name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        for name, x in jax.eval_shape(family.codec.encode, base, clips).items()
    }


def clip_identity(family: ModelFamily) -> dict[str, str]:
    """What decides the clips of records, beside the codec, as the index of a set with clips says it."""
    frames, height, width = clip_shape(family)
    return {"clip": f"{frames} frames {height}x{width} at {family.fps:g} a second"}


def check_clips(reader: RecordReader, family: ModelFamily) -> None:
    """Refuses a set whose clips are not those of the family's latents; its first record is read.

    A stream that clips lack, such as the sound of silent videos, must not count in losses.

    Raises:
      RecordError: they differ, or the set has no clips.
    """
    want, have = clip_identity(family)["clip"], reader.metadata.get("clip", "")
    clip = RecordReader(reader.index_path.parent, reader.index_path.stem, clips=True)[0].clip
    shapes, wanted = ({n: tuple(x.shape) for n, x in tree.items()} for tree in (clip, family.latents))
    lacking = [name for name in wanted.keys() - shapes.keys() if family.latents[name].counts.any()]
    other = [name for name in shapes if shapes[name] != wanted.get(name)]
    if have == want and not lacking and not other:
        return
    reason = f"latents {shapes}, and this model has {wanted}"
    if lacking and not other:
        reason = f"no {', '.join(lacking)}, which counts in this model's losses"
    elif have != want and not other:
        reason = f"clips of {have}, and this model makes {want}"
    raise RecordError(f"{reader.index_path} has {reason}: encode the videos for this config, or take the other one")


def text_encoder(identity: Mapping[str, str]) -> str:
    """What decides text states, as one name: of a family's `identity`, or of the index of a set."""
    return " ".join(filter(None, (identity.get("text_encoder", ""), identity.get(TEXT_WEIGHTS, ""))))


def check_encoders(family: ModelFamily, base: Mapping[str, Any]) -> None:
    """Refuses text encoders that do not belong to the base.

    Args:
      family: with its text encoder.
      base: metadata of the converted checkpoint (`base_model.origin`).

    Raises:
      RecordError: the text projection is another one than the base came with.
    """
    have, want = getattr(family.encoders, "text_weights", ""), base.get(TEXT_WEIGHTS, "")
    if have and want and have != want:
        raise RecordError(
            f"the text projection that config.model names is not that of config.base: its weights have the digest"
            f" {have}, and {want} came with the base. Let config.model.text_encoder or text_projection name the folder"
            " or file that the base was converted from"
        )


def check_fit(reader: RecordReader, family: ModelFamily, base: Mapping[str, Any]) -> None:
    """Refuses encoded records of another model. What their index does not say is not compared, nor is a text encoder
    that the config does not name: only `encode` needs one.

    Args:
      reader: encoded records.
      family: the model that is to read them.
      base: metadata of its converted checkpoint (`base_model.origin`); {} of other weights.

    Raises:
      RecordError: they differ; the message names in what, and the call that encodes them for this model.
    """
    want, have = identity(family), reader.metadata
    if weights := base.get(TEXT_WEIGHTS):
        want[TEXT_WEIGHTS] = weights
    if not want["text_encoder"]:
        want.pop("text_encoder")
    for key, value in want.items():
        if have.get(key, value) != value:
            folder, name = reader.index_path.parent, reader.index_path.stem
            what = _NAMES.get(key, f"arrays {key}")
            raise RecordError(
                f"{reader.index_path} was encoded for {what} {have[key]!r}, and this config has {value!r}"
                f"{_REASONS.get(key, '')}: take the config that the records were encoded with, or encode them for this"
                f" one: world-distill encode --config CONFIG --records {folder} --name {name}"
            )
