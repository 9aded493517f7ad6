"""From a diffusers folder to a checkpoint: every number in its place, or an error that says what is wrong."""

import json
import pathlib
import signal
import subprocess
import sys

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from world_distill import cli
from world_distill.errors import UserError
from world_distill.models.tensor_map import assemble
from world_distill.storage import array_store
from world_distill.storage.safetensors_folder import TensorFileError
from world_distill.weights import convert, published

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDENS = pathlib.Path(__file__).parents[1] / "models" / "wan" / "goldens"
TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
    "attention_head_dim": 16, "in_channels": 6, "out_channels": 6, "text_dim": 20, "freq_dim": 32, "ffn_dim": 48,
    "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None,
}  # fmt: skip
VAE = {
    "base_dim": 4, "decoder_base_dim": 6, "z_dim": 6, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": [],
    "temperal_downsample": [False, True, True], "is_residual": True, "patch_size": 2,
    "latents_mean": [0.5] * 6, "latents_std": [2.0] * 6, "in_channels": 12, "out_channels": 12,
    "scale_factor_temporal": 4, "scale_factor_spatial": 16,
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
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": index}))
    safetensors.numpy.save_file(tensors("vae_2.2.npz"), folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def expected(source):
    _, model = published.describe(source)
    trees = {
        "transformer": assemble(model.entries["transformer"], tensors("transformer_3x4x6.npz")),
        "vae": assemble(model.entries["vae"], tensors("vae_2.2.npz")),
    }
    return array_store.by_name(trees) | model.constants


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
    shapes, metadata = array_store.describe(tmp_path / "dest")
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
        patch.setattr(array_store, "BATCH_BYTES", 2**16)
        patch.setattr(array_store.ocp.partial, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, tmp_path / "dest")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


KILLED = """
import os, pathlib, signal, sys
from world_distill.storage import array_store
from world_distill.weights import convert, published
module, name, count = sys.argv[1:4]
target = {"partial": array_store.ocp.partial, "os": os}[module]
real, calls = getattr(target, name), []

def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(target, name, dying)
array_store.BATCH_BYTES = 2**16
convert.convert(pathlib.Path(sys.argv[4]), pathlib.Path(sys.argv[5]))
"""


@pytest.mark.parametrize("instant", [("partial", "save", 4), ("os", "rename", 25)], ids=["writing", "finalizing"])
def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path, instant):
    source = make_source(tmp_path / "source")
    words = [*map(str, instant), str(source), str(tmp_path / "dest")]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.glob("dest*")] == ["dest.partial_save"]
    with pytest.raises(array_store.ConvertedError):
        array_store.describe(tmp_path / "dest.partial_save")
    convert.convert(source, tmp_path / "dest")
    assert set(ocp.load(tmp_path / "dest")) == set(expected(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dest", "source"]


def test_a_lost_piece_of_a_checkpoint_is_an_error(tmp_path):
    source = make_source(tmp_path / "source")
    convert.convert(source, tmp_path / "dest")
    shape = array_store.describe(tmp_path / "dest")[0]["transformer.blocks.mlp.up.kernel"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"transformer.blocks.mlp.up.kernel": jax.ShapeDtypeStruct(shape, np.float32, sharding=place)}
    array_store.load(tmp_path / "dest", wanted)
    chunks = [p for p in (tmp_path / "dest").glob("*/transformer.blocks.mlp.up.kernel/*") if p.name[0] != "."]
    chunks[0].unlink()
    with pytest.raises(array_store.ConvertedError, match="damaged"):
        array_store.load(tmp_path / "dest", wanted)


def test_large_arrays_are_kept_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(array_store, "CHUNK_BYTES", 2**12)
    source = make_source(tmp_path / "source")
    convert.convert(source, tmp_path / "dest")
    found = ocp.load(tmp_path / "dest")
    for name, x in expected(source).items():
        np.testing.assert_array_equal(np.asarray(found[name]), x, err_msg=name)
    assert len(list((tmp_path / "dest").glob("*/transformer.blocks.mlp.up.kernel/*"))) > 2


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
        ({"_class_name": "HunyuanVideo15Transformer3DModel"}, {}, "HunyuanVideo15.*; what can be converted"),
        ({"added_kv_proj_dim": 32}, {}, "added_kv_proj_dim = 32"),
        ({"in_channels": 12}, {}, "more channels than its output"),
        ({"patch_size": [2, 2, 2]}, {}, "patch_size"),
        ({}, {"z_dim": 4}, "6 latent channels, its vae 4"),
        ({"num_layers": "two"}, {}, "source: "),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, transformer, vae, text):
    source = make_source(tmp_path / "source", transformer=TRANSFORMER | transformer, vae=VAE | vae)
    with pytest.raises(UserError, match=text):
        convert.convert(source, tmp_path / "dest")
    assert not list(tmp_path.glob("dest*"))


def test_a_model_of_two_transformers_is_refused(tmp_path):
    source = make_source(tmp_path / "source")
    index = source / "model_index.json"
    index.write_text(json.dumps({"transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    with pytest.raises(UserError, match="two transformers"):
        convert.convert(source, tmp_path / "dest")
    index.write_text(json.dumps({"transformer_2": [None, None], "expand_timesteps": True}))
    convert.convert(source, tmp_path / "dest")


def test_a_config_that_lacks_a_key_or_is_none_is_named(tmp_path):
    config = {key: value for key, value in TRANSFORMER.items() if key != "ffn_dim"}
    source = make_source(tmp_path / "source", transformer=config)
    with pytest.raises(UserError, match="lacks 'ffn_dim'"):
        convert.convert(source, tmp_path / "dest")
    (source / "vae" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="vae/config.json is no config: its JSON is a list"):
        convert.convert(source, tmp_path / "dest")


def write_header(path, tensors):
    """A safetensors file of zeros: name -> (type as the format spells it, shape), a byte a number."""
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        size = int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def test_tensors_of_a_type_that_is_not_read_are_named(tmp_path):
    source = make_source(tmp_path / "source")
    shard = source / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    shapes = {name: x.shape for name, x in safetensors.numpy.load_file(shard).items()}
    kinds = {name: ("I8" if i else "F8_E8M0", list(shapes[name])) for i, name in enumerate(shapes)}
    write_header(shard, kinds)
    with pytest.raises(UserError) as caught:
        convert.convert(source, tmp_path / "dest", dtype="bfloat16")
    for name, (kind, _) in kinds.items():
        assert f"transformer: type: {name} is {kind}; F32, F16, BF16, F8_E4M3, F8_E5M2 can be read" in str(caught.value)
    assert not list(tmp_path.glob("dest*"))


def test_blocks_of_several_types_need_one_that_is_asked_for(tmp_path):
    def change(weights):
        weights["blocks.1.attn1.to_q.bias"] = weights["blocks.1.attn1.to_q.bias"].astype(ml_dtypes.bfloat16)

    source = make_source(tmp_path / "source", change=change)
    with pytest.raises(UserError, match=r"blocks.\{n\}.attn1.to_q.bias is BF16 and F32, by block; give --dtype"):
        convert.convert(source, tmp_path / "dest")
    convert.convert(source, tmp_path / "dest", dtype="float32")
    assert {str(kind) for kind in array_store.types(tmp_path / "dest").values()} == {"float32"}


def hub(monkeypatch, answer):
    """Sets what the hub says; the list fills with what it was asked for."""
    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs["allow_patterns"]))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_name_on_the_hub_is_downloaded_without_its_text_encoder(tmp_path, monkeypatch):
    source = make_source(tmp_path / "snapshots" / "0a1b2c")
    asked = hub(monkeypatch, source)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "dest"]) == 0
    ((name, patterns),) = asked
    assert name == "Wan-AI/Wan2.2-TI2V-5B-Diffusers" and "model_index.json" in patterns
    parts = {"transformer", "connectors", "vae"}  # of all families: which one it is stands in a file
    assert {pattern.split("/")[0] for pattern in patterns} == {"model_index.json", "README.md", *parts}
    assert array_store.describe("dest")[1]["source"] == name


