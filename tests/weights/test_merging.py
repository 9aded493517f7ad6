"""`convert --merge`: every tensor of a LoRA is in the checkpoint's weights, times its scale, or is named."""

import json

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from tests.models.ltx2.published_ltx2 import (
    LAYOUT,
    draw,
    linear_layers,
    lora,
    original_name,
    originals,
    save_folder,
    save_single,
)
from tests.weights.test_convert import make_source, tensors
from tests.weights.test_lora_forms import FORMS, TEXT, factors, save, speed_changes
from tests.weights.test_lora_forms import expected as changes_of_wan
from world_distill import cli, models
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.models.ltx2.text import projection_digest, read_projection
from world_distill.models.wan.published import transformer_entries
from world_distill.programs.export import describe
from world_distill.settings.loading import load_config
from world_distill.storage import array_store
from world_distill.weights import base_model, convert, inspect_weights, lora_names, merging, published, verify
from world_distill.weights.lora_layouts import LoraModel
from world_distill.weights.merging import Merge

pytestmark = pytest.mark.once
PROJECTION = {"text_proj_in": (24, 72)}


@pytest.fixture(scope="module")
def weights():
    return draw()


@pytest.fixture(scope="module")
def single(tmp_path_factory, weights):
    return save_single(tmp_path_factory.mktemp("merging") / "dev.safetensors", originals(weights))


def distilled(**options):
    """(tensors like those of LTX-2's distilled LoRA, change of each layer by diffusers' name)."""
    layers = linear_layers() | PROJECTION
    part = lambda layer: "connectors" if layer in PROJECTION else "transformer"  # noqa: E731
    names = {layer: original_name(part(layer), layer).removeprefix("model.") for layer in layers}
    found, changes = lora({names[layer]: shape for layer, shape in layers.items()}, name="{}", **options)
    return found, {layer: changes[name] for layer, name in names.items()}


def added(weights, changes, scale=1.0):
    """The published weights of LTX-2 with these changes, float32."""
    total = {part: dict(tensors) for part, tensors in weights.items()}
    for layer, change in changes.items():
        part = next(part for part in total if f"{layer}.weight" in total[part])
        total[part][f"{layer}.weight"] = total[part][f"{layer}.weight"] + scale * change
    return total


def assert_holds(dest, total, rtol=1e-5):
    """The checkpoint has these tensors of LTX-2, by diffusers' names, and no others."""
    found, wanted = ocp.load(dest), LAYOUT.entries()
    assert len(found) == sum(map(len, wanted.values()))
    for part, entries in wanted.items():
        for entry in entries:
            theirs = entry.gather(total[part].__getitem__)
            np.testing.assert_allclose(found[f"{part}.{entry.path}"], theirs, rtol=rtol, atol=1e-5, err_msg=entry.name)


# ---- What is added


@pytest.mark.parametrize("source", ["single", "folder"])
def test_every_layer_of_the_distilled_lora_is_in_the_base_and_the_projection(tmp_path, weights, single, source, capsys):
    found, changes = distilled()
    file = save(tmp_path / "distilled.safetensors", found)
    start = single if source == "single" else save_folder(tmp_path / "dev", weights)
    assert cli.main(["convert", str(start), str(tmp_path / "dest"), "--merge", f"{file}:0.5"]) == 0
    total = added(weights, changes, 0.5)
    assert_holds(tmp_path / "dest", total)
    beside = tmp_path / "dest.text_projection.safetensors"
    np.testing.assert_allclose(
        read_projection(beside), total["connectors"]["text_proj_in.weight"].T, rtol=1e-5, atol=1e-5
    )
    out = capsys.readouterr().out
    assert f"--config.model.text_projection={beside}" in out and "merged: distilled.safetensors at 0.5" in out
    metadata = array_store.describe(tmp_path / "dest")[1]
    assert metadata["merged"] == [{"file": "distilled.safetensors", "scale": 0.5}]
    assert metadata["beside"] == {"text_projection": beside.name}
    # By this, records and text encoders with the source's own projection are refused.
    assert metadata["text_weights"] == projection_digest(beside) != projection_digest(single)
    assert sorted(path.name for path in tmp_path.glob("dest*")) == ["dest", beside.name]
    assert cli.main(["convert", str(start), str(tmp_path / "dest"), "--merge", str(file)]) == 2
    (tmp_path / "dest").rename(tmp_path / "other")
    assert cli.main(["convert", str(start), str(tmp_path / "dest"), "--merge", str(file)]) == 2
    assert f"{beside} exists already" in capsys.readouterr().err


