"""LTX-2's single file: the checkpoint that the folder of diffusers gives, or an error that says what to take."""

import copy
import gzip
import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax.traverse_util import flatten_dict

from tests.models.ltx2.published_ltx2 import (
    CONFIG,
    LAYOUT,
    draw,
    linear_layers,
    lora,
    original_name,
    originals,
    save_folder,
    save_single,
)
from tests.models.ltx2.small_ltx2 import GOLDENS
from tests.weights.test_lora_forms import save
from world_distill import cli, models
from world_distill.errors import UserError
from world_distill.models.ltx2 import original
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.ltx2.layout import LTX2Published
from world_distill.models.ltx2.vae import VaeConfig
from world_distill.storage import array_store
from world_distill.storage.safetensors_folder import TensorFileError
from world_distill.weights import convert, inspect_weights, lora_plan, merged_model, single_files
from world_distill.weights.lora_layouts import LoraModel

PREFIX = "model.diffusion_model."
Q = PREFIX + "transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def weights():
    return draw()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("ltx2")
    convert.convert(save_folder(folder / "source", weights), folder / "dest")
    return dict(ocp.load(folder / "dest")), array_store.describe(folder / "dest")[1]


def assert_same(dest, expected):
    found = ocp.load(dest)
    assert found.keys() == expected[0].keys()
    for name, x in expected[0].items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    assert array_store.describe(dest)[1]["model"] == expected[1]["model"]


# ---- What is read


def test_the_single_file_gives_the_checkpoint_of_the_folder(tmp_path, weights, expected, capsys):
    source = save_single(tmp_path / "x.safetensors", originals(weights), license="LTX-2 Community\nall of it")
    assert cli.main(["convert", str(source), str(tmp_path / "dest"), "--json", str(tmp_path / "x.json")]) == 0
    assert_same(tmp_path / "dest", expected)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["ignored"] == {"audio_vae": 2, "vocoder": 1} and found["layout"] == "original"
    assert "not converted: audio_vae, 2 tensors" in capsys.readouterr().out
    assert array_store.describe(tmp_path / "dest")[1]["license"] == "LTX-2 Community"


def test_settings_that_shapes_do_not_show_come_from_the_header(tmp_path, weights):
    config = copy.deepcopy(CONFIG)
    config["transformer"] |= {
        "num_attention_heads": 4, "attention_head_dim": 4, "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 2, "norm_eps": 1e-5, "positional_embedding_theta": 77.0,
        "positional_embedding_max_pos": [10, 64, 32], "audio_positional_embedding_max_pos": [10],
        "connector_num_attention_heads": 2, "connector_attention_head_dim": 12,
        "connector_positional_embedding_max_pos": [99],
    }  # fmt: skip
    sizes = single_files.open_file(save_single(tmp_path / "x.safetensors", originals(weights), config)).model.sizes
    assert (sizes["heads"], sizes["eps"], sizes["theta"], sizes["ranges"]) == (4, 1e-5, 77.0, (10, 64, 32))
    assert (sizes["connectors"]["heads"], sizes["connectors"]["places"]) == (2, 99)


def test_a_file_without_a_config_has_heads_of_the_published_width(tmp_path, weights, expected, monkeypatch):
    monkeypatch.setattr(original, "HEAD", 8)
    source = save_single(tmp_path / "x.safetensors", originals(weights), None)
    convert.convert(source, tmp_path / "dest")
    assert_same(tmp_path / "dest", expected)


@pytest.mark.parametrize("prefix", [PREFIX, "diffusion_model.", ""])
def test_a_transformer_alone_takes_the_rest_from_the_published_file(tmp_path, weights, expected, prefix):
    tensors = originals(weights)
    alone = {
        prefix + name.removeprefix(PREFIX): x
        for name, x in tensors.items() if name.startswith(PREFIX) and "connector" not in name
    }  # fmt: skip
    source = save_single(tmp_path / "x.safetensors", alone, None)
    with pytest.raises(UserError, match="lacks the text connectors and the autoencoder of its model: give --vae"):
        convert.convert(source, tmp_path / "dest")
    whole = save_single(tmp_path / "published.safetensors", tensors)
    convert.convert(source, tmp_path / "dest", vae=whole)
    assert_same(tmp_path / "dest", expected)


def test_a_file_without_the_autoencoder_takes_it_from_its_own_file(tmp_path, weights, expected):
    tensors = originals(weights)
    source = save_single(tmp_path / "x.safetensors", {k: x for k, x in tensors.items() if not k.startswith("vae.")})
    vae = {k.removeprefix("vae."): x for k, x in tensors.items() if k.startswith("vae.")}
    convert.convert(source, tmp_path / "dest", vae=save(tmp_path / "vae.safetensors", vae))
    assert_same(tmp_path / "dest", expected)


