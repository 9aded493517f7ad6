"""Records of another model are named before any array is compared."""

import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from world_distill.data.records.fit import check_fit, identity
from world_distill.data.records.reader import RecordError


def family(name="wan", encoder="models/umt5", size=(64, 96), frames=1):
    scenes = {"video": jax.ShapeDtypeStruct((frames, 4, 6, 6), jnp.float32)}
    return types.SimpleNamespace(
        name=name, encoders=types.SimpleNamespace(name=encoder, image_size=size, scenes=scenes)
    )


def reader(**metadata):
    return types.SimpleNamespace(metadata=metadata, index_path=pathlib.Path("data/train.json"))


def test_what_is_written_into_a_set_fits_its_model():
    assert identity(family()) == {"family": "wan", "text_encoder": "umt5", "image_size": "64x96", "scene": "4x6x6"}
    check_fit(reader(**identity(family()), weights="other"), family())
    check_fit(reader(), family())  # of an earlier version, which said nothing
    check_fit(reader(**identity(family())), family(encoder=""))  # training needs no text encoder


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
        check_fit(reader(**have), other)
    assert what in str(caught.value)
    assert str(caught.value).endswith("world-distill encode --config CONFIG --records data --name train")
