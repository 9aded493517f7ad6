"""LoRA files: what is written comes back, what others write is understood, and the rest is refused by name."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.models.wan.small_wan import MODEL, load, random_lora
from world_distill.models.wan.published import LORA_NAMES
from world_distill.storage.safetensors_folder import TensorFileError
from world_distill.weights.lora_files import read_lora, write_lora
from world_distill.weights.lora_layouts import METADATA_KEY

ALL = "|".join(path.replace(".", r"\.") for path in LORA_NAMES)
ATTENTION = r"blocks\.(self|cross)_attention\.(q|k|v|out)"
Q = "transformer.blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def weights():
    return load("transformer_3x4x6.npz")[1]


def read(path, scale=1.0):
    return read_lora(path, MODEL, scale=scale).tree


def save(path, tensors, **settings):
    """A file as PEFT's users save it; settings go into the header."""
    metadata = {METADATA_KEY: json.dumps(settings)} if settings else None
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata=metadata)
    return path


def pair(layer, rank=2, i=32, o=32, seed=0):
    """lora_A and lora_B of a layer, and their product as a change of our kernel."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, i)).astype(np.float32), rng.normal(size=(o, rank)).astype(np.float32)
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, (b @ a).T


def products(lora, scale):
    """Path -> change of the kernel."""
    flat = jax.tree_util.tree_leaves_with_path(lora, is_leaf=lambda x: x.keys() == {"a", "b"})
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): scale * factors["a"] @ factors["b"] for path, factors in flat}


def assert_same_change(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        np.testing.assert_allclose(found[path], change, atol=atol * np.abs(change).max(), err_msg=path)


# ---- What is written


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
@pytest.mark.parametrize("targets", [ALL, ATTENTION, "text_in"])
def test_what_is_written_comes_back(tmp_path, weights, layout, targets):
    lora = random_lora(weights, targets=targets)
    write_lora(tmp_path / "x.safetensors", lora, MODEL, scale=1.7, layout=layout)
    assert_same_change(products(read(tmp_path / "x.safetensors", 1.7), 1.7), products(lora, 1.7))
    assert_same_change(products(read(tmp_path / "x.safetensors", 0.5), 0.5), products(lora, 1.7))


def test_bfloat16_halves_the_file_and_loses_what_it_must(tmp_path, weights):
    lora = random_lora(weights, targets=ATTENTION)
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, MODEL, scale=0.3, layout="comfy", dtype="bfloat16")
    assert {x.dtype for x in safetensors.numpy.load_file(path).values()} == {np.dtype(ml_dtypes.bfloat16)}
    expected = {
        "a": lora["blocks"]["self_attention"]["q"]["a"].astype(ml_dtypes.bfloat16),
        "b": (np.float32(0.3) * lora["blocks"]["self_attention"]["q"]["b"]).astype(ml_dtypes.bfloat16),
    }
    found = read(path)["blocks"]["self_attention"]["q"]
    for part in "ab":
        assert found[part].dtype == np.float32
        np.testing.assert_array_equal(found[part], expected[part].astype(np.float32))


@pytest.mark.parametrize(
    "layout, q, head", [("diffusers", Q, "transformer.proj_out"),
                        ("comfy", "diffusion_model.blocks.0.self_attn.q", "diffusion_model.head.head")],
)  # fmt: skip
def test_names_orientation_and_scale_are_those_of_the_layout(tmp_path, weights, layout, q, head):
    lora = random_lora(weights, targets=r"blocks\.self_attention\.q|head")
    write_lora(tmp_path / "x.safetensors", lora, MODEL, scale=2.0, layout=layout)
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    layers = (q, q.replace("0", "1"), head)
    assert found.keys() == {f"{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    factors = lora["blocks"]["self_attention"]["q"]
    np.testing.assert_array_equal(found[f"{q}.lora_A.weight"], factors["a"][0].T)
    np.testing.assert_array_equal(found[f"{q}.lora_B.weight"], 2 * factors["b"][0].T)
    np.testing.assert_array_equal(found[f"{head}.lora_B.weight"], 2 * lora["head"]["b"].T)


def test_the_header_says_that_alpha_is_the_rank(tmp_path, weights):
    lora = random_lora(weights, targets=r"blocks\.self_attention\.q") | random_lora(weights, targets="head", rank=2)
    write_lora(tmp_path / "x.safetensors", lora, MODEL, scale=2.0, layout="diffusers", metadata={"base": "wan"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["base"] == "wan"
    assert json.loads(metadata[METADATA_KEY]) == {
        "transformer.r": 3, "transformer.lora_alpha": 3,
        "transformer.rank_pattern": {"^proj_out": 2}, "transformer.alpha_pattern": {"^proj_out": 2},
        "transformer.target_modules": ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "proj_out"],
    }  # fmt: skip
    assert_same_change(products(read(tmp_path / "x.safetensors"), 1.0), products(lora, 2.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora": {"full": {}}}, "a full Executor is no LoRA"),
        ({"lora": {"other": {"a": np.ones((24, 2)), "b": np.ones((2, 32))}}}, "layer other has no name in LoRA files"),
        ({"layout": "kohya"}, "layout diffusers or comfy"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
    ],
)
def test_what_no_file_can_hold_is_refused(tmp_path, weights, change, message):
    arguments = {"lora": random_lora(weights, targets="head"), "layout": "comfy"} | change
    with pytest.raises(ValueError, match=message):
        write_lora(tmp_path / "x.safetensors", model=MODEL, scale=1.0, **arguments)
    assert not list(tmp_path.iterdir())


# ---- What others write


@pytest.mark.parametrize(
    "layer",
    [Q, "blocks.0.attn1.to_q", "blocks.0.self_attn.q", "diffusion_model.blocks.0.self_attn.q",
     "lora_unet_blocks_0_self_attn_q"],
)  # fmt: skip
@pytest.mark.parametrize(
    "parts", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.default", "lora_B.default")]
)
def test_every_usual_name_is_known(tmp_path, layer, parts):
    tensors, change = pair(layer)
    renamed = {k.replace("lora_A", parts[0]).replace("lora_B", parts[1]): v for k, v in tensors.items()}
    found = products(read(save(tmp_path / "x.safetensors", renamed)), 1.0)
    np.testing.assert_allclose(found["blocks.self_attention.q"][0], change, atol=1e-5)


@pytest.mark.parametrize(
    "extra, settings, strength",
    [
        ({}, {}, 1.0),
        ({f"{Q}.alpha": np.float32(8.0)}, {}, 4.0),
        ({f"{Q}.alpha": np.array([1], ml_dtypes.bfloat16)}, {"lora_alpha": 8}, 0.5),
        ({}, {"transformer.r": 2, "transformer.lora_alpha": 8}, 4.0),
        ({}, {"r": 2, "lora_alpha": 8}, 4.0),
        ({}, {"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({}, {"lora_alpha": 8, "alpha_pattern": {"^blocks.1": 2, "attn1.to_q": 6}}, 3.0),
        ({}, {"lora_alpha": 8, "alpha_pattern": {"to_k": 6, "q": 6, "^blocks.0": 6}}, 4.0),
    ],
)
def test_alpha_is_what_the_file_says(tmp_path, extra, settings, strength):
    tensors, change = pair(Q)
    path = save(tmp_path / "x.safetensors", tensors | extra, **settings)
    found = products(read(path, 0.25), 0.25)["blocks.self_attention.q"]
    np.testing.assert_allclose(found[0], strength * change, atol=1e-5 * np.abs(strength * change).max())


def test_other_ranks_and_absent_blocks_become_zeros(tmp_path):
    first, change = pair("transformer.blocks.1.attn2.to_v", rank=2)
    second, other = pair("transformer.proj_out", rank=5, o=24)
    lora = read(save(tmp_path / "x.safetensors", first | second))
    v = lora["blocks"]["cross_attention"]["v"]
    assert lora.keys() == {"blocks", "head"} and lora["blocks"].keys() == {"cross_attention"}
    assert v["a"].shape == (2, 32, 5) and v["b"].shape == (2, 5, 32) and lora["head"]["a"].shape == (32, 5)
    assert not v["a"][0].any() and not v["b"][0].any() and not v["a"][1, :, 2:].any() and not v["b"][1, 2:].any()
    np.testing.assert_allclose(v["a"][1] @ v["b"][1], change, atol=1e-5)
    np.testing.assert_allclose(lora["head"]["a"] @ lora["head"]["b"], other, atol=1e-5)


# ---- What is refused


def without(tensors, part):
    return {key: tensor for key, tensor in tensors.items() if part not in key}


GOOD = pair(Q)[0]
OTHERS = {key: x for n in range(3) for key, x in pair(f"transformer.transformer_blocks.{n}.attn1.to_q")[0].items()}


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "it holds no LoRA of a video transformer, but nothing"),
        ({"blocks.0.attn1.to_q.weight": np.ones((32, 32))}, r"holds no LoRA .* but blocks\.0\.attn1\.to_q\.weight"),
        ({f"{Q}.alpha": np.float32(1)}, "holds no LoRA"),
        (OTHERS, r"another model: none of its .*transformer_blocks\.0\.attn1\.to_q\.lora_A.* and 2 more"),
        (GOOD | OTHERS, r"another model: not all .*transformer_blocks\.0\.attn1\.to_q\.lora_A.* and 2 more"),
        (pair("transformer.blocks.2.attn1.to_q")[0], "other sizes: 3 blocks of width 32; this model has 2 of width 32"),
        (GOOD | pair("transformer_2.blocks.0.attn1.to_q")[0], "another model: not all .*transformer_2"),
        (GOOD | {"transformer.blocks.1.attn1.to_q.alpha": np.float32(1)}, r"one factor .*blocks\.1.*\.alpha"),
        (GOOD | {f"{Q}.lora_B.bias": np.ones(32)}, r"LoRA with biases of its own.*to_q\.lora_B\.bias"),
        (GOOD | {f"{Q}.lora_magnitude_vector": np.ones(32)}, "it is a DoRA.*lora_magnitude_vector"),
        (pair(Q, i=64)[0], "other sizes: 1 block of width 64; this model has 2 of width 32"),
        (pair(Q, o=64)[0], r"other sizes: .*with \[64, 2\] where .* with \[32, r\]"),
        (without(GOOD, "_B") | without(pair(Q, rank=3)[0], "_A"), r"other sizes: .*\[2, 32\] with \[32, 3\]"),
        (pair(Q, rank=0)[0], r"other sizes: .*\[0, 32\]"),
        (without(GOOD, "_A"), r"one factor without the other.*to_q\.lora_B\.weight"),
        (without(GOOD, "_B"), r"one factor without the other.*to_q\.lora_A\.weight"),
        (GOOD | pair("diffusion_model.blocks.0.self_attn.q")[0], "same thing under two names.*lora_A"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_this_model_is_refused(tmp_path, tensors, message):
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(TensorFileError, match=f"{path}: .*{message}"):
        read(path)


def test_all_layers_that_do_not_fit_are_counted(tmp_path):
    tensors = {k: x for n in range(2) for p in "qkv" for k, x in pair(f"blocks.{n}.attn1.to_{p}", o=48)[0].items()}
    with pytest.raises(TensorFileError, match=r"to_k\.lora_A.*to_v\.lora_A.* and 2 more$"):
        read(save(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_settings_that_cannot_be_read_are_refused(tmp_path, text):
    safetensors.numpy.save_file(GOOD, tmp_path / "x.safetensors", metadata={METADATA_KEY: text})
    with pytest.raises(TensorFileError, match="lora_adapter_metadata, which says how strong it is"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 a pickle in a zip", "cut"])
def test_what_is_no_whole_file_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content == "cut":
        save(path, GOOD)
        content = path.read_bytes()[:-8]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TensorFileError, match="no whole safetensors file"):
        read(path)


def test_a_tensor_of_an_unknown_type_is_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(TensorFileError, match="a type that cannot be read"):
        read(path)