def test_the_connectors_are_changed_too(tmp_path, weights, single):
    layers = {"video_connector.transformer_blocks.1.attn1.to_q": (24, 24),
              "audio_connector.transformer_blocks.0.ff.net.2": (24, 96)}  # fmt: skip
    for name, form in (
        ("a", lambda layer: original_name("connectors", layer).removeprefix("model.")),
        ("b", lambda layer: f"connectors.{layer}"),
    ):
        found, changes = lora({form(layer): shape for layer, shape in layers.items()}, name="{}")
        file = save(tmp_path / f"{name}.safetensors", found)
        convert.convert(single, tmp_path / name, merges=[Merge(file)])
        assert_holds(tmp_path / name, added(weights, {layer: changes[form(layer)] for layer in layers}))
    assert not list(tmp_path.glob("*.text_projection.*"))


def test_sums_are_rounded_once_in_pieces_of_any_size(tmp_path, weights, single, monkeypatch):
    """Two small changes make a step of bfloat16 together, and none where each is rounded."""
    (found, changes), (again, more) = distilled(seed=1), distilled(seed=2)
    merges = [
        Merge(save(tmp_path / "1.safetensors", found), 0.004), Merge(save(tmp_path / "2.safetensors", again), -0.003)
    ]  # fmt: skip
    total = added(added(weights, changes, 0.004), more, -0.003)
    arrays = []
    for size in (merging.PIECE_BYTES, 200):
        monkeypatch.setattr(merging, "PIECE_BYTES", size)
        convert.convert(single, tmp_path / str(size), dtype="bfloat16", merges=merges)
        arrays.append(ocp.load(tmp_path / str(size)))
    twice = 0
    for entry in LAYOUT.entries()["transformer"]:
        one, two = (np.asarray(found[f"transformer.{entry.path}"]) for found in arrays)
        np.testing.assert_array_equal(one, two)
        exact = entry.gather(total["transformer"].__getitem__)
        assert one.dtype == ml_dtypes.bfloat16 and np.mean(one == exact.astype(ml_dtypes.bfloat16)) > 0.999
        base = entry.gather(weights["transformer"].__getitem__)
        twice += np.sum(one != (base.astype(ml_dtypes.bfloat16) + (exact - base)).astype(ml_dtypes.bfloat16))
    assert twice > 100  # elements in which it matters


@pytest.mark.parametrize(
    ("settings", "strength"), [({"lora_alpha": 8}, 4.0), ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5)]
)
def test_alpha_is_that_of_the_file_or_of_the_flag(tmp_path, weights, single, settings, strength):
    q = {"transformer_blocks.1.attn1.to_q": (16, 16)}
    found, changes = lora(q, name="base_model.model.{}")
    save(tmp_path / "peft" / "adapter_model.safetensors", found)
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    convert.convert(single, tmp_path / "a", merges=[Merge(tmp_path / "peft")])
    assert_holds(tmp_path / "a", added(weights, changes, strength))
    plain, changes = lora(q)
    call = ["convert", str(single), str(tmp_path / "b"), "--merge", str(save(tmp_path / "x.safetensors", plain))]
    assert cli.main([*call, "--merge", str(tmp_path / "peft"), "--alpha", "6", "--alpha", "0"]) == 0
    both = added(added(weights, changes, 6 / 2), lora(q)[1], strength)
    assert_holds(tmp_path / "b", both)
    kept = array_store.describe(tmp_path / "b")[1]["merged"]
    assert kept == [{"file": "x.safetensors", "scale": 1.0, "alpha": 6.0}, {"file": "peft", "scale": 1.0}]


def test_wan_takes_lora_too_with_its_convolution_and_differences(tmp_path):
    source, rng = make_source(tmp_path / "source"), np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 1, 2, 2)).astype(np.float32), rng.normal(size=(32, 2, 1, 1, 1)).astype(np.float32)
    key = "diffusion_model.patch_embedding"
    table = speed_changes()
    found = factors() | {f"diffusion_model.{name}": x for name, (x, *_) in table.items()}
    found |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": np.float32([4])}
    convert.convert(source, tmp_path / "dest", merges=[Merge(save(tmp_path / "x.safetensors", found), -2.0)])
    changes = {f"{name}.weight": x for name, x in changes_of_wan(-2.0).items()}
    changes |= {name: -2 * x for x, name, _ in table.values()}
    changes["patch_embedding.weight"] = -2 * 2 * np.einsum("or,rctyx->octyx", b[:, :, 0, 0, 0], a)
    config = published.wan.transformer_config(json.loads((source / "transformer" / "config.json").read_text()))
    total, arrays = tensors("transformer_3x4x6.npz"), ocp.load(tmp_path / "dest")
    for entry, original in zip(transformer_entries(config), transformer_entries(config, "original"), strict=True):
        for own, name in zip(entry.names, original.names, strict=True):
            total[own] = total[own] + changes.pop(name, np.float32(0))
        theirs = entry.gather(total.__getitem__)
        np.testing.assert_allclose(arrays[f"transformer.{entry.path}"], theirs, rtol=1e-5, atol=1e-5)
    assert not changes