def test_floats_of_8_bits_are_stored_times_their_scale(tmp_path, weights):
    tensors = originals(weights)
    for n in range(2):
        name = Q.replace("0", str(n), 1)
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[name.replace("weight", "weight_scale")] = np.float32([3.0])
        tensors[name.replace("weight", "input_scale")] = np.float32([1.0])
    source = save(tmp_path / "x.safetensors", tensors, {"config": json.dumps(CONFIG)})
    with pytest.raises(UserError, match="2 tensors are 8-bit floats"):
        convert.convert(source, tmp_path / "dest")
    convert.convert(source, tmp_path / "dest", dtype="bfloat16")
    found = ocp.load(tmp_path / "dest")["transformer.blocks.video.self_attention.q.kernel"]
    want = (3 * tensors[Q].astype(np.float32)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found)[0], want.T)


def test_a_merged_folder_is_read_as_a_base(tmp_path, expected):
    small = {"size": (64, 64), "frames": 9, "dtype": "float32", "vae_dtype": "float32"}
    family = models.build("ltx2", **{**expected[1]["model"], **small})
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: family.init_lora(jax.random.key(0), family.init_base(jax.random.key(0)), rank=2))
    executor = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    merged_model.write_merged(tmp_path / "merged", family, expected[0].__getitem__, executor)
    convert.convert(tmp_path / "merged", tmp_path / "dest")
    found, factors = ocp.load(tmp_path / "dest"), flatten_dict(executor, sep=".")
    assert found.keys() == expected[0].keys() and len(factors) > 10
    for name, x in expected[0].items():
        layer = name.removeprefix("transformer.").removesuffix(".kernel")
        change = factors[f"{layer}.a"] @ factors[f"{layer}.b"] if f"{layer}.a" in factors else 0
        np.testing.assert_allclose(found[name], x + change, rtol=1e-5, atol=1e-5, err_msg=name)


# ---- At full size, by names and shapes


@pytest.fixture(scope="module")
def official():
    """Part -> name in diffusers -> shape, as its classes have them on the meta device."""
    found = json.loads(gzip.decompress((GOLDENS / "ltx2_shapes.json.gz").read_bytes()))
    found |= json.loads(gzip.decompress((GOLDENS / "vae_19b_shapes.json.gz").read_bytes()))
    return {part: {name: tuple(shape) for name, shape in shapes.items()} for part, shapes in found.items()}


class Shapes:
    """In place of `TensorFiles`: names without values."""

    def __init__(self, shapes):
        self.shapes, self.types, self.header, self.folder = shapes, dict.fromkeys(shapes, "BF16"), {}, "x"


class Shape:
    def __init__(self, *shape):
        self.shape = shape


def test_every_tensor_of_the_published_file_has_its_place(official, monkeypatch):
    names = {original_name(part, name): x for part, shapes in official.items() for name, x in shapes.items()}
    assert len(names) == sum(map(len, official.values())) > 3700
    names |= {"audio_vae.encoder.conv_in.conv.weight": (1,), "vae.per_channel_statistics.channel": (128,)}
    monkeypatch.setattr(single_files, "TensorFiles", lambda path: Shapes(names))
    found = single_files.open_file("x")
    assert convert.misfits(found) == [] and found.ignored == {"audio_vae": 1}
    assert found.model.layout == LTX2Published(LTX2Config(), ConnectorConfig(), VaeConfig())
    # And not one less, or one more.
    for name in (Q, "vae.decoder.conv_in.conv.weight", "text_embedding_projection.aggregate_embed.weight"):
        monkeypatch.setattr(single_files, "TensorFiles", lambda path, x=name: Shapes(names | {x + "2": (1,)}))
        assert len(convert.misfits(single_files.open_file("x"))) == 1


def test_the_distilled_lora_of_rank_384_changes_every_linear_layer(official):
    layers = {
        ("transformer", name.removesuffix(".weight")): shape
        for name, shape in official["transformer"].items() if len(shape) == 2 and name.endswith(".weight")
    }  # fmt: skip
    layers["connectors", "text_proj_in"] = official["connectors"]["text_proj_in.weight"]
    tensors = {}
    for (part, layer), (o, i) in layers.items():
        name = original_name(part, layer).removeprefix("model.")
        tensors |= {f"{name}.lora_A.weight": Shape(384, i), f"{name}.lora_B.weight": Shape(o, 384)}
    assert round(sum(np.prod(x.shape) for x in tensors.values()) / 1e9, 2) == 3.84  # 7.67 GB in bfloat16
    model = LoraModel.whole(LTX2Published(LTX2Config(), ConnectorConfig(), VaeConfig()))
    found = lora_plan.plan(tensors, {}, model)
    assert {key for factors in found.factors.values() for key in factors[:2]} == tensors.keys()
    assert not found.differences and not found.left_out and found.ranks == {384: len(layers)}
    changed = {layer.path for layer in found.factors}
    assert {p for p in model.shapes if p.startswith("transformer.")} | {"text_projection.linear"} == changed


