"""From a diffusers folder to a checkpoint: every number in its place, or an error that says what is wrong."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from world_distill import cli, convert, converted
from world_distill.config import UserError
from world_distill.models.params import assemble
from world_distill.tensor_files import TensorFileError

GOLDENS = pathlib.Path(__file__).parent / "models" / "wan" / "goldens"
TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
    "attention_head_dim": 16, "in_channels": 6, "out_channels": 6, "text_dim": 20, "freq_dim": 32, "ffn_dim": 48,
    "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None,
}  # fmt: skip
VAE = {
    "base_dim": 4, "decoder_base_dim": 6, "z_dim": 6, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True, True], "is_residual": True, "patch_size": 2,
    "latents_mean": [0.5] * 6, "latents_std": [2.0] * 6,
}  # fmt: skip


def tensors(name):
    with np.load(GOLDENS / name) as file:
        return {key[2:]: file[key].astype(np.float32) for key in file if key.startswith("w:")}


def make_source(folder, *, transformer=TRANSFORMER, vae=VAE, change=lambda weights: None):
    """A model as diffusers saves it: the transformer in two shards with an index, the autoencoder in one file."""
    for part, config in (("transformer", transformer), ("vae", vae)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    weights = tensors("transformer_3x4x6.npz")
    change(weights)
    names = sorted(weights)
    index = {}
    for i in range(2):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = {name: weights[name] for name in names[i::2]}
        safetensors.numpy.save_file(part, folder / "transformer" / file)
        index |= dict.fromkeys(part, file)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    safetensors.numpy.save_file(tensors("vae_2.2.npz"), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def expected(source):
    _, model = convert.published.describe(source)
    trees = {
        "transformer": assemble(model.entries["transformer"], tensors("transformer_3x4x6.npz")),
        "vae": assemble(model.entries["vae"], tensors("vae_2.2.npz")),
    }
    return converted.by_name(trees) | model.constants


def test_every_array_arrives_on_a_mesh(tmp_path):
    source = make_source(tmp_path / "source")
    summary = convert.convert(source, tmp_path / "dest")
    want = expected(source)
    assert summary["arrays"] == len(want) and summary["family"] == "wan"
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        axes = [("fsdp" if size % 8 == 0 else None) for size in x.shape[:1]]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    found = ocp.load(tmp_path / "dest", {name: place(x) for name, x in want.items()})
    for name, x in want.items():
        np.testing.assert_array_equal(np.asarray(found[name]), x, err_msg=name)
    shapes, metadata = converted.describe(tmp_path / "dest")
    assert shapes == {name: x.shape for name, x in want.items()}
    assert metadata["family"] == "wan" and metadata["model"]["width"] == 32
    np.testing.assert_array_equal(np.asarray(found["vae.mean"]), np.full(6, 0.5, np.float32))


def test_the_type_of_the_transformer_can_be_changed(tmp_path):
    source = make_source(tmp_path / "source")
    convert.convert(source, tmp_path / "dest", dtype="bfloat16")
    want = expected(source)
    found = ocp.load(tmp_path / "dest")
    for name, x in want.items():
        x = x.astype(ml_dtypes.bfloat16) if name.startswith("transformer") else x
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), x)


def test_an_interrupted_conversion_leaves_nothing_that_loads(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source")
    save, calls = ocp.partial.save, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(converted, "BATCH_BYTES", 2**17)
        patch.setattr(converted.ocp.partial, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
    convert.convert(source, tmp_path / "dest")
    assert set(ocp.load(tmp_path / "dest")) == set(expected(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dest", "source"]


def test_the_command_prints_what_it_made(tmp_path, capsys):
    source = make_source(tmp_path / "source")
    assert cli.main(["convert", str(source), str(tmp_path / "dest"), "--json", str(tmp_path / "out.json")]) == 0
    assert "family wan" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["sizes"]["width"] == 32
    assert cli.main(["convert", str(source), str(tmp_path / "dest")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_all_names_that_do_not_fit_are_listed(tmp_path):
    def change(weights):
        del weights["proj_out.bias"]
        weights["extra"] = np.zeros(3, np.float32)
        weights["patch_embedding.weight"] = weights["patch_embedding.weight"][:, :4]

    source = make_source(tmp_path / "source", change=change)
    with pytest.raises(UserError) as caught:
        convert.convert(source, tmp_path / "dest")
    for line in ("missing: proj_out.bias", "unexpected: extra", "shape: patch_embedding.weight is [32, 4, 1, 2, 2]"):
        assert f"transformer: {line}" in str(caught.value)
    assert not list(tmp_path.glob("dest*"))


@pytest.mark.parametrize(
    ("transformer", "vae", "text"),
    [
        ({"_class_name": "LTX2VideoTransformer3DModel"}, {}, "LTX2VideoTransformer3DModel; what can be converted"),
        ({"added_kv_proj_dim": 32}, {}, "added_kv_proj_dim = 32"),
        ({"in_channels": 12}, {}, "more channels than its output"),
        ({"patch_size": [2, 2, 2]}, {}, "patch_size"),
        ({}, {"z_dim": 4}, "6 latent channels, its vae 4"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, transformer, vae, text):
    source = make_source(tmp_path / "source", transformer=TRANSFORMER | transformer, vae=VAE | vae)
    with pytest.raises(UserError, match=text):
        convert.convert(source, tmp_path / "dest")


def test_files_that_cannot_be_read_are_named(tmp_path):
    source = make_source(tmp_path / "source")
    shard = source / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(TensorFileError, match=f"{shard.name} is no whole safetensors file"):
        convert.convert(source, tmp_path / "dest")
    shard.unlink()
    with pytest.raises(TensorFileError, match=f"lacks {shard.name}"):
        convert.convert(source, tmp_path / "dest")
    for path in (source / "transformer").glob("*safetensors*"):
        path.unlink()
    with pytest.raises(TensorFileError, match="no safetensors files"):
        convert.convert(source, tmp_path / "dest")
    (source / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TensorFileError, match="run the code"):
        convert.convert(source, tmp_path / "dest")
    (source / "transformer" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        convert.convert(source, tmp_path / "dest")
    with pytest.raises(UserError, match="diffusers' layout"):
        convert.convert(tmp_path / "nothing", tmp_path / "dest")
