"""`convert` from every layout that people have: the same checkpoint from each, or an error that says what to take."""

import json
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from tests.weights.test_lora_forms import save
from world_distill import cli
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.models.wan.family import build
from world_distill.models.wan.modeling import WanConfig
from world_distill.models.wan.original import LATENTS
from world_distill.models.wan.published import WanPublished, published_configs
from world_distill.models.wan.vae import VaeConfig
from world_distill.storage import array_store
from world_distill.storage.safetensors_folder import TensorFileError, TensorFiles
from world_distill.weights import base_model, convert, sources

pytestmark = pytest.mark.once
NETWORK = WanConfig(channels=48, width=128, depth=2, heads=1, mlp=24, text_width=12, time_width=16)
CODEC = VaeConfig(channels=48, encoder_width=2, decoder_width=3, blocks=1)
LAYOUT = WanPublished(NETWORK, CODEC)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MEAN, STD = (np.array([float(x) for x in text.split()], np.float32) for text in LATENTS[48])


@pytest.fixture(scope="module")
def weights():
    """Part -> tensors under diffusers' names and under the original ones, of the same arrays."""
    rng, found = np.random.default_rng(0), {}
    for naming in ("diffusers", "original"):
        for part, entries in LAYOUT.entries(naming).items():
            for entry in entries:
                arrays = found.setdefault((part, entry.path), [rng.normal(size=entry.shape) for _ in entry.names])
                tensors = dict(zip(entry.names, (x.astype(np.float32) for x in arrays), strict=True))
                found.setdefault((naming, part), {}).update(tensors)
    return found


def prefixed(tensors, prefix):
    return {prefix + name: x for name, x in tensors.items()}


