"""LoRA files for LTX-2 in the forms that trainers write: each gives the change that its tensors say, or is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.ltx2.small_ltx2 import CONFIG, CONNECTORS, MODEL, OFF
from tests.weights.test_lora_forms import save
from world_distill import build, cli
from world_distill.errors import UserError
from world_distill.models.ltx2.layout import LORA_RULES, LTX2Published
from world_distill.models.ltx2.published import LORA_NAMES, lora_names
from world_distill.models.ltx2.vae import VaeConfig
from world_distill.programs import generate, probe
from world_distill.settings.loading import load_config
from world_distill.storage.safetensors_folder import TensorFileError
from world_distill.structs import TrainState
from world_distill.training import run_folder
from world_distill.weights.inspect_weights import inspect
from world_distill.weights.lora_files import read_lora, write_lora
from world_distill.weights.lora_layouts import METADATA_KEY, unread_by_diffusers

pytestmark = pytest.mark.once
RANK = 2
KINDS = ("blocks.video.self_attention.q", "blocks.audio_to_video.k", "blocks.audio.mlp.down", "video.patch",
         "audio.time.modulation", "video.av_gate.input", "audio.text_out")  # fmt: skip


def draw(*shape, seed):
    return (0.3 * np.random.default_rng([seed, *shape]).normal(size=shape)).astype(np.float32)


def factors(form, words=("lora_A", "lora_B")):
    """(tensors of a file, change of each of our kernels), `form(name in diffusers, original name)` a layer."""
    tensors, changes = {}, {}
    for seed, path in enumerate(KINDS):
        *stack, i, o = MODEL.shapes[path]
        blocks = []
        for n in range(stack[0] if stack else 1):
            down, up = draw(RANK, i, seed=seed + 50 * n), draw(o, RANK, seed=seed + 50 * n)
            key = form(*(name.format(n=n) for name in LORA_NAMES[path]))
            tensors |= {f"{key}.{words[0]}.weight": down, f"{key}.{words[1]}.weight": up}
            blocks.append((up @ down).T)
        changes[path] = np.stack(blocks) if stack else blocks[0]
    return tensors, changes


def assert_changes(tree, changes, strength=1.0, scale=0.5):
    flat = flatten_dict(tree, sep=".")
    assert {path.removesuffix(".a").removesuffix(".b") for path in flat} == changes.keys()
    for path, change in changes.items():
        found = scale * flat[f"{path}.a"] @ flat[f"{path}.b"]
        np.testing.assert_allclose(found, strength * change, rtol=1e-4, atol=1e-5, err_msg=path)


FORMS = {
    "diffusers": lambda own, original: f"transformer.{own}",
    "comfy": lambda own, original: f"diffusion_model.{original}",
    "peft": lambda own, original: f"base_model.model.{own}",
    "flat": lambda own, original: "lora_unet_" + original.replace(".", "_"),
    "checkpoint": lambda own, original: f"model.diffusion_model.{original}",
    "bare": lambda own, original: own,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("alpha", "strength"), [(None, 1.0), (8.0, 4.0)])
def test_names_of_both_layouts_are_read_and_alpha_may_be_given(tmp_path, form, alpha, strength):
    tensors, changes = factors(form)
    found = read_lora(save(tmp_path / "x.safetensors", tensors), MODEL, scale=0.5, alpha=alpha)
    assert_changes(found.tree, changes, strength)
    assert found.strengths == {strength: len(tensors) // 2}


@pytest.mark.parametrize("where", ["header", "folder", "tensors"])
def test_alpha_that_the_file_says_is_taken_and_another_is_refused(tmp_path, where):
    tensors, changes = factors(FORMS["peft" if where == "folder" else "diffusers" if where == "header" else "comfy"])
    settings, header, name = {"r": RANK, "lora_alpha": 6, "target_modules": ["to_q"]}, {}, "x.safetensors"
    if where == "tensors":
        tensors |= {k.replace("lora_A.weight", "alpha"): np.float32(6) for k in tensors if "lora_A" in k}
    elif where == "header":
        header = {METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    else:
        name = "adapter_model.safetensors"
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    path = save(tmp_path / name, tensors, header)
    path = tmp_path if where == "folder" else path
    assert_changes(read_lora(path, MODEL, scale=0.5).tree, changes, 3.0)
    with pytest.raises(TensorFileError, match="it says its alpha, so alpha = 4 is not for it"):
        read_lora(path, MODEL, scale=0.5, alpha=4.0)


def test_what_peft_wrote_without_its_settings_is_read_with_a_note(tmp_path):
    path = save(tmp_path / "adapter_model.safetensors", factors(FORMS["peft"])[0])
    assert "alpha is taken to be the rank" in read_lora(path, MODEL, scale=0.5).notes[0]
    assert not read_lora(path, MODEL, scale=0.5, alpha=4.0).notes


GATE = {f"diffusion_model.transformer_blocks.0.attn1.to_gate_logits.lora_{x}.weight": np.ones((2, 2)) for x in "AB"}
CONNECTOR = {f"text_embedding_projection.aggregate_embed.lora_{x}.weight": np.ones((2, 2)) for x in "AB"}


def deeper(tensors):
    return {k.replace("transformer_blocks.1.", "transformer_blocks.47."): x for k, x in tensors.items()}


@pytest.mark.parametrize(
    ("change", "header", "message"),
    [
        (lambda x: x | GATE, {}, "it is of another model: not all .*to_gate_logits"),
        (lambda x: x | CONNECTOR, {}, "text projection and connectors, which only `convert --merge` adds.*aggregate"),
        (lambda x: x, {"reference_downscale_factor": "2"}, r"it is an IC-LoRA \(reference_downscale_factor = 2\)"),
        (deeper, {}, "made for a model of other sizes: 48 blocks of width 40; this model has 2"),
        (lambda x: {k: v.repeat(2, 1) if "lora_A" in k else v for k, v in x.items()}, {}, "a model of other sizes"),
    ],
    ids=["later version", "connectors", "reference clips", "depth", "width"],
)  # fmt: skip
def test_lora_for_something_else_is_refused_by_its_name(tmp_path, change, header, message):
    path = save(tmp_path / "x.safetensors", change(factors(FORMS["comfy"])[0]), header)
    with pytest.raises(TensorFileError, match=f"x.safetensors: .*{message}"):
        read_lora(path, MODEL, scale=0.5)


def test_the_connectors_are_left_out_when_told(tmp_path):
    tensors, changes = factors(FORMS["comfy"])
    path = save(tmp_path / "x.safetensors", tensors | CONNECTOR)
    found = read_lora(path, MODEL, scale=0.5, without=("text-connectors",))
    assert_changes(found.tree, changes)
    assert set(found.left_out["text-connectors"]) == set(CONNECTOR)


def test_the_audio_stream_is_left_out_when_told_where_the_model_has_none(tmp_path):
    audio = [path for path in KINDS if path not in lora_names(OFF)]
    assert audio == ["blocks.audio_to_video.k", "blocks.audio.mlp.down", "audio.time.modulation", "video.av_gate.input",
                     "audio.text_out"]  # fmt: skip
    model = dataclasses.replace(
        MODEL,
        names=lora_names(OFF),
        absent=[names for path, names in LORA_NAMES.items() if path not in lora_names(OFF)],
    )
    assert model.absent == list(LTX2Published(OFF, CONNECTORS, VaeConfig()).absent_lora_names.values())
    for form in ("comfy", "peft", "flat"):
        tensors, changes = factors(FORMS[form])
        path = save(tmp_path / "x.safetensors", tensors)
        with pytest.raises(
            TensorFileError, match="LoRA of LTX-2's audio stream, where the model has none.*--without audio"
        ):
            read_lora(path, model, scale=0.5)
        found = read_lora(path, model, scale=0.5, without=("audio",))
        assert_changes(found.tree, {path: changes[path] for path in KINDS if path not in audio})
        assert len(found.left_out["audio"]) == 2 * (2 + 2 + 3)
        assert inspect(path, model)["here"] == "generate --executor FILE --without audio"


# ---- What others read


def test_a_file_is_described(tmp_path):
    tensors, _ = factors(FORMS["comfy"])
    said = {"diffusion_model.patchify_proj.alpha": np.float32(4)}
    for change, alpha, expected in (
        ({}, None, {"made for": "at least 2 blocks of width 40", "alpha": "not said, so taken to be the rank; --alpha",
                    "ComfyUI": "reads all 20", "diffusers": "reads all 20", "here": "generate --executor FILE"}),
        ({}, 8.0, {"alpha": "not said; 8", "here": "generate --executor FILE --alpha 8"}),
        (said, None, {"alpha": "4 (1 layers)",
                      "diffusers": "stops with an error: tensors have no `lora` in their names: diffusion_model.pat"}),
        (said, 8.0, {"here": "refused: it says its alpha"}),
        (CONNECTOR, None, {"here": "convert SOURCE DEST --merge FILE"}),
        (GATE, None, {"here": "refused: it is of another model", "diffusers": "reads 20 of 22"}),
    ):  # fmt: skip
        found = inspect(save(tmp_path / "x.safetensors", tensors | change), MODEL, alpha=alpha)
        assert {key: found[key] for key in expected if expected[key] not in found[key]} == {}
    down, _ = factors(FORMS["comfy"], ("lora_down", "lora_up"))
    found = inspect(save(tmp_path / "x.safetensors", down), MODEL)
    assert found["diffusers"].startswith("reads 0 of 20") and found["ComfyUI"] == "reads all 20 tensors"
    assert inspect(save(tmp_path / "x.safetensors", factors(FORMS["flat"])[0]), MODEL)["diffusers"].startswith(
        "reads 0"
    )


def test_what_diffusers_does_not_read_of_our_file_is_said(tmp_path):
    head = {"video": {"head": {"a": np.ones((CONFIG.width, 2)), "b": np.ones((2, CONFIG.channels))}}}
    assert unread_by_diffusers(head, MODEL) == []  # no block, and diffusers reads it
    bias = {"differences": {"video": {"head": {"bias": np.ones(CONFIG.channels)}}}}
    [line] = unread_by_diffusers(head | bias, MODEL)
    assert line == "tensors have no `lora` in their names: diffusion_model.proj_out.diff_b"
    write_lora(tmp_path / "x.safetensors", head | bias, MODEL, scale=1.0, layout="comfy")
    assert inspect(tmp_path / "x.safetensors", MODEL)["diffusers"] == f"stops with an error: {line}"


@pytest.mark.torch
def test_diffusers_takes_what_the_rules_say(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    pipeline = diffusers.LTX2ImageToVideoPipeline
    tensors = {name: np.ones((2, 2), np.float32) for name in factors(FORMS["comfy"])[0]}
    found = pipeline.lora_state_dict(str(save(tmp_path / "x.safetensors", tensors)))
    assert len(found) == len(tensors) and all("lora" in key for key in found)
    names = {layer for pair in LORA_NAMES.values() for layer in (pair[0].format(n=0), pair[0].format(n=1))}
    assert all(key.removeprefix("transformer.").partition(".lora")[0] in names for key in found)
    alpha = {"diffusion_model.patchify_proj.alpha": np.ones(1, np.float32)}
    found = pipeline.lora_state_dict(str(save(tmp_path / "x.safetensors", tensors | alpha)))
    assert not all("lora" in key for key in found)  # where its loader stops
    assert LORA_RULES.stops(dict.fromkeys(tensors, ("", "a"))) == []
    assert LORA_RULES.stops(dict.fromkeys(tensors | alpha, ("", "a")))


# ---- From the config and the command line


@pytest.fixture(scope="module")
def model():
    """A config of a small model of both streams, its family and its names of layers."""
    config = load_config("ltx2:debug", {"executor.targets": r"blocks\.video\.self_attention\.q", "executor.rank": RANK})
    return config, build.make_family(config)


def a_file(path, family):
    """A LoRA of the queries, without alpha; and the change of their kernels."""
    layers, i, o = family.kernel_shapes()["blocks.video.self_attention.q"]
    tensors, changes = {}, []
    for n in range(layers):
        down, up = draw(RANK, i, seed=n), draw(o, RANK, seed=n)
        key = f"diffusion_model.transformer_blocks.{n}.attn1.to_q"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        changes.append((up @ down).T)
    return str(save(path, tensors)), np.stack(changes)


def change_of(lora, family):
    found = lora["blocks"]["video"]["self_attention"]["q"]
    return family.lora_scale * np.asarray(found["a"]) @ np.asarray(found["b"])


def test_training_and_probing_start_with_the_alpha_that_is_given(tmp_path, model):
    config, family = model
    path, change = a_file(tmp_path / "x.safetensors", family)
    base = jax.eval_shape(family.init_base, jax.random.key(0))
    lora = jax.eval_shape(lambda: family.init_lora(jax.random.key(0), base, rank=RANK))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    lora = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), lora)
    state = TrainState(
        step=0, lora=lora, lora_ema=lora, lora_old=lora, opt_state=None, key=None, lora_rolled=None
    )  # fmt: skip
    for alpha, strength in ((0.0, 1.0), (6.0, 3.0)):
        with config.unlocked():
            config.executor.start, config.executor.start_alpha = path, alpha
        found = run_folder.start_from_file(path, config, family, state).lora
        np.testing.assert_allclose(change_of(found, family), strength * change, rtol=1e-4, atol=1e-5)
        found = probe._executor(config, family, build.start_devices(config))
        np.testing.assert_allclose(change_of(found, family), strength * change, rtol=1e-4, atol=1e-5)


def test_generate_takes_an_alpha_for_each_file(tmp_path, model):
    config, family = model
    path, change = a_file(tmp_path / "x.safetensors", family)
    request = lambda **given: generate.Request(  # noqa: E731
        out=tmp_path, images=(tmp_path,), tasks=("a",), executors=(tmp_path / "x.safetensors",) * 2, **given
    )  # fmt: skip
    mesh = build.start_devices(config)
    lora, known = generate._load_executors(request(alphas=(6.0, None), strengths=(1.0, 0.5)), config, family, mesh)
    np.testing.assert_allclose(change_of(lora, family), (3.0 + 0.5) * change, rtol=1e-4, atol=1e-5)
    assert [one.get("alpha") for one in known] == [6.0, None]
    with pytest.raises(UserError, match="3 --alpha for 2 --executor"):
        request(alphas=(1.0, 2.0, 3.0))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(UserError, match="the folder of a run, which says its alpha"):
        generate._load_executor(tmp_path / "run", (), 4.0, config, family, mesh)


def test_inspect_weights_takes_an_alpha(tmp_path, model, capsys):
    path, _ = a_file(tmp_path / "x.safetensors", model[1])
    assert cli.main(["inspect-weights", path, "--config", "ltx2:debug", "--alpha", "8"]) == 0
    assert "not said; 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        ("diffusion_model.transformer_blocks.0.attn1.to_q", "ltx2"),
        ("transformer.transformer_blocks.3.attn1.to_q", "ltx2"),
        ("diffusion_model.blocks.0.self_attn.q", "wan22_5b"),
        ("diffusion_model.nothing.of.these", "wan22_5b"),
    ],
)
def test_inspect_weights_finds_the_model_by_the_names_of_layers(tmp_path, capsys, layer, config):
    path = str(tmp_path / "a.safetensors")
    factors = {"A": np.ones((2, 8), np.float32), "B": np.ones((8, 2), np.float32)}
    save(tmp_path / "a.safetensors", {f"{layer}.lora_{x}.weight": array for x, array in factors.items()})
    assert cli.main(["inspect-weights", path]) == 0
    said = capsys.readouterr().out
    assert f"held against  --config {config}\n" in said
    assert ("reads all 2 tensors" in said) == ("nothing" not in layer)