# ---- What is refused


def changed(part, **settings):
    return CONFIG | {part: CONFIG[part] | settings}


@pytest.mark.parametrize(
    ("config", "header", "message"),
    [
        (CONFIG, {"model_version": "2.3.0"}, r"x.safetensors: it is LTX-2\.3 \(model_version = 2\.3\.0\).*2\.0 \("),
        (CONFIG, {"model_version": "2.5-rc1"}, r"it is LTX-2\.5"),
        (changed("transformer", apply_gated_attention=True), {}, r"it is LTX-2\.3 \(its header has apply_gated"),
        (changed("transformer", apply_gated_attention=True, ff_bias=False), {}, r"it is LTX-2\.5 \(.*ff_bias = False"),
        (changed("transformer", rope_type="interleaved"), {}, "transformer.rope_type = interleaved; only split"),
        (changed("transformer", frequencies_precision="float32"), {}, "frequencies_precision = float32; only float64"),
        (changed("transformer", num_layers=3), {}, "does not fit its tensors: transformer.num_layers = 3, not 2"),
        (changed("transformer", num_attention_heads=3), {}, "16 and 8 wide, which 3 heads do not divide"),
        (changed("transformer", audio_connector_num_layers=8), {}, "audio_connector_num_layers = 8, not 2"),
        (changed("vae", spatial_padding_mode="zeros"), {}, "vae.spatial_padding_mode = zeros; only reflect"),
        (changed("vae", _class_name="CausalDiffusionVAE"), {}, "vae._class_name = CausalDiffusionVAE"),
        (changed("vae", decoder_blocks=[["compress_all", {"multiplier": 2}]]), {}, "only compress_all with a residual"),
        (changed("vae", encoder_blocks=[["compress_all_res", {}]]), {}, "an encoder of the steps"),
        (None, {"config": "{"}, "the config in its header is no JSON"),
        (None, {"config": "[]"}, "its JSON is a list"),
        (changed("transformer", num_attention_heads="two"), {}, "x.safetensors: "),
    ],
)  # fmt: skip
def test_headers_of_other_models_are_refused(tmp_path, weights, config, header, message):
    source = save_single(tmp_path / "x.safetensors", originals(weights), config, **header)
    with pytest.raises(UserError, match=message):
        convert.convert(source, tmp_path / "dest")
    assert not list(tmp_path.glob("dest*"))


def test_later_versions_are_known_by_their_tensors_too(tmp_path, weights):
    gate = {PREFIX + "transformer_blocks.0.attn1.to_gate_logits.weight": np.ones((2, 16), np.float32)}
    part = {name: x for name, x in originals(weights).items() if name.startswith(PREFIX)} | gate
    source = save_single(tmp_path / "x.safetensors", part, None)  # before the missing autoencoder is spoken of
    with pytest.raises(UserError, match=r"it is LTX-2\.3 \(it holds transformer_blocks\.0\.attn1\.to_gate_logits"):
        convert.convert(source, tmp_path / "dest")
    found = inspect_weights.inspect(source, LoraModel.whole(LAYOUT))
    assert found["kind"] == "a transformer of LTX-2" and "it is LTX-2.3" in found["here"]


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("transformer", {"gated_attn": True}, r"it is LTX-2\.3 \(transformer/config\.json has gated_attn = True\)"),
        ("transformer", {"gated_attn": True, "ff_bias": False}, r"it is LTX-2\.5"),
        ("transformer", {"use_prompt_embeddings": False}, r"it is LTX-2\.3.*take Lightricks/LTX-2"),
    ],
)
def test_folders_of_later_versions_are_refused_by_their_name(tmp_path, weights, part, settings, message):
    folder = save_folder(tmp_path / "source", weights)
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=message):
        convert.convert(folder, tmp_path / "dest")


def test_all_names_that_do_not_fit_are_listed(tmp_path, weights):
    tensors = originals(weights)
    del tensors[PREFIX + "proj_out.bias"], tensors["vae.encoder.conv_out.conv.bias"]
    tensors["vae.extra"] = tensors[PREFIX + "extra"] = tensors["stray.weight"] = np.zeros(3, np.float32)
    tensors[PREFIX + "video_embeddings_connector.extra"] = tensors["text_embedding_projection.extra"] = np.zeros(1)
    tensors[PREFIX + "adaln_single.linear.bias"] = np.zeros(7, np.float32)
    with pytest.raises(UserError) as caught:
        convert.convert(save_single(tmp_path / "x.safetensors", tensors), tmp_path / "dest")
    for line in (
        "transformer: missing: proj_out.bias [4]", "transformer: unexpected: extra [3]",
        "transformer: unexpected: stray.weight [3]",
        "transformer: shape: adaln_single.linear.bias is [7], expected [96]",
        "connectors: unexpected: video_embeddings_connector.extra", "vae: missing: encoder.conv_out.conv.bias",
        "vae: unexpected: extra", "text_projection: unexpected: extra",
    ):  # fmt: skip
        assert line in str(caught.value)
    assert not list(tmp_path.glob("dest*"))