def make_diffusers(folder, weights, index=None):
    for part, config in published_configs(NETWORK, CODEC, MEAN, STD).items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        path = folder / part / "diffusion_pytorch_model.safetensors"
        safetensors.numpy.save_file(weights["diffusers", part], path)
    if index is not None:
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_original(folder, weights, **settings):
    """The authors' repository: shards with an index, a config.json, and an autoencoder in a pickle."""
    folder.mkdir()
    names, where = sorted(weights["original", "transformer"]), {}
    for i in range(2):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = {name: weights["original", "transformer"][name] for name in names[i::2]}
        safetensors.numpy.save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = {"_class_name": "WanModel", "model_type": "ti2v", "dim": 128, "num_heads": 1, "num_layers": 2, "eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "Wan2.2_VAE.pth").write_bytes(b"PK\x03\x04")
    return folder


@pytest.fixture
def vae(tmp_path, weights):
    return save(tmp_path / "wan2.2_vae.safetensors", weights["original", "vae"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("sources")
    convert.convert(make_diffusers(folder / "source", weights), folder / "dest")
    return dict(ocp.load(folder / "dest")), array_store.describe(folder / "dest")[1]


def assert_same(dest, expected, atol=0.0):
    found = ocp.load(dest)
    assert found.keys() == expected[0].keys()
    for name, x in expected[0].items():
        np.testing.assert_allclose(np.float32(found[name]), np.float32(x), atol=atol, err_msg=name)
    assert array_store.describe(dest)[1]["model"] == expected[1]["model"]


@pytest.mark.parametrize("layout", ["original", "comfyui", "all in one", "diffusers' names"])
def test_every_layout_gives_the_same_checkpoint(tmp_path, weights, vae, expected, layout):
    transformer = weights["original", "transformer"]
    if layout == "original":
        source = make_original(tmp_path / "source", weights)
    elif layout == "all in one":
        text = {"text_encoders.umt5xxl.transformer.shared.weight": np.ones((2, 2), np.float32)}
        tensors = prefixed(transformer, "model.diffusion_model.") | prefixed(weights["original", "vae"], "vae.") | text
        source, vae = save(tmp_path / "x.safetensors", tensors), None
    elif layout == "diffusers' names":
        source = save(tmp_path / "x.safetensors", weights["diffusers", "transformer"])
    else:
        prefix = "model.diffusion_model." if layout == "comfyui" else ""
        source = save(tmp_path / "x.safetensors", prefixed(transformer, prefix))
    summary = convert.convert(source, tmp_path / "dest", vae=vae)
    assert_same(tmp_path / "dest", expected)
    assert summary["layout"] == ("original" if layout == "original" else "comfyui")


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "by row", None])
def test_floats_of_8_bits_are_stored_times_their_scale(tmp_path, weights, vae, expected, scale):
    tensors, wanted = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, {}
    for name, x in weights["original", "transformer"].items():
        if name.endswith("self_attn.q.weight"):
            size = np.abs(x).max(axis=1 if scale == "by row" else None) / 448 if scale else np.float32(1)
            column = np.asarray(size).reshape(-1, 1)
            tensors[name] = (x / column).astype(ml_dtypes.float8_e4m3fn)
            wanted[name] = tensors[name].astype(np.float32) * column
            if scale:
                end = "weight_scale" if scale == "by row" else scale
                tensors[name.replace("weight", end)] = np.float32(size).reshape(-1) if size.ndim else np.float32(size)
                tensors[name.replace("weight", "scale_input")] = np.float32(1)
        else:
            tensors[name] = x
    source = save(
        tmp_path / "x.safetensors", {k: np.asarray(x) for k, x in prefixed(tensors, "model.diffusion_model.").items()}
    )
    with pytest.raises(UserError, match=r"2 tensors are 8-bit floats.*give --dtype bfloat16"):
        convert.convert(source, tmp_path / "dest", vae=vae)
    convert.convert(source, tmp_path / "dest", vae=vae, dtype="float32")
    found = np.asarray(ocp.load(tmp_path / "dest")["transformer.blocks.self_attention.q.kernel"])
    want = np.stack([wanted[f"blocks.{n}.self_attn.q.weight"].T for n in range(2)])
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_shards_of_a_variant_are_found_by_their_index(tmp_path, weights):
    transformer = weights["diffusers", "transformer"]
    names = sorted(transformer)
    for i in range(2):
        part = {name: transformer[name] for name in names[i::2]}
        safetensors.numpy.save_file(part, tmp_path / f"diffusion_pytorch_model.bf16-0000{i + 1}-of-00002.safetensors")
    where = {name: f"diffusion_pytorch_model.bf16-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.bf16.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert sorted(TensorFiles(tmp_path).shapes) == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a pointer of Git LFS; get the file"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title>", "it is a page; the download needs to be logged in"),
        (b'{"error": "Unauthorized"}', "a server's error message"),
    ],
)
def test_what_was_saved_in_the_place_of_a_file_is_named(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(TensorFileError, match=f"x.safetensors is no whole safetensors file: .*{message}"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "dest")


def refused(tmp_path, weights, kind):
    """(source, vae) of a kind, in the folder."""
    transformer = weights["original", "transformer"]
    vae = save(tmp_path / "vae.safetensors", weights["original", "vae"])
    path = tmp_path / "x.safetensors"
    if kind == "no vae":
        return save(path, transformer), None
    if kind == "gguf":
        (tmp_path / "x.gguf").write_bytes(b"GGUF....")
        return tmp_path / "x.gguf", vae
    if kind == "renamed gguf":
        path.write_bytes(b"GGUF....")
        return path, vae
    if kind == "folder of gguf":
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "x-Q4_K_M.gguf").write_bytes(b"GGUF")
        return tmp_path / "models", vae
    if kind == "pth":
        (tmp_path / "Wan2.2_VAE.pth").write_bytes(b"PK\x03\x04")
        return save(path, transformer), tmp_path / "Wan2.2_VAE.pth"
    if kind == "vae alone":
        return vae, None
    if kind == "lora as vae":
        return save(path, transformer), save(
            tmp_path / "l.safetensors", {"a.lora_A.weight": np.ones((2, 2), np.float32)}
        )
    if kind == "t2v":
        return make_original(tmp_path / "s", weights, model_type="t2v"), vae
    if kind == "other settings":
        return make_original(tmp_path / "s", weights, dim=256), vae
    if kind == "clip":
        return save(path, transformer | {"img_emb.proj.0.bias": np.ones(2, np.float32)}), vae
    if kind == "channels":
        shape = (128, 100, 1, 2, 2)
        return save(path, transformer | {"patch_embedding.weight": np.zeros(shape, np.float32)}), vae
    if kind == "nvfp4":
        packed = {"blocks.0.ffn.0.weight_scale_2": np.ones(1, np.float32)}
        return save(path, transformer | packed), vae
    if kind == "nan":
        broken = transformer["head.head.bias"].copy()
        broken[3] = np.inf
        return save(path, transformer | {"head.head.bias": broken}), vae
    if kind == "diffusers t2v":
        return make_diffusers(tmp_path / "s", weights, index={"_class_name": "WanPipeline"}), None
    assert kind == "two vaes"
    return make_diffusers(tmp_path / "s", weights), vae


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no vae", "holds the transformer alone: give its autoencoder with --vae FILE"),
        ("gguf", "is a GGUF file.*take Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ("renamed gguf", "is a GGUF file"),
        ("folder of gguf", r"holds GGUF files \(x-Q4_K_M.gguf\), which are not read; take Wan-AI"),
        ("pth", "Wan2.2_VAE.pth is a pickle.*take Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ("vae alone", "is no model that can be converted: it is an autoencoder of Wan"),
        ("lora as vae", "is no autoencoder of Wan: it is a LoRA file"),
        ("t2v", "of the type t2v: only models that take a clean first frame"),
        ("other settings", "config.json does not fit its tensors: dim = 256, not 128"),
        ("clip", r"sees the image through CLIP \(img_emb.proj.0.bias\)"),
        ("channels", "its input has 100 channels and its output 48"),
        ("nvfp4", "quantised to 4 bits"),
        ("nan", "transformer: head.head.bias holds values that are not finite"),
        ("diffusers t2v", "does not say expand_timesteps"),
        ("two vaes", "leave --vae out"),
    ],
)
def test_what_is_not_read_says_what_to_take(tmp_path, weights, kind, message):
    source, vae = refused(tmp_path, weights, kind)
    with pytest.raises(UserError, match=message):
        convert.convert(source, tmp_path / "dest", vae=vae)
    assert not list(tmp_path.glob("dest*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wan-AI/Wan2.2-TI2V-5B", "take Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ("QuantStack/Wan2.2-TI2V-5B-GGUF", "GGUF files"),
        ("https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B-Diffusers", "on the hub, Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ("gs://bucket/model", "is an address; download it"),
        ("models/wan2.2.safetensors", "is not there"),
    ],
)
def test_names_that_cannot_be_converted_say_what_to_take(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", name, "dest"]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_commit_and_the_licence_of_a_source_are_kept(tmp_path, monkeypatch, capsys, weights):
    folder = make_diffusers(tmp_path / "snapshots" / COMMIT, weights)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Wan\nlicense: none\n")
    asked = []
    download = lambda name, **kwargs: asked.append((name, kwargs["revision"])) or str(folder)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert cli.main(["convert", "Owner/Name@refs/pr/1", str(tmp_path / "dest")]) == 0
    assert asked == [("Owner/Name", "refs/pr/1")]
    kept = array_store.describe(tmp_path / "dest")[1]
    assert (kept["source"], kept["revision"], kept["license"]) == ("Owner/Name", COMMIT, "apache-2.0")
    # A folder of `hf download --local-dir` knows its commit, too.
    plain = make_diffusers(tmp_path / "plain", weights)
    note = plain / ".cache" / "huggingface" / "download" / "transformer" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\netag\n1.0\n")
    assert sources.locate(str(plain)).revision == COMMIT and sources.locate(str(plain)).license == ""


def test_an_address_as_destination_leaves_no_folder(tmp_path, monkeypatch, capsys, weights):
    make_diffusers(tmp_path / "source", weights)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["convert", "source", "gs://bucket/dest"])
    assert "gs://bucket/dest is an address" in capsys.readouterr().err
    assert [path.name for path in pathlib.Path().iterdir()] == ["source"]


def test_settings_that_shapes_do_not_show_are_compared_when_a_base_is_loaded(tmp_path, weights):
    convert.convert(make_original(tmp_path / "s", weights, num_heads=2, eps=1e-5), tmp_path / "dest",
                    vae=save(tmp_path / "vae.safetensors", weights["original", "vae"]))  # fmt: skip
    sizes = {"channels": 48, "width": 128, "depth": 2, "mlp": 24, "text_width": 12, "time_width": 16}
    vae = {"channels": 48, "encoder_width": 2, "decoder_width": 3, "blocks": 1}
    family = build(**sizes, heads=4, vae=vae, size=(64, 64), frames=5, dtype="float32")
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match=r"config.model.heads = 4, not 2\n  config.model.eps = 1e-06, not 1e-05"):
        base_model.load_base(family, ConfigDict({"base": str(tmp_path / "dest")}), mesh)


