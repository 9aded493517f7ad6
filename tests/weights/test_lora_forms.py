"""LoRA files in the forms that trainers write: each gives the sum that its tensors say, or is refused by its name."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from tests.models.wan.small_wan import CONFIG, MODEL, load
from world_distill import build
from world_distill.errors import UserError
from world_distill.models.lora import DIFFERENCES, apply_full, merge
from world_distill.models.wan.published import LORA_NAMES, transformer_entries
from world_distill.settings.loading import load_config
from world_distill.storage.safetensors_folder import FLOATS_8, TensorFileError
from world_distill.structs import TrainState
from world_distill.training import run_folder
from world_distill.weights import lora_names
from world_distill.weights.lora_files import combine, read_lora, write_lora

pytestmark = pytest.mark.once
WIDTH, RANK = CONFIG.width, 2
# Original name -> (diffusers' name, outputs): two of each kind of layer.
LAYERS = {
    f"blocks.{n}.{original}": (f"blocks.{n}.{diffusers}", outputs)
    for n in range(CONFIG.depth)
    for original, diffusers, outputs in (
        ("self_attn.q", "attn1.to_q", WIDTH), ("cross_attn.o", "attn2.to_out.0", WIDTH),
        ("ffn.0", "ffn.net.0.proj", CONFIG.mlp),
    )
}  # fmt: skip
Q = "blocks.0.self_attn.q"


def draw(*shape, seed=0, size=0.1):
    return (size * np.random.default_rng([seed, *shape]).normal(size=shape)).astype(np.float32)


def factors(name=lambda original, diffusers: f"diffusion_model.{original}", a="lora_A.weight", b="lora_B.weight"):
    """The tensors of a file, `name(original, diffusers)` a layer."""
    tensors = {}
    for i, (original, (diffusers, outputs)) in enumerate(LAYERS.items()):
        key = name(original, diffusers)
        tensors |= {f"{key}.{a}": draw(RANK, WIDTH, seed=i), f"{key}.{b}": draw(outputs, RANK, seed=i)}
    return tensors


def expected(strength=1.0):
    """Original name -> change of the weight [o i]."""
    return {
        original: strength * draw(outputs, RANK, seed=i) @ draw(RANK, WIDTH, seed=i)
        for i, (original, (_, outputs)) in enumerate(LAYERS.items())
    }


def save(path, tensors, header=None):
    """As safetensors writes it; the library for numpy knows no floats of 8 bits."""
    entries, data = {}, b""
    kinds = {np.dtype(jnp.dtype(kind)): name for name, kind in FLOATS_8.items()}
    kinds |= {np.dtype("float32"): "F32", np.dtype("float16"): "F16", np.dtype("float64"): "F64"}
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor).tobytes()
        span = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        data += raw
    text = json.dumps(entries | ({"__metadata__": header} if header else {})).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def reading(path, **options):
    return read_lora(path, MODEL, scale=options.pop("scale", 0.5), **options)


@pytest.fixture(scope="module")
def base():
    return load("transformer_3x4x6.npz")[1]


def changes(base, tree, scale=0.5):
    """Original name of a tensor -> what the Executor adds to it."""
    merged = flatten_dict(merge(jax.tree.map(jnp.asarray, base), tree, scale), sep=".")
    flat, found = flatten_dict(base, sep="."), {}
    for entry in transformer_entries(CONFIG, "original"):
        found |= entry.scatter(np.asarray(merged[entry.path], np.float64) - flat[entry.path])
    return {name: x for name, x in found.items() if np.abs(x).max() > 1e-6}


def assert_changes(base, tree, wanted, scale=0.5):
    found = changes(base, tree, scale)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        np.testing.assert_allclose(found[name], change, atol=2e-6, err_msg=name)


def weights_of(layers):
    return {f"{name}.weight": change for name, change in layers.items()}


# ---- What is read

FORMS = {
    "comfy": (lambda o, d: f"diffusion_model.{o}", "lora_A.weight", "lora_B.weight"),
    "musubi": (lambda o, d: "lora_unet_" + o.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "videox": (lambda o, d: "lora_unet__" + o.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "diffsynth": (lambda o, d: f"pipe.dit.{o}", "lora_A.default.weight", "lora_B.default.weight"),
    "peft": (lambda o, d: f"base_model.model.{d}", "lora_A.weight", "lora_B.weight"),
    "peft in peft": (lambda o, d: f"base_model.model.base_model.model.{d}", "lora_A.weight", "lora_B.weight"),
    "checkpoint": (lambda o, d: f"model.diffusion_model.{o}", "lora_A.weight", "lora_B.weight"),
    "original in diffusers": (lambda o, d: f"transformer.{o}", "lora_A.weight", "lora_B.weight"),
    "old diffusers": (lambda o, d: f"transformer.{d}", "lora.down.weight", "lora.up.weight"),
    "onetrainer": (lambda o, d: "lora_transformer_" + d.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "lycoris": (lambda o, d: "lycoris_" + d.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "compiled": (lambda o, d: f"module._orig_mod.{o}", "lora_A.my_adapter.weight", "lora_B.my_adapter.weight"),
    "dots and underscores": (
        lambda o, d: "lora_unet_" + o.replace(".", "_", 1), "lora_down.weight", "lora_up.weight",
    ),
    "mochi": (lambda o, d: o, "lora_A", "lora_B"),
    "old text encoders": (lambda o, d: d, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_prefix_and_word_is_read_to_the_same_sum(tmp_path, base, form):
    found = reading(save(tmp_path / "x.safetensors", factors(*form)))
    assert_changes(base, found.tree, weights_of(expected()))
    assert found.ranks == {RANK: len(LAYERS)} and not found.left_out


@pytest.mark.parametrize("kind", FLOATS_8)
def test_floats_of_8_bits_are_read_as_what_they_stand_for(tmp_path, base, kind):
    rounded = {name: (8 * x).astype(FLOATS_8[kind]) for name, x in factors().items()}
    plain = {name: x.astype(np.float32) for name, x in rounded.items()}
    trees = [reading(save(tmp_path / f"{i}.safetensors", x)).tree for i, x in enumerate((rounded, plain))]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"r": 2, "lora_alpha": 2, "peft_type": "LORA"}, 1.0),
    ],
)
def test_a_folder_of_peft_is_as_strong_as_its_settings_say(tmp_path, base, settings, strength):
    save(tmp_path / "adapter_model.safetensors", factors(*FORMS["peft"]))
    assert "alpha is taken to be the rank" in reading(tmp_path).notes[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = reading(path)
        assert_changes(base, found.tree, weights_of(expected(strength)))
        assert not found.notes and list(found.strengths) == [pytest.approx(strength)]


def test_a_convolution_over_patches_is_the_linear_layer_here(tmp_path, base):
    a, b = draw(RANK, CONFIG.channels, 1, 2, 2), draw(WIDTH, RANK, 1, 1, 1)
    key = "diffusion_model.patch_embedding"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    found = reading(save(tmp_path / "x.safetensors", factors() | tensors)).tree
    wanted = {"patch_embedding.weight": np.einsum("or,rctyx->octyx", b[:, :, 0, 0, 0], a)}
    assert_changes(base, found, weights_of(expected()) | wanted)
    write_lora(tmp_path / "y.safetensors", found, MODEL, scale=0.5, layout="comfy")
    again = safetensors.numpy.load_file(tmp_path / "y.safetensors")
    np.testing.assert_allclose(again[f"{key}.lora_A.weight"], a)
    np.testing.assert_allclose(again[f"{key}.lora_B.weight"], b, rtol=1e-6)


def speed_changes():
    """Differences as step-distillation LoRA keeps them: key -> (tensor, name of the changed weight, part)."""
    table = {}
    for n in range(CONFIG.depth):
        block = f"blocks.{n}"
        for last, size in (("self_attn.q", WIDTH), ("ffn.0", CONFIG.mlp)):
            table[f"{block}.{last}.diff_b"] = (draw(size, seed=n), f"{block}.{last}.bias", "biases")
        table[f"{block}.cross_attn.norm_k.diff"] = (draw(WIDTH, seed=n), f"{block}.cross_attn.norm_k.weight", "norms")
        table[f"{block}.norm3.diff"] = (draw(WIDTH, seed=n + 5), f"{block}.norm3.weight", "norms")
        table[f"{block}.norm3.diff_b"] = (draw(WIDTH, seed=n + 9), f"{block}.norm3.bias", "norms")
    table["blocks.1.diff_m"] = (draw(1, 6, WIDTH), "blocks.1.modulation", "modulation")
    table["head.modulation.diff"] = (draw(1, 2, WIDTH), "head.modulation", "modulation")
    table["head.head.diff"] = (draw(24, WIDTH), "head.head.weight", "weights")
    return table


def test_differences_of_biases_norms_and_tables_are_held_or_left_out_and_counted(tmp_path, base):
    table = speed_changes()
    path = save(tmp_path / "x.safetensors", factors() | {f"diffusion_model.{k}": x for k, (x, *_) in table.items()})
    found = reading(path)
    wanted = {name: x for x, name, _ in table.values()}
    assert_changes(base, found.tree, weights_of(expected()) | wanted)
    assert found.held == {"biases": 4, "norms": 6, "modulation": 2, "weights": 1}
    some = reading(path, without=("norms", "weights"))
    kept = {name: x for x, name, part in table.values() if part in ("biases", "modulation")}
    assert_changes(base, some.tree, weights_of(expected()) | kept)
    assert {part: len(keys) for part, keys in some.left_out.items()} == {"norms": 6, "weights": 1}
    # And out again, as ComfyUI reads them.
    write_lora(tmp_path / "y.safetensors", found.tree, MODEL, scale=0.5, layout="comfy")
    assert_changes(base, reading(tmp_path / "y.safetensors").tree, weights_of(expected()) | wanted)
    with pytest.raises(ValueError, match="no place in diffusers' layout"):
        write_lora(tmp_path / "z.safetensors", found.tree, MODEL, scale=0.5, layout="diffusers")


def test_differences_alone_are_an_executor(tmp_path, base):
    tensors = {"diffusion_model.blocks.0.norm3.diff": draw(WIDTH)}
    tree = reading(save(tmp_path / "x.safetensors", tensors)).tree
    weights, rest = apply_full(jax.tree.map(jnp.asarray, base), tree)
    assert rest is None and tree.keys() == {DIFFERENCES}
    np.testing.assert_allclose(weights["blocks"]["cross_norm"]["scale"][0] - base["blocks"]["cross_norm"]["scale"][0],
                               draw(WIDTH), atol=1e-6)  # fmt: skip


TEXT = {f"text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_{x}.weight": draw(4, 64) for x in "AB"}
IMAGE = {f"diffusion_model.blocks.0.cross_attn.k_img.lora_{x}.weight": draw(2, 2) for x in "AB"}
IMAGE |= {f"diffusion_model.blocks.0.cross_attn.{x}": draw(2) for x in ("v_img.diff_b", "norm_k_img.diff")}
IMAGE |= {"diffusion_model.img_emb.proj.1.lora_down.weight": draw(2, 2)}
KOHYA_TEXT = {"lora_te_encoder_block_0_layer_0_SelfAttention_q.alpha": draw(1)}


@pytest.mark.parametrize(
    ("more", "part"),
    [(TEXT, "text-encoder"), (KOHYA_TEXT, "text-encoder"), (IMAGE, "image-branch")],
    ids=["text", "kohya", "image"],
)
def test_parts_that_are_not_here_are_named_and_left_out_when_told(tmp_path, base, more, part):
    path = save(tmp_path / "x.safetensors", factors() | more)
    with pytest.raises(TensorFileError, match=f"x.safetensors: it also holds LoRA of the .*--without {part}"):
        reading(path)
    found = reading(path, without=(part,))
    assert_changes(base, found.tree, weights_of(expected()))
    assert {name: set(keys) for name, keys in found.left_out.items()} == {part: set(more)}
    with pytest.raises(TensorFileError, match="no LoRA of a video transformer"):
        reading(save(tmp_path / "y.safetensors", more), without=(part,))


# ---- What is refused

MUSUBI = FORMS["musubi"]
KEY = "diffusion_model." + Q


def of_a_large_model():
    names = [f"diffusion_model.blocks.{n}.self_attn.{x}" for n in range(40) for x in "qkvo"]
    zeros = {"A": np.zeros((1, 5120), np.float32), "B": np.zeros((5120, 1), np.float32)}
    return {f"{name}.lora_{x}.weight": zeros[x] for name in names for x in "AB"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors() | {f"{KEY}.dora_scale": draw(WIDTH, 1)}, "it is a DoRA, .*dora_scale"),
        (factors(*FORMS["peft"]) | {"base_model.model.blocks.0.attn1.to_q.lora_magnitude_vector.weight": draw(WIDTH)},
         "it is a DoRA, .*lora_magnitude_vector"),
        ({"lora_unet_blocks_0_self_attn_q.lokr_w1": draw(4, 4), "lora_unet_blocks_0_self_attn_q.alpha": draw(1)},
         "it is a LoKr, .*lokr_w1"),
        ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": draw(4, 4)}, "it is a LoHa, .*hada_w1_a"),
        (factors() | {f"{KEY}.lora_B.bias": draw(WIDTH)}, r"it is a LoRA with biases .*lora_bias.*q\.lora_B\.bias"),
        ({f"{KEY}.oft_blocks": draw(4, 4)}, "it is an OFT"),
        (factors() | {f"{KEY}.lora_mid.weight": draw(2, 2)}, "LoCon with a core"),
        (factors() | {"transformer.proj_out.modules_to_save.weight": draw(4, 4)}, "whole weights that replace"),
        (of_a_large_model(), "40 blocks of width 5120: a 14B model's; this model has 2 of width 32"),
        (factors() | {f"{KEY}.lora_A.weight": np.full((RANK, WIDTH), np.nan, np.float32)},
         rf"values that are not finite.*{KEY}\.lora_A\.weight"),
        (factors() | {f"{KEY}.alpha": np.float32([np.inf])}, rf"not finite.*{KEY}\.alpha"),
        (factors() | {f"{KEY}.weight": draw(WIDTH, WIDTH)}, "more than LoRA, which would be lost"),
        (factors() | {"diffusion_model.blocks.0.other.diff": draw(3)}, "changes .*other.diff, which this model lacks"),
        (factors() | {"diffusion_model.blocks.0.norm3.diff": draw(3)}, r"other sizes: .*diff is \[3\], not \[32\]"),
        ({k.replace("blocks", "transformer_blocks"): x for k, x in factors().items()}, "it is of another model: none"),
    ],
    ids=["dora", "peft dora", "lokr", "loha", "lora bias", "oft", "locon", "modules to save", "14b", "nan", "inf alpha",
         "whole weights", "unknown difference", "difference of another size", "another model"],
)  # fmt: skip
def test_each_other_kind_is_refused_by_its_name(tmp_path, tensors, message):
    with pytest.raises(TensorFileError, match=f"x.safetensors: .*{message}"):
        reading(save(tmp_path / "x.safetensors", {name: np.atleast_1d(x) for name, x in tensors.items()}))


@pytest.mark.parametrize("settings", [{"peft_type": "LOHA"}, {"use_dora": True}, {"peft_type": "ADALORA"}])
def test_settings_of_another_kind_are_refused(tmp_path, settings):
    save(tmp_path / "adapter_model.safetensors", factors(*FORMS["peft"]))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        TensorFileError, match=f"it is an? {'DoRA' if 'use_dora' in settings else settings['peft_type']}"
    ):
        reading(tmp_path)


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], "x", "neither pytorch_lora_weights.safetensors nor adapter_model.safetensors, but no safetensors file"),
        (["a", "b"], "x", "but 2 safetensors files; name one of them"),
        ([], "owner/name", "hf download owner/name"),
    ],
)
def test_folders_and_hub_names_without_a_file_say_what_to_do(tmp_path, monkeypatch, files, path, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("x").mkdir()
    for name in files:
        save(tmp_path / "x" / f"{name}.safetensors", factors())
    with pytest.raises(TensorFileError, match=message):
        reading(path)
    if files:
        (tmp_path / "x" / "b.safetensors").rename(tmp_path / "x" / "pytorch_lora_weights.safetensors")
        assert reading(path).ranks


# ---- Several, and training


def test_executors_are_added_up_each_times_its_strength(tmp_path, base):
    one = reading(save(tmp_path / "1.safetensors", factors())).tree
    speed = {k: x for k, (x, *_) in speed_changes().items()}
    two = reading(
        save(tmp_path / "2.safetensors", {f"{Q}.lora_A": draw(3, WIDTH), f"{Q}.lora_B": draw(WIDTH, 3)} | speed)
    ).tree
    wanted = weights_of(expected(0.5)) | {name: -2 * x for x, name, _ in speed_changes().values()}
    wanted[f"{Q}.weight"] = wanted[f"{Q}.weight"] - 2 * draw(WIDTH, 3) @ draw(3, WIDTH)
    assert_changes(base, combine([one, two], [0.5, -2.0]), wanted)
    with pytest.raises(ValueError, match="LoRA and full weights"):
        combine([one, {"full": {}}], [1.0, 1.0])


def config_of(**changes):
    return load_config("wan22_5b:debug", {"executor.rank": 2, "executor.alpha": 2.0} | changes)


def fresh_state(config):
    family = build.make_family(config)
    base = jax.eval_shape(family.init_base, jax.random.key(0))
    lora = jax.eval_shape(lambda: family.init_lora(jax.random.key(0), base, rank=config.executor.rank))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    lora = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), lora)
    return family, TrainState(
        step=0, lora=lora, lora_ema=lora, lora_old=lora, opt_state=None, key=None, lora_rolled=None
    )


def test_training_starts_from_a_speed_lora_with_the_flags_that_the_error_prints(tmp_path):
    path = str(save(tmp_path / "x.safetensors", factors() | {f"{Q}.diff_b": draw(WIDTH)}))
    config = config_of(**{"executor.start": path, "executor.targets": "blocks.mlp.up"})
    with pytest.raises(UserError, match="These flags fit it") as caught:
        run_folder.start_from_file(path, config, *fresh_state(config))
    flags = dict(re.findall(r"'--config\.(executor\.\w+)=(.+?)'", str(caught.value)))
    assert flags.keys() == {f"executor.{key}" for key in ("rank", "alpha", "targets", "differences")}
    family, state = fresh_state(config)
    with pytest.raises(UserError, match="These flags fit it"):
        run_folder.check_start(config, tmp_path / "run", family, state)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("{}")  # it has its Executor, whatever became of the file
    run_folder.check_start(config, tmp_path / "begun", family, state)
    config = config_of(**{"executor.start": path} | flags)
    run_folder.check_start(config, tmp_path / "run", *fresh_state(config))
    state = run_folder.start_from_file(path, config, *fresh_state(config))
    found = state.lora[DIFFERENCES]["blocks"]["self_attention"]["q"]["bias"]
    np.testing.assert_allclose(found, np.stack([draw(WIDTH), np.zeros(WIDTH)]))
    config = config_of(**{k: v for k, v in flags.items() if "diff" not in k}, **{"executor.start_without": ("biases",)})
    assert DIFFERENCES not in run_folder.start_from_file(path, config, *fresh_state(config)).lora


def test_a_pattern_of_differences_that_fits_no_weight_is_an_error():
    with pytest.raises(ValueError, match=r"executor.differences 'blocks.nothing' matches no weight"):
        fresh_state(config_of(**{"executor.differences": "blocks.nothing"}))


# ---- The table of names


def test_the_readme_lists_the_names_that_the_reader_knows():
    text = (pathlib.Path(lora_names.__file__).parent / "README.md").read_text()
    for prefix, user in lora_names.PREFIXES.items():
        assert f"| `{prefix}` | {user} |" in text
    for part, meaning in lora_names.LEFT_OUT.items():
        assert f"| `{part}` | {meaning} |" in text
    for kind, _ in lora_names.REFUSED.values():
        assert kind in " ".join(text.split())


def test_every_name_of_a_layer_is_taken_apart():
    for path, names in LORA_NAMES.items():
        for name in names:
            key = f"base_model.model.transformer.{name.format(n=1)}.lora_A.default.weight"
            assert lora_names.parse(key) == (name.format(n=1), "a"), path
