"""Weight files carry what they were given, or are refused."""

import os
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from world_distill.storage.weight_files import WeightFileError, load_weights, save_weights

TREE = {
    "blocks": {"q": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}, "n": np.array(3, np.int32)},
    "half": np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16),
    "flags": np.array([True, False]),
}


def test_weights_round_trip(tmp_path):
    path = tmp_path / "sub/w.safetensors"
    save_weights(path, TREE, {"licence": "Apache-2.0", "ü": ""})
    tree, metadata = load_weights(path)
    assert metadata == {"licence": "Apache-2.0", "ü": ""}
    jax.tree.map(np.testing.assert_array_equal, tree, TREE)
    assert set(safetensors.numpy.load_file(path)) == {"blocks.q.kernel", "blocks.n", "half", "flags"}
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_weights_of_jax_and_with_other_strides(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    split = jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(mesh, PartitionSpec("x")))
    turned = np.arange(12.0).reshape(3, 4).T
    save_weights(tmp_path / "w", {"split": split, "turned": turned, "half": turned[::2]}, {})
    tree, _ = load_weights(tmp_path / "w")
    np.testing.assert_array_equal(tree["split"], split)
    np.testing.assert_array_equal(tree["turned"], turned)
    np.testing.assert_array_equal(tree["half"], turned[::2])


@pytest.mark.parametrize(
    "tree, message",
    [
        ({}, "the dict at 'the root' is empty"),
        ({"a": {"b": {}}}, "the dict at 'a.b' is empty"),
        ({"a.b": np.zeros(1)}, "key 'a.b' under '' is not a text without dots"),
        ({"a": {3: np.zeros(1)}}, "key 3 under 'a'"),
        ({"a": {"b": [1.0]}}, "a.b is a list, not an array"),
        ({"a": {"b": np.zeros(2, ml_dtypes.float8_e4m3fn)}}, "a.b has dtype float8_e4m3fn"),
        ({"a": jax.random.key(0)}, "a has dtype key<fry>"),
    ],
)
def test_weights_that_would_not_come_back(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        save_weights(tmp_path / "w", tree, {})
    assert list(tmp_path.iterdir()) == []


def test_failed_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w"
    save_weights(path, TREE, {"version": "1"})

    def full(*args):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(WeightFileError, match=f"{path}: the weights could not be written .*No space left"):
                save_weights(path, TREE, {"version": "2"})
    assert load_weights(path)[1] == {"version": "1"} and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(WeightFileError, match="w/x: the weights could not be written"):
        save_weights(path / "x", TREE, {})


def test_every_truncation_of_a_weight_file_is_refused(tmp_path):
    path = tmp_path / "w"
    save_weights(path, TREE, {})
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(WeightFileError, match=f"{path}: not a readable weight file"):
            load_weights(path)
    with pytest.raises(WeightFileError, match="not a readable"):
        load_weights(tmp_path / "none")
    safetensors.numpy.save_file({"a": np.zeros(1), "a.b": np.zeros(1)}, path)
    with pytest.raises(WeightFileError, match="not a readable"):
        load_weights(pathlib.Path(path))