# ---- What is said of it


def test_the_checkpoint_and_what_is_exported_from_it_say_what_was_merged(tmp_path, single):
    file = save(tmp_path / "distilled.safetensors", distilled()[0])
    convert.convert(single, tmp_path / "dest", merges=[Merge(file, 0.5)])
    config = load_config("ltx2:debug", {"base": str(tmp_path / "dest")})
    assert describe(config, 3)["base_merged"] == "distilled.safetensors at 0.5"
    config.base = str(tmp_path / "none")
    assert "base_merged" not in describe(config, 3)
    assert "base_merged" in inspect_weights.HEADER
    found = inspect_weights.inspect(tmp_path / "dest", LoraModel.whole(LAYOUT))
    assert found["merged"] == "distilled.safetensors at 0.5"
    for merges, message in (
        ([], "distilled.safetensors at 0.5 is merged into it, not nothing"),
        ([Merge(file)], "distilled.safetensors at 0.5 is merged into it, not distilled.safetensors at 1"),
    ):
        with pytest.raises(UserError, match=message):
            verify.check_same_model(single, tmp_path / "dest", "keep", merges=merges)
    verify.check_same_model(single, tmp_path / "dest", "keep", merges=[Merge(file, 0.5)])


def test_texts_for_a_merged_base_need_its_projection(tmp_path, single):
    convert.convert(single, tmp_path / "dest", merges=[Merge(save(tmp_path / "x.safetensors", distilled()[0]))])
    sizes = array_store.describe(tmp_path / "dest")[1]["model"]
    small = {"size": (64, 64), "frames": 9, "dtype": "float32", "vae_dtype": "float32"}
    config, mesh = ConfigDict({"base": str(tmp_path / "dest")}), make_mesh(devices=jax.devices()[:1])

    def load(**settings):
        return base_model.load_base(models.build("ltx2", **sizes, **small, **settings), config, mesh, parts=("vae",))

    projection = tmp_path / "dest.text_projection.safetensors"
    with pytest.raises(
        UserError, match=f"changes the text_projection is .*--config.model.text_projection={projection}"
    ):
        load(text_encoder="gemma")
    load(text_encoder="gemma", text_projection=str(projection))
    load()  # no text is encoded


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b.safetensors", 1.0), ("a/b.safetensors:.5", 0.5), ("a/b:-2", -2.0), ("C:odd:name", 1.0), (":3", 1.0)],
)
def test_the_flag_is_a_path_and_maybe_a_scale(text, expected):
    path, scale = merging.parse(text)
    assert scale == expected and str(path) == (text if expected == 1.0 else text.rpartition(":")[0])


def test_a_path_with_a_colon_is_itself_and_a_scale_of_nothing_is_refused(tmp_path):
    (tmp_path / "x:2").touch()
    assert merging.parse(f"{tmp_path}/x:2") == (tmp_path / "x:2", 1.0)
    for number in ("0", "nan", "inf"):
        with pytest.raises(ValueError, match=f"the scale is {number}"):
            merging.parse(f"x:{number}")


# ---- What is refused

