"""Records of another model are named before any array is compared."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill.data.records.fit import (
    check_clips,
    check_encoders,
    check_fit,
    clip_identity,
    clip_latents,
    clip_shape,
    identity,
    text_encoder,
)
from world_distill.data.records.reader import EncodedRecord, RecordError, RecordReader, write_records
from world_distill.structs import LatentSpec


def family(name="wan", encoder="models/umt5", size=(64, 96), frames=1, **weights):
    scenes = {"video": jax.ShapeDtypeStruct((frames, 4, 6, 6), jnp.float32)}
    return types.SimpleNamespace(
        name=name, encoders=types.SimpleNamespace(name=encoder, image_size=size, scenes=scenes, **weights)
    )


def reader(**metadata):
    return types.SimpleNamespace(metadata=metadata, index_path=pathlib.Path("data/train.json"))


def test_what_is_written_into_a_set_fits_its_model():
    assert identity(family()) == {"family": "wan", "text_encoder": "umt5", "image_size": "64x96", "scene": "4x6x6"}
    check_fit(reader(**identity(family()), weights="other"), family(), {})
    check_fit(reader(), family(), {})  # of an earlier version, which said nothing
    check_fit(reader(**identity(family())), family(encoder=""), {})  # training needs no text encoder


def test_records_belong_to_the_text_weights_that_they_were_encoded_with():
    dev, distilled = family(text_weights="aa"), family(text_weights="bb")
    assert identity(dev)["text_weights"] == "aa" and "text_weights" not in identity(family(text_weights=""))
    assert text_encoder(identity(dev)) == "umt5 aa" and text_encoder(identity(family())) == "umt5"
    records = reader(**identity(dev))
    check_fit(records, dev, {"text_weights": "aa"})
    check_fit(records, family(), {})  # neither encoders nor base say anything
    for of_run, base in ((distilled, {}), (family(encoder=""), {"text_weights": "bb"})):
        with pytest.raises(RecordError, match="text projection 'aa', and this config has 'bb'.*rows of text are not"):
            check_fit(records, of_run, base)
        check_fit(reader(**identity(family())), of_run, base)  # encoded by an earlier version


def test_encoders_belong_to_the_base():
    check_encoders(family(), {"text_weights": "aa"})
    check_encoders(family(text_weights="aa"), {})
    check_encoders(family(text_weights="aa"), {"text_weights": "aa"})
    with pytest.raises(RecordError, match="digest aa, and bb came with the base"):
        check_encoders(family(text_weights="aa"), {"text_weights": "bb"})


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (family(name="tiny"), "was encoded for model family 'wan', and this config has 'tiny'"),
        (family(encoder="t5"), "text encoder 'umt5', and this config has 't5'"),
        (family(size=(64, 64)), "image size '64x96', and this config has '64x64'"),
        (family(frames=2), "arrays scene.video"),
    ],
)
def test_records_of_another_model_are_refused_by_name_with_the_call_that_mends_it(other, what):
    have = identity(family()) | {"scene.video": "1x4x6x6"}
    have.pop("scene")
    with pytest.raises(RecordError) as caught:
        check_fit(reader(**have), other, {})
    assert what in str(caught.value)
    assert str(caught.value).endswith("world-distill encode --config CONFIG --records data --name train")


def with_sound(counts, frames=3, fps=4.0):
    """A family of a picture and a sound, whose codec knows the picture alone."""
    latents = {
        "video": LatentSpec((frames, 2, 2, 4), moves=np.arange(frames) > 0),
        "audio": LatentSpec((5, 4), counts=np.full(5, counts)),
    }
    codec = types.SimpleNamespace(
        parts=(),
        decode=lambda base, z: jnp.zeros((1, 1 + 4 * (z["video"].shape[1] - 1), 4, 4, 3), jnp.uint8),
        encode=lambda base, clips: {"video": jnp.zeros((len(clips), 1 + (clips.shape[1] - 1) // 4, 2, 2, 4))},
    )
    return types.SimpleNamespace(latents=latents, codec=codec, fps=fps)


@pytest.mark.parametrize("sound", [False, True], ids=["silent", "sound"])
def test_clips_are_those_of_the_models_latents(tmp_path, sound):
    family = with_sound(counts=False)
    assert clip_shape(family) == (9, 4, 4) and clip_latents(family)["video"].shape == (3, 2, 2, 4)
    clip = {"video": np.ones((3, 2, 2, 4), np.float32)} | ({"audio": np.ones((5, 4), np.float32)} if sound else {})
    states = {"text": np.ones((2, 5), np.float32)}
    scene, none = {"video": clip["video"][:1]}, {"text": states["text"][:0]}
    record = EncodedRecord("r", "i", "t", "", "", "", scene, states, none, b"", clip)
    metadata = clip_identity(family)
    assert metadata == {"clip": "9 frames 4x4 at 4 a second"}
    write_records(tmp_path, "set", [record], metadata=metadata)
    reader = RecordReader(tmp_path, "set")
    check_clips(reader, family)
    # A sound that counts cannot be made up.
    if sound:
        check_clips(reader, with_sound(counts=True))
    else:
        with pytest.raises(RecordError, match="has no audio, which counts in this model's losses"):
            check_clips(reader, with_sound(counts=True))
    others = (with_sound(False, frames=2), "has latents"), (with_sound(False, fps=8.0), "at 4 a second, and")
    for other, reason in others:
        with pytest.raises(RecordError, match=reason):
            check_clips(reader, other)
