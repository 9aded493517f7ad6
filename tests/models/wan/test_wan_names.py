"""Every tensor of the official checkpoint has its place in our trees, and no other."""

import gzip
import json
import pathlib

import pytest

from world_distill.models.tensor_map import check_names
from world_distill.models.wan.modeling import WanConfig
from world_distill.models.wan.published import transformer_entries, vae_entries
from world_distill.models.wan.vae import VaeConfig

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_every_name_and_shape_of_ti2v_5b_is_mapped(part):
    shapes = json.loads(gzip.decompress((GOLDENS / "ti2v_5b_shapes.json.gz").read_bytes()))[part]
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    entries = list(transformer_entries(WanConfig()) if part == "transformer" else vae_entries(VaeConfig()))
    assert check_names(entries, shapes) == []
    assert len({entry.path for entry in entries}) == len(entries)