NORM = "diffusion_model.transformer_blocks.0.attn1.q_norm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"diffusion_model.other.lora_A.weight": np.ones((2, 16), np.float32)}, "not all .*other.lora_A"),
        (lambda x: x | {f"{NORM}.weight": np.ones(16, np.float32)}, "more than LoRA, which would be lost: .*q_norm"),
        (lambda x: x | TEXT, r"it also holds LoRA of the text encoder[^:]*: text_encoder[^:]*$"),
        (lambda x: dict(list(x.items())[1:]), "one factor without the other"),
        (lambda x: {k: x[k][:, :5] if k.endswith("lora_A.weight") else x[k] for k in x}, "a model of other sizes"),
        (lambda x: {k: x[k] * (np.nan if "aggregate" in k else 1) for k in x}, "aggregate_embed.*not finite"),
        (lambda x: factors(), "it is of another model: none of its layers|of other sizes"),
        (lambda x: x | {"diffusion_model.patchify_proj.lokr_w1": np.ones((4, 4), np.float32)}, "it is a LoKr"),
    ],
    ids=["layer", "weight", "text encoder", "lonely", "sizes", "nan", "wan", "lokr"],
)  # fmt: skip
def test_lora_that_cannot_be_merged_whole_leaves_nothing(tmp_path, single, change, message):
    file = save(tmp_path / "x.safetensors", change(distilled()[0]))
    with pytest.raises(UserError, match=f"--merge .*x.safetensors: .*{message}"):
        convert.convert(single, tmp_path / "dest", merges=[Merge(file)])
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_alpha_beside_the_files_own_and_one_too_many_are_refused(tmp_path, single, capsys):
    q = "diffusion_model.transformer_blocks.0.attn1.to_q"
    found = lora({"transformer_blocks.0.attn1.to_q": (16, 16)})[0] | {f"{q}.alpha": np.float32([1])}
    call = ["convert", str(single), str(tmp_path / "dest"), "--merge", str(save(tmp_path / "x.safetensors", found))]
    assert cli.main([*call, "--alpha", "4"]) == 2
    assert "it says its alpha, so alpha = 4 is not for it" in capsys.readouterr().err
    assert cli.main([*call, "--alpha", "4", "--alpha", "5"]) == 2
    assert "2 --alpha for 1 --merge: give one, or one for each" in capsys.readouterr().err
    assert cli.main([*call[:3], "--alpha", "4"]) == 2
    assert "--alpha is of a LoRA that --merge names" in capsys.readouterr().err
    assert cli.main([*call[:3], "--merge", str(tmp_path / "none.safetensors")]) == 2
    assert "it is not there" in capsys.readouterr().err


def test_a_source_without_what_a_lora_changes_is_refused(tmp_path, weights):
    tensors = {name: x for name, x in originals(weights).items() if "aggregate_embed" not in name}
    source = save_single(tmp_path / "dev.safetensors", tensors)
    layer = {"text_embedding_projection.aggregate_embed": (24, 24 * 49)}  # as published
    file = save(tmp_path / "x.safetensors", lora(layer, name="{}")[0])
    with pytest.raises(UserError, match="it changes the text_projection, which the source lacks: text_embedding_proj"):
        convert.convert(source, tmp_path / "dest", merges=[Merge(file)])
    convert.convert(source, tmp_path / "dest")  # nothing asks for it otherwise


# ---- Beside diffusers


@pytest.mark.torch
def test_merged_weights_are_those_of_diffusers_with_the_lora_fused(tmp_path, weights, single, capsys):
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    import diffusers
    import torch
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    folder = save_folder(tmp_path / "dev", weights)
    file = save(tmp_path / "distilled.safetensors", distilled()[0])
    transformer = diffusers.LTX2VideoTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    )
    text = LTX2TextConnectors.from_pretrained(folder / "connectors", torch_dtype=torch.float32)
    pipeline = diffusers.LTX2ImageToVideoPipeline
    state = pipeline.lora_state_dict(str(file))
    for prefix, network in (("transformer", transformer), ("connectors", text)):
        part = {k: x for k, x in state.items() if k.startswith(f"{prefix}.")}
        network.load_lora_adapter(part, prefix=prefix, adapter_name="x")
        network.fuse_lora(lora_scale=0.5)
        network.unload_lora()
    fused = {"transformer": transformer, "connectors": text}
    fused = {part: {k: x.numpy() for k, x in network.state_dict().items()} for part, network in fused.items()}
    call = ["convert", str(single), str(tmp_path / "dest"), "--merge", f"{file}:0.5", "--verify"]
    assert cli.main(call) == 0
    assert_holds(tmp_path / "dest", fused | {"vae": weights["vae"]})
    projection = safetensors.numpy.load_file(tmp_path / "dest.text_projection.safetensors")["text_proj_in.weight"]
    np.testing.assert_allclose(projection, fused["connectors"]["text_proj_in.weight"], rtol=1e-5, atol=1e-5)
    save(file, distilled(seed=9)[0])  # another LoRA of the same name
    assert cli.main(call) == 2
    assert "does not compute what diffusers computes" in capsys.readouterr().err


def test_layers_that_only_a_merge_reads_are_named_to_others():
    for key in distilled()[0]:
        assert (lora_names.other_part(key) == lora_names.CONNECTORS) == ("aggregate" in key)
    assert all(lora_names.other_part(form[0]("blocks.0.x", "blocks.0.y")) is None for form in FORMS.values())