@pytest.mark.torch
def test_a_file_for_comfyui_is_verified_with_diffusers_network(tmp_path, weights, vae, capsys):
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    source = save(tmp_path / "x.safetensors", prefixed(weights["original", "transformer"], "model.diffusion_model."))
    call = ["convert", str(source), str(tmp_path / "dest"), "--vae", str(vae), "--verify"]
    assert cli.main([*call, "--json", str(tmp_path / "x.json")]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())["verify"]
    assert all(0 < figures[key]["relative"] < 5e-4 for key in ("transformer", "vae_encode", "vae_decode"))
    swapped = dict(weights["original", "transformer"])
    swapped["blocks.0.self_attn.q.weight"] = swapped["blocks.0.self_attn.k.weight"]
    save(source, prefixed(swapped, "model.diffusion_model."))
    assert cli.main(call) == 2
    assert "does not compute what diffusers computes" in capsys.readouterr().err


@pytest.mark.torch
def test_the_original_names_are_those_that_diffusers_renames():
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    from diffusers.loaders import single_file_utils as theirs

    old = VaeConfig(channels=16, encoder_width=96, decoder_width=96, patch=1, shortcuts=False)
    layout = WanPublished(NETWORK, old)
    for part, rename in (
        ("transformer", theirs.convert_wan_transformer_to_diffusers), ("vae", theirs.convert_wan_vae_to_diffusers)
    ):  # fmt: skip
        originals, ours = layout.entries("original")[part], layout.entries()[part]
        pairs = {o: d for a, b in zip(originals, ours, strict=True) for o, d in zip(a.names, b.names, strict=True)}
        found = rename({name: jnp.array(i) for i, name in enumerate(pairs)})
        assert {name: int(x) for name, x in found.items()} == {d: i for i, d in enumerate(pairs.values())}


@pytest.mark.parametrize(
    ("ours", "original"),
    [
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.downsamples.1.downsamples.0.shortcut.weight"),
        (
            "encoder.down_blocks.0.downsampler.resample.1.weight",
            "encoder.downsamples.0.downsamples.2.resample.1.weight",
        ),
        ("decoder.up_blocks.1.resnets.2.conv2.bias", "decoder.upsamples.1.upsamples.2.residual.6.bias"),
        ("decoder.up_blocks.0.upsampler.time_conv.weight", "decoder.upsamples.0.upsamples.3.time_conv.weight"),
        ("decoder.mid_block.resnets.1.norm2.gamma", "decoder.middle.2.residual.3.gamma"),
        ("post_quant_conv.weight", "conv2.weight"),
    ],
)
def test_the_names_of_the_autoencoder_2_2(ours, original):
    entries = [WanPublished(WanConfig(), VaeConfig()).entries(naming)["vae"] for naming in ("diffusers", "original")]
    assert dict(zip(*([e.name for e in some] for some in entries), strict=True))[ours] == original
