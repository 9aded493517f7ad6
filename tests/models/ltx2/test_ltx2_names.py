"""Every tensor of the official checkpoint has its place in our trees, and no other."""

import dataclasses
import gzip
import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.ltx2.small_ltx2 import CONFIG, CONNECTORS, GOLDENS, connectors, load, network, weights_of
from world_distill.models.lora import kernel_shapes
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig
from world_distill.models.ltx2.published import (
    CONNECTOR_LORA_NAMES,
    LORA_NAMES,
    ORIGINAL_PREFIXES,
    connector_config,
    connector_entries,
    lora_names,
    projection_entry,
    published_configs,
    transformer_config,
    transformer_entries,
)
from world_distill.models.tensor_map import check_names

SIZES = {"joint": LTX2Config(), "off": LTX2Config(audio="off")}


@pytest.fixture(scope="module")
def official():
    parts = json.loads(gzip.decompress((GOLDENS / "ltx2_shapes.json.gz").read_bytes()))
    return {part: {name: tuple(shape) for name, shape in shapes.items()} for part, shapes in parts.items()}


def test_every_name_and_shape_of_the_transformer_is_mapped(official):
    entries = list(transformer_entries(LTX2Config()))
    assert len(official["transformer"]) == 3510
    assert check_names(entries, official["transformer"]) == []
    assert len({entry.path for entry in entries}) == len(entries)


def test_without_audio_the_rest_is_of_audio(official):
    lines = check_names(transformer_entries(LTX2Config(audio="off")), official["transformer"])
    assert len(lines) == 3510 - 48 * (2 * 10 + 4 + 1) - 15
    assert all(line.startswith("unexpected: ") and ("audio" in line or "_a2v_" in line or "av_cross" in line)
               for line in lines)  # fmt: skip


def test_every_name_and_shape_of_the_connectors_is_mapped(official):
    config = ConnectorConfig()
    entries = [*connector_entries(config), projection_entry(config)]
    assert check_names(entries, official["connectors"]) == []
    assert len({entry.path for entry in entries}) == len(entries)


def test_the_map_is_one_to_one():
    _, theirs = load("transformer.npz")
    weights = flatten_dict(weights_of(CONFIG, theirs), sep=".")
    back = {}
    for entry in transformer_entries(CONFIG):
        back |= entry.scatter(weights[entry.path])
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("audio", ["joint", "off"])
def test_every_linear_layer_has_a_name_in_lora_files(audio):
    config = dataclasses.replace(CONFIG, audio=audio)
    made = kernel_shapes(jax.eval_shape(network(config).init, jax.random.key(0)))
    assert made.keys() == lora_names(config).keys()
    assert audio == "off" or lora_names(config) == LORA_NAMES
    assert kernel_shapes(jax.eval_shape(connectors().init, jax.random.key(0))).keys() == CONNECTOR_LORA_NAMES.keys()


def test_original_names_are_those_of_the_original_file():
    """Written out as they stand in the file: some of each kind."""
    prefix = ORIGINAL_PREFIXES["transformer"]
    names = {prefix + name for entry in transformer_entries(CONFIG, "original") for name in entry.names}
    assert names >= {
        f"model.diffusion_model.{name}" for name in (
            "patchify_proj.weight", "audio_patchify_proj.bias", "adaln_single.linear.weight",
            "audio_adaln_single.emb.timestep_embedder.linear_1.weight", "av_ca_a2v_gate_adaln_single.linear.bias",
            "av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_2.bias", "scale_shift_table",
            "audio_scale_shift_table", "transformer_blocks.1.scale_shift_table_a2v_ca_video",
            "transformer_blocks.0.scale_shift_table_a2v_ca_audio", "transformer_blocks.1.attn1.q_norm.weight",
            "transformer_blocks.0.video_to_audio_attn.k_norm.weight", "transformer_blocks.1.audio_attn2.to_out.0.bias",
            "transformer_blocks.0.ff.net.0.proj.weight", "caption_projection.linear_1.weight", "audio_proj_out.weight",
        )
    }  # fmt: skip
    original = dataclasses.replace(CONNECTORS, depth=2)
    names = {
        ORIGINAL_PREFIXES["connectors"] + name for e in connector_entries(original, "original") for name in e.names
    }
    assert names >= {
        "model.diffusion_model.video_embeddings_connector.learnable_registers",
        "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.1.attn1.q_norm.weight",
        "model.diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.ff.net.2.bias",
    }
    [projection] = projection_entry(CONNECTORS, "original").names
    assert ORIGINAL_PREFIXES["projection"] + projection == "text_embedding_projection.aggregate_embed.weight"


