"""Records of another model are named before any array is compared."""

import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from world_distill.data.records.fit import check_encoders, check_fit, identity, text_encoder
from world_distill.data.records.reader import RecordError


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
