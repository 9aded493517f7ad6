"""The negative text beside encoded records: encoded once, kept, and replaced when it is another one or damaged."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from world_distill.data.records.negative import (
    NegativeText,
    keep_negative,
    negative_path,
    read_negative,
    write_negative,
)
from world_distill.data.records.reader import RecordError


class Encoder:
    """States that tell the text; counts its calls."""

    def __init__(self, dtype=ml_dtypes.bfloat16):
        self.texts, self.dtype = [], dtype

    def __call__(self, texts):
        self.texts += texts
        states = [np.array([[ord(c), len(text)] for c in text], self.dtype).reshape(-1, 2) for text in texts]
        return {"text": states, "glyphs": [x[::-1] for x in states]}


def keep(folder, text="blur", encoder=None, name="umt5"):
    return keep_negative(folder, "set", text, text_encoder=name, encode_text=encoder or Encoder())


def test_a_text_is_encoded_once_and_comes_back_as_it_was(tmp_path):
    encoder = Encoder()
    assert keep(tmp_path, encoder=encoder) and not keep(tmp_path, encoder=encoder) and encoder.texts == ["blur"]
    found = read_negative(tmp_path, "set")
    assert (found.text, found.text_encoder, found.states["text"].dtype) == ("blur", "umt5", ml_dtypes.bfloat16)
    for key, (states,) in Encoder()(["blur"]).items():
        np.testing.assert_array_equal(found.states[key], states)
    assert read_negative(tmp_path, "another") is None


@pytest.mark.parametrize("change", [{"text": "noise"}, {"name": "umt6"}], ids=["text", "encoder"])
def test_another_text_or_encoder_takes_its_place(tmp_path, change):
    keep(tmp_path)
    before = read_negative(tmp_path, "set").fingerprint
    assert keep(tmp_path, **change) and read_negative(tmp_path, "set").fingerprint != before
    assert keep(tmp_path) and read_negative(tmp_path, "set").fingerprint == before


def test_states_have_a_part_in_the_fingerprint():
    same = [NegativeText("a", "b", {"text": np.float32([[value]])}) for value in (1, 1, 2)]
    assert same[0].fingerprint == same[1].fingerprint != same[2].fingerprint


def test_the_empty_text_may_have_no_states(tmp_path):
    keep(tmp_path, text="", encoder=Encoder(np.float32))
    assert read_negative(tmp_path, "set").states["text"].shape == (0, 2)


def test_a_file_of_version_1_has_one_array_of_states(tmp_path):
    states = np.float32([[1, 2]])
    fields = {"text": "blur", "text_encoder": "umt5", "states": states}
    body = serialization.msgpack_serialize(fields)
    negative_path(tmp_path, "set").write_bytes(b"WDNEG\x01" + hashlib.sha256(body).digest() + body)
    found = read_negative(tmp_path, "set")
    assert found.text == "blur" and list(found.states) == ["text"]
    np.testing.assert_array_equal(found.states["text"], states)
    assert not keep(tmp_path)  # it is the same text by the same encoder


@pytest.mark.parametrize("place", [0, 5, 20, -1], ids=["start", "version", "hash", "body"])
def test_a_damaged_file_is_refused_and_encoded_again(tmp_path, place):
    keep(tmp_path)
    path = negative_path(tmp_path, "set")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RecordError, match=r"set\.negative is damaged.*world-distill encode"):
        read_negative(tmp_path, "set")
    assert keep(tmp_path) and read_negative(tmp_path, "set").text == "blur"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecordError, match="damaged"):
        read_negative(tmp_path, "set")


def test_encoders_that_return_something_else_are_refused(tmp_path):
    for states in ([], [np.zeros(3)], [np.zeros((2, 2), int)], [np.full((2, 2), np.nan)]):
        with pytest.raises(RecordError, match="negative text"):
            keep(tmp_path, encoder=lambda texts, states=states: {"text": states})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    keep(tmp_path)

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr("world_distill.data.records.shard_files.os.replace", refuse)
    with pytest.raises(RecordError, match="no space"):
        write_negative(tmp_path, "set", NegativeText("noise", "umt5", {"text": np.zeros((1, 2), np.float32)}))
    assert read_negative(tmp_path, "set").text == "blur" and len(list(tmp_path.iterdir())) == 1