def test_folders_are_never_looked_up_on_the_hub(tmp_path, monkeypatch, capsys):
    asked = hub(monkeypatch, AssertionError("asked the hub"))
    make_source(tmp_path / "models" / "wan")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "models/wan", "dest"]) == 0
    for source in (tmp_path / "models" / "none", "./models", "a/b/c", "none"):
        assert cli.main(["convert", str(source), "other"]) == 2
        assert "diffusers' layout" in capsys.readouterr().err
    assert not asked and not (tmp_path / "other").exists()


def test_a_hub_that_cannot_be_reached_is_explained(tmp_path, monkeypatch, capsys):
    asked = hub(monkeypatch, ConnectionError("no route"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "Wan-AI/Wan2.2", "weights/wan"]) == 2
    error = capsys.readouterr().err
    assert "no folder here" in error and "(no route)" in error and "hf download Wan-AI/Wan2.2" in error
    assert len(asked) == 1 and not list(tmp_path.iterdir())
    (tmp_path / "weights").mkdir()
    assert cli.main(["convert", "Wan-AI/Wan2.2", "weights"]) == 2
    assert len(asked) == 1, "a place that is taken is found out before the download"


def test_files_that_cannot_be_read_are_named(tmp_path):
    source = make_source(tmp_path / "source")
    shard = source / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(TensorFileError, match=f"{shard.name} is no whole safetensors file"):
        convert.convert(source, tmp_path / "dest")
    index = source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    names = index.read_text()
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(TensorFileError, match="is no index of safetensors"):
            convert.convert(source, tmp_path / "dest")
    index.write_text(names)
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
    assert not list(tmp_path.glob("dest*"))
