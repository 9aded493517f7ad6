"""LoRA files, to diffusers and back: what the Executor computes is what diffusers computes with its file."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.models.wan.small_wan import CONFIG, MODEL, check_gradients, inputs, load, network, random_lora
from world_distill.models.wan.published import LORA_NAMES
from world_distill.weights.lora_files import FILE_NAME, read_lora, write_lora

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="torch is in the extra `torch`")
diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
peft = pytest.importorskip("peft", reason="peft is in the extra `torch`")

from tests.models.wan import make_goldens  # noqa: E402 (needs torch)

ALL = "|".join(path.replace(".", r"\.") for path in LORA_NAMES)
NO_PATCH = ALL.removeprefix("patch|")  # diffusers reads patch_embedding under its own names alone
SOME = r"blocks\.self_attention\.(q|out)|blocks\.mlp\.up|time_table"
BLOCKS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # as PEFT's users name them
SCALE = 0.7
OUTER = ["linear_1", "linear_2", "time_proj", "proj_out"]


@pytest.fixture(scope="module")
def golden():
    return load("transformer_3x4x6.npz")


@pytest.fixture(scope="module")
def ours(golden):
    arrays, weights, _ = golden
    return jax.jit(lambda lora: network(CONFIG)(weights, *inputs(arrays), lora, SCALE))


@pytest.fixture
def pipeline(golden):
    """A pipeline of nothing but the transformer, without LoRA."""
    model = diffusers.WanTransformer3DModel(**make_goldens.TRANSFORMER).eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in golden[2].items()})
    return diffusers.WanImageToVideoPipeline(None, None, None, None, transformer=model)


def velocity(pipeline, arrays):
    """What diffusers computes, channels last."""
    x, times, text = inputs(arrays)
    by_token = np.repeat(1000 * np.asarray(times), x.shape[2] * x.shape[3] // 4, axis=1)
    with torch.no_grad():
        v = pipeline.transformer(*(torch.from_numpy(np.array(y)) for y in (arrays["x"], by_token, text)))
    return np.moveaxis(v.sample.numpy(), 1, -1)


def assert_same_and_not_base(found, expected, golden):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.abs(expected - np.moveaxis(golden[0]["v"], 1, -1)).max() > 0.1  # without LoRA


def redraw_factors(model, seed=0):
    """Random factors; velocities stay near those of the base, for float32 to keep within the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                size = (0.3 if "lora_B" in name else 1) / factor.shape[1] ** 0.5
                factor.copy_(size * torch.randn(factor.shape, generator=generator))


# ---- Ours in diffusers


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
@pytest.mark.parametrize("targets", [ALL, SOME], ids=["all", "some"])
def test_diffusers_loads_our_file_in_either_layout(tmp_path, golden, ours, pipeline, layout, targets):
    targets = NO_PATCH if targets == ALL and layout == "comfy" else targets
    lora = random_lora(golden[1], targets=targets)
    write_lora(tmp_path / FILE_NAME, lora, MODEL, scale=SCALE, layout=layout)
    pipeline.load_lora_weights(tmp_path)
    assert_same_and_not_base(velocity(pipeline, golden[0]), ours(lora), golden)


def test_layers_of_several_ranks_keep_their_strength(tmp_path, golden, ours, pipeline):
    lora = random_lora(golden[1], targets=SOME, rank=4) | random_lora(golden[1], targets="head|text_in", rank=2)
    write_lora(tmp_path / FILE_NAME, lora, MODEL, scale=SCALE, layout="diffusers")
    pipeline.load_lora_weights(tmp_path)
    assert_same_and_not_base(velocity(pipeline, golden[0]), ours(lora), golden)


def test_bfloat16_is_the_same_lora_rounded(tmp_path, golden, ours, pipeline):
    lora = random_lora(golden[1], targets=SOME)
    write_lora(tmp_path / FILE_NAME, lora, MODEL, scale=SCALE, layout="diffusers", dtype="bfloat16")
    pipeline.load_lora_weights(tmp_path)
    rounded = read_lora(tmp_path / FILE_NAME, MODEL, scale=SCALE).tree
    assert_same_and_not_base(velocity(pipeline, golden[0]), ours(rounded), golden)


# ---- Theirs in ours

TRAINED = {
    "alpha twice the rank": {"r": 4, "lora_alpha": 8, "target_modules": BLOCKS + OUTER},
    "alpha below the rank": {"r": 4, "lora_alpha": 1, "target_modules": ["to_q", "to_v"]},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "target_modules": BLOCKS, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "target_modules": BLOCKS,
                 "rank_pattern": {"to_q": 2, "blocks.1.attn1.to_k": 6},
                 "alpha_pattern": {"ffn.net.2": 3, "blocks.0.attn1.to_out.0": 1, "to_q": 5}},
    "one block": {"r": 4, "lora_alpha": 8, "target_modules": ["blocks.1.attn2.to_k", "blocks.1.ffn.net.0.proj"]},
}  # fmt: skip


@pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("way", ["pipeline", "model"])
def test_we_read_what_diffusers_saves(tmp_path, golden, ours, pipeline, settings, way):
    model = pipeline.transformer
    model.add_adapter(peft.LoraConfig(**settings))
    redraw_factors(model)
    if way == "model":
        model.save_lora_adapter(tmp_path)
    else:
        layers = peft.get_peft_model_state_dict(model)
        metadata = diffusers.training_utils._collate_lora_metadata({"transformer": model})
        pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    lora = read_lora(tmp_path / FILE_NAME, MODEL, scale=SCALE).tree
    assert_same_and_not_base(ours(lora), velocity(pipeline, golden[0]), golden)


@pytest.mark.parametrize(
    "prefix, parts",
    [("diffusion_model.", ("lora_A", "lora_B")), ("diffusion_model.", ("lora_down", "lora_up")),
     ("lora_unet_", ("lora_down", "lora_up"))],
)  # fmt: skip
def test_both_read_alpha_in_the_original_layout(tmp_path, golden, ours, pipeline, prefix, parts):
    blocks = "|".join(path.replace(".", r"\.") for path in LORA_NAMES if path.startswith("blocks."))
    path = tmp_path / FILE_NAME
    write_lora(path, random_lora(golden[1], targets=blocks, rank=4), MODEL, scale=1.0, layout="comfy")
    tensors = {}
    for key, tensor in safetensors.numpy.load_file(path).items():
        layer, part = key.removeprefix("diffusion_model.").split(".lora_")
        layer = prefix + (layer.replace(".", "_") if prefix == "lora_unet_" else layer)
        tensors[f"{layer}.{parts[part.startswith('B')]}.weight"] = tensor
        tensors[f"{layer}.alpha"] = np.array(6, np.float32)
    safetensors.numpy.save_file(tensors, path)
    pipeline.load_lora_weights(tmp_path)
    lora = read_lora(path, MODEL, scale=SCALE).tree
    assert_same_and_not_base(ours(lora), velocity(pipeline, golden[0]), golden)


# ---- Gradients


def test_gradients_of_all_layers_are_those_of_torch(golden):
    lora = {"r": 4, "lora_alpha": 6, "target_modules": BLOCKS + OUTER}
    arrays, weights, theirs = golden
    full = arrays | {f"w:{name}": x for name, x in theirs.items()}
    check_gradients(weights, arrays, make_goldens.lora_gradients(full, seed=11, lora=lora), alpha=6, rank=4)
