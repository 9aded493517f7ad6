"""Every tensor of the published autoencoder has its place in our tree, and no other, under both its names."""

import gzip
import json
import re

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.ltx2.small_vae import CONFIG, GOLDENS
from world_distill.models.ltx2.vae import VaeConfig
from world_distill.models.ltx2.vae_tensors import (
    UNUSED,
    original_vae_config,
    published_vae_config,
    vae_config,
    vae_entries,
)
from world_distill.models.tensor_map import assemble, check_names

FULL = VaeConfig()


def official():
    shapes = json.loads(gzip.decompress((GOLDENS / "vae_19b_shapes.json.gz").read_bytes()))["vae"]
    return {name: tuple(shape) for name, shape in shapes.items()}


def original_shapes(config):
    return {name: entry.shape for entry in vae_entries(config, "original") for name in entry.names}


def test_every_name_and_shape_of_19b_is_mapped():
    entries = list(vae_entries(FULL))
    assert check_names(entries, official()) == []
    assert len({entry.path for entry in entries}) == len(entries)


def test_tensors_come_back_from_our_tree_as_they_were():
    rng = np.random.default_rng(0)
    entries = list(vae_entries(CONFIG))
    tensors = {n: rng.normal(size=e.shape).astype(np.float32) for e in entries for n in e.names}
    tree = flatten_dict(assemble(entries, tensors), sep=".")
    back = {name: x for entry in entries for name, x in entry.scatter(tree[entry.path]).items()}
    assert back.keys() == tensors.keys()
    assert all((back[name] == tensors[name]).all() for name in tensors)


def test_original_names_are_those_of_the_single_file():
    names = original_shapes(FULL)
    assert len(names) == len(official())
    for name, shape in {
        "encoder.conv_in.conv.weight": (128, 48, 3, 3, 3),
        "encoder.down_blocks.0.res_blocks.3.conv2.conv.bias": (128,),
        "encoder.down_blocks.3.conv.conv.weight": (256, 256, 3, 3, 3),
        "encoder.down_blocks.8.res_blocks.1.conv1.conv.weight": (2048, 2048, 3, 3, 3),
        "decoder.up_blocks.0.res_blocks.4.conv1.conv.weight": (1024, 1024, 3, 3, 3),
        "decoder.up_blocks.1.conv.conv.weight": (4096, 1024, 3, 3, 3),
        "decoder.up_blocks.6.res_blocks.0.conv2.conv.weight": (128, 128, 3, 3, 3),
        "per_channel_statistics.mean-of-means": (128,),
        "per_channel_statistics.std-of-means": (128,),
    }.items():
        assert names[name] == shape
    paths = {entry.path: entry.name for entry in vae_entries(FULL, "original")}
    assert paths["mean"] == "per_channel_statistics.mean-of-means"
    assert paths["encoder.middle.conv1.kernel"] == "encoder.down_blocks.8.res_blocks.{n}.conv1.conv.weight"
    rest = ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
    assert all(re.fullmatch(UNUSED, f"per_channel_statistics.{name}") for name in rest)
    assert not any(re.fullmatch(UNUSED, name) for name in names)


@pytest.mark.parametrize("config", [FULL, CONFIG], ids=["full", "small"])
def test_sizes_are_read_from_both_layouts(config):
    assert vae_config(published_vae_config(config)) == config
    assert original_vae_config(original_shapes(config) | {"per_channel_statistics.channel": (4,)}) == config


@pytest.mark.parametrize(
    "change",
    [
        {"timestep_conditioning": True},
        {"decoder_causal": True},
        {"decoder_spatial_padding_mode": "zeros"},  # 2.3
        {"upsample_type": ["spatiotemporal", "temporal", "spatial"]},
        {"upsample_residual": [False, False, False]},
        {"decoder_inject_noise": [True, False, False, False]},
    ],
)
def test_other_networks_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        vae_config(published_vae_config(FULL) | change)


def test_diffusers_default_decoder_is_refused():
    config = published_vae_config(FULL)
    del config["decoder_causal"]  # diffusers takes it for True
    with pytest.raises(ValueError, match="decoder_causal"):
        vae_config(config)


def test_other_tensors_are_refused():
    shapes = original_shapes(FULL)
    del shapes["encoder.down_blocks.5.conv.conv.weight"]
    with pytest.raises(ValueError, match=r"encoder\.down_blocks\.5"):
        original_vae_config(shapes)


@pytest.mark.torch
def test_names_are_those_that_diffusers_reads():
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    from diffusers.loaders.single_file_utils import convert_ltx2_vae_to_diffusers

    from tests.models.ltx2.make_vae_goldens import FULL as PUBLISHED
    from tests.models.ltx2.make_vae_goldens import official_shapes

    shapes = {name: tuple(shape) for name, shape in official_shapes()["vae"].items()}
    assert shapes == official()  # on the meta device, today
    assert vae_config(PUBLISHED | {"decoder_causal": False}) == FULL
    # Not by shape alone: each original name has to become the name of the same entry.
    pairs = zip(vae_entries(FULL), vae_entries(FULL, "original"), strict=True)
    expected = {f"vae.{theirs}": ours for a, b in pairs for ours, theirs in zip(a.names, b.names, strict=True)}
    renamed = convert_ltx2_vae_to_diffusers({name: name for name in expected})
    assert renamed == {ours: theirs for theirs, ours in expected.items()}
