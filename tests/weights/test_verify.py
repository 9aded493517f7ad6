"""`convert --verify`: right conversions pass beside diffusers, wrong ones do not."""

import builtins
import json

import numpy as np
import pytest
import safetensors.numpy

from tests.weights.test_convert import make_source, tensors
from world_distill import cli
from world_distill.storage import array_store
from world_distill.weights import convert, verify

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    pytest.importorskip("torch", reason="torch is in the extra `torch`")
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    return make_source(tmp_path_factory.mktemp("verify") / "source")


@pytest.fixture(scope="module")
def dest(source):
    convert.convert(source, source.parent / "dest")
    return source.parent / "dest"


def call(capsys, *words):
    code = cli.main(["convert", *map(str, words), "--verify"])
    return code, *capsys.readouterr()


def test_a_rounded_conversion_is_held_to_rounded_weights(source, tmp_path, capsys):
    code, out, _ = call(capsys, source, tmp_path / "dest", "--dtype", "bfloat16", "--json", tmp_path / "out.json")
    assert code == 0 and "rounded the weights of transformer" in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["arrays"] > 50 and figures["verify"]["rounded"] == ["transformer"]
    for key in ("transformer", "vae_encode", "vae_decode"):
        assert 0 < figures["verify"][key]["relative"] < 1e-4
        assert f"{key}: largest difference" in out


def test_a_checkpoint_that_is_there_is_verified_only(source, dest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "convert", None)
    code, out, _ = call(capsys, source, dest, "--json", tmp_path / "out.json")
    assert code == 0 and "rounded" not in out
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"verify"}
    code, _, err = call(capsys, source, dest, "--dtype", "bfloat16")
    assert code == 2 and "its transformer is float32, not bfloat16" in err


def test_a_wrong_array_is_found(source, dest, tmp_path, capsys):
    # The published file changes by one tensor of the last block and one of the autoencoder, after the conversion.
    def change(weights):
        weights["blocks.1.attn2.norm_k.weight"] = weights["blocks.1.attn2.norm_k.weight"][::-1].copy()

    other = make_source(tmp_path / "source", change=change)
    weights = tensors("vae_2.2.npz")
    weights["encoder.norm_out.gamma"] *= 1.01
    safetensors.numpy.save_file(weights, other / "vae" / "diffusion_pytorch_model.safetensors")
    code, out, err = call(capsys, other, dest)
    assert code == 2 and "transformer, vae_encode off by more than 0.0005" in err
    assert "vae_decode: largest difference" in out


def test_numbers_that_are_not_finite_fail():
    results = {"transformer": {"difference": np.nan, "relative": np.nan}, "rounded": [], "tolerance": 1.0}
    assert verify.failures(results) == ["transformer"]


def test_another_model_in_the_place_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "check_installed", lambda: None)
    source = make_source(tmp_path / "source")
    writer = array_store.Writer(tmp_path / "dest", {"family": "wan", "model": {"width": 5}})
    writer.add("x", np.zeros(3, np.float32))
    writer.finish()
    code, _, err = call(capsys, source, tmp_path / "dest")
    assert code == 2 and "holds another model than" in err
    (tmp_path / "empty").mkdir()
    code, _, err = call(capsys, source, tmp_path / "empty")
    assert code == 2 and "no checkpoint of `world-distill convert`" in err


def test_without_torch_nothing_is_converted(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("torch", "diffusers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    source = make_source(tmp_path / "source")
    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = call(capsys, source, tmp_path / "dest")
    assert code == 2 and "pip install -e '.[torch]'" in err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