def refused(tmp_path, tensors, kind):
    """(source, vae) of a kind, in the folder."""
    path = tmp_path / "x.safetensors"
    if kind == "cut":
        save_single(path, tensors)
        path.write_bytes(path.read_bytes()[:-50])
        return path, None
    if kind == "page":
        path.write_bytes(b"<!DOCTYPE html><title>Sign in</title>")
        return path, None
    if kind == "gguf":
        (tmp_path / "x.gguf").write_bytes(b"GGUF....")
        return tmp_path / "x.gguf", None
    if kind == "pickle":
        (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04")
        return tmp_path / "x.ckpt", None
    if kind == "nvfp4":
        return save_single(path, tensors | {Q.replace("weight", "weight_scale_2"): np.ones(1, np.float32)}), None
    if kind == "nan":
        broken = tensors[Q].copy()
        broken[1, 2] = np.nan
        return save_single(path, tensors | {Q: broken}), None
    if kind == "lora":
        return save(path, lora(linear_layers())[0]), None
    if kind == "no audio":
        return save_single(path, {k: x for k, x in tensors.items() if "audio" not in k}), None
    if kind == "vae alone":
        return save_single(path, {k: x for k, x in tensors.items() if k.startswith("vae.")}), None
    if kind == "connectors alone":
        return save_single(path, {k: x for k, x in tensors.items() if "embeddings_connector" in k}), None
    if kind == "widths":
        name = PREFIX + "video_embeddings_connector.learnable_registers"
        return save_single(path, tensors | {name: np.ones((4, 48), np.float32)}, None), None
    vae = {"decoder.middle.0.residual.0.gamma": np.ones(2, np.float32)}
    assert kind == "vae of wan"
    return save_single(path, tensors), save(tmp_path / "vae.safetensors", vae)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "is no whole safetensors file"),
        ("page", "it is a page; the download needs to be logged in"),
        ("gguf", "is a GGUF file.*of LTX-2, Lightricks/LTX-2, or its files ltx-2-19b-dev"),
        ("pickle", "is a pickle"),
        ("nvfp4", "quantised to 4 bits.*take Lightricks/LTX-2"),
        ("nan", "transformer: transformer_blocks.0.attn1.to_q.weight holds values that are not finite"),
        ("lora", "it is a LoRA file"),
        ("no audio", "LTX-Video, or another model"),
        ("vae alone", "it is an autoencoder of LTX-2"),
        ("connectors alone", "it is text connectors of LTX-2"),
        ("widths", "takes text 24 wide, its connectors 48|which .* heads"),
        ("vae of wan", "is no autoencoder of LTX-2: it is an autoencoder of Wan"),
    ],
)
def test_what_is_not_read_says_what_it_is(tmp_path, weights, kind, message):
    source, vae = refused(tmp_path, originals(weights), kind)
    with pytest.raises((UserError, TensorFileError), match=message):
        convert.convert(source, tmp_path / "dest", vae=vae)
    assert not list(tmp_path.glob("dest*"))


def test_a_file_of_the_hub_and_a_transformer_without_its_parts_say_what_to_do(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "Lightricks/LTX-2/ltx-2-19b-dev.safetensors", "dest"]) == 2
    assert "`hf download Lightricks/LTX-2 ltx-2-19b-dev.safetensors`" in capsys.readouterr().err
    folder = save_folder(tmp_path / "executor", weights)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="put the other folders of its base beside it"):
        convert.convert(folder, tmp_path / "dest")


# ---- Beside diffusers


@pytest.mark.torch
def test_a_single_file_is_verified_with_diffusers_networks(tmp_path, weights, capsys):
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    tensors = originals(weights)
    source = save_single(tmp_path / "x.safetensors", tensors)
    call = ["convert", str(source), str(tmp_path / "dest"), "--verify"]
    assert cli.main([*call, "--json", str(tmp_path / "x.json")]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())["verify"]
    names = ("transformer_video", "transformer_audio", "connectors_video", "connectors_audio", "vae_encode")
    assert all(0 < figures[key]["relative"] < 1e-4 for key in (*names, "vae_decode"))
    swapped = tensors | {Q: tensors[Q.replace("to_q", "to_k")]}
    save_single(source, swapped)
    assert cli.main(call) == 2
    assert "does not compute what diffusers computes" in capsys.readouterr().err