@pytest.mark.torch
def test_diffusers_renames_the_original_names_to_its_own():
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers as rename_lora
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers as rename

    entries = zip(transformer_entries(CONFIG), transformer_entries(CONFIG, "original"), strict=True)
    pairs = [pair for ours, theirs in entries for pair in zip(ours.names, theirs.names, strict=True)]
    renamed = rename({ORIGINAL_PREFIXES["transformer"] + name: own for own, name in pairs})
    assert renamed == {own: own for own, _ in pairs}
    layers = [tuple(name.format(n=1) for name in names) for names in LORA_NAMES.values()]
    renamed = rename_lora({f"diffusion_model.{name}.lora_A.weight": own for own, name in layers})
    assert renamed == {f"transformer.{own}.lora_A.weight": own for own, _ in layers}


def test_diffusers_script_renames_the_connectors():
    """By the table of its conversion script, which is no part of its package."""
    table = {
        "video_embeddings_connector": "video_connector", "audio_embeddings_connector": "audio_connector",
        "transformer_1d_blocks": "transformer_blocks", "q_norm": "norm_q", "k_norm": "norm_k",
    }  # fmt: skip
    for ours, theirs in zip(connector_entries(CONNECTORS), connector_entries(CONNECTORS, "original"), strict=True):
        assert re.sub("|".join(table), lambda match: table[match[0]], theirs.name) == ours.name


def test_sizes_make_the_way_through_a_config_file():
    network = dataclasses.replace(
        CONFIG, fps=LTX2Config.fps, remat=LTX2Config.remat, eps=1e-5, theta=77.0, stride=(4, 8, 16)
    )
    text = dataclasses.replace(CONNECTORS, length=ConnectorConfig.length, places=12, theta=3.0)
    configs = published_configs(network, text)
    assert transformer_config(configs["transformer"]) == network
    assert connector_config(configs["connectors"]) == text
    assert transformer_config(configs["transformer"], "off") == dataclasses.replace(network, audio="off")
    for part, read in (("transformer", transformer_config), ("connectors", connector_config)):
        with pytest.raises(ValueError, match="audio_gated_attn = True; only False"):  # LTX-2.3
            read(configs[part] | {"audio_gated_attn": True})
        with pytest.raises(ValueError, match="rope_type = interleaved"):
            read({key: value for key, value in configs[part].items() if key != "rope_type"})
    with pytest.raises(ValueError, match="cross_attention_dim = 4; only 40"):
        transformer_config(configs["transformer"] | {"cross_attention_dim": 4})
    with pytest.raises(ValueError, match="two alike"):
        connector_config(configs["connectors"] | {"audio_connector_num_layers": 8})


@pytest.mark.torch
def test_diffusers_builds_networks_of_our_names_from_our_config_files():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    import torch
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    configs = published_configs(LTX2Config(), ConnectorConfig())
    with torch.device("meta"):
        transformer = diffusers.LTX2VideoTransformer3DModel.from_config(configs["transformer"])
        text = LTX2TextConnectors.from_config(configs["connectors"])
    assert check_names(transformer_entries(LTX2Config()), shapes_of(transformer)) == []
    both = [*connector_entries(ConnectorConfig()), projection_entry(ConnectorConfig())]
    assert check_names(both, shapes_of(text)) == []
    # What we do not write is diffusers' default, and what we write is LTX-2's.
    assert transformer_config(dict(transformer.config)) == LTX2Config()
    assert connector_config(dict(text.config)) == ConnectorConfig()


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
