"""A merged LTX-2 has the text projection, which its base does not hold: the right one, or a line says what to do."""

import dataclasses
import re
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from tests.models.ltx2.published_ltx2 import LAYOUT, draw, originals, save_folder, save_single
from world_distill.errors import UserError
from world_distill.storage.safetensors_folder import digest
from world_distill.weights.apart import Apart, find_apart
from world_distill.weights.merged_model import check_target, write_merged

NAME = "text_proj_in.weight"
FAMILY = types.SimpleNamespace(name="ltx2", published=LAYOUT, adapted="transformer", lora_scale=1.0)
WEIGHTS = draw()
WANTED = WEIGHTS["connectors"][NAME]
OTHER = draw(1)
BASE = {"source": "nowhere/LTX-2", "text_weights": digest(WANTED)}


def config_of(base="weights/ltx2", **model):
    return ConfigDict({"base": str(base), "model": {"text_encoder": "", "text_projection": ""} | model})


def read(path):
    part, _, rest = path.partition(".")
    [entry] = [entry for entry in LAYOUT.entries()[part] if entry.path == rest]
    return entry.gather(WEIGHTS[part].__getitem__)


def merged(out, found, **options):
    return write_merged(out, FAMILY, read, {}, apart=found.tensors, **options)


def assert_found(found, tensor=WANTED):
    assert not found.missing
    np.testing.assert_array_equal(found.tensors["connectors"][NAME], tensor)


def test_it_is_found_wherever_the_run_or_the_base_names_it(tmp_path):
    folder, single = save_folder(tmp_path / "published", WEIGHTS), tmp_path / "single.safetensors"
    save_single(single, originals(WEIGHTS))
    for source in (folder, single):
        assert_found(find_apart(LAYOUT, config_of(), BASE, source))
        assert_found(find_apart(LAYOUT, config_of(text_encoder=str(source)), BASE))
        assert_found(find_apart(LAYOUT, config_of(text_projection=str(source)), BASE))
        assert_found(find_apart(LAYOUT, config_of(), BASE | {"source": str(source)}))
        assert_found(find_apart(LAYOUT, config_of(), {}, source))  # of a base without a digest


def test_that_of_a_merge_is_taken_and_not_that_of_the_source(tmp_path):
    other = save_folder(tmp_path / "dev", OTHER)
    save_file({NAME: WANTED}, tmp_path / "base.text_projection.safetensors")
    beside = {"beside": {"text_projection": "base.text_projection.safetensors"}}
    for base in (BASE | beside, beside):
        assert_found(find_apart(LAYOUT, config_of(tmp_path / "base"), base, other))
    (tmp_path / "base.text_projection.safetensors").unlink()
    [line] = find_apart(LAYOUT, config_of(tmp_path / "base"), BASE | beside, other).missing
    assert f"that of {other}/connectors is another one (digest {digest(OTHER['connectors'][NAME])}, not" in line
    # Without a digest nothing tells which one the source has; an earlier merge's file alone is trusted.
    assert find_apart(LAYOUT, config_of(tmp_path / "base", text_encoder=str(other)), beside).missing


def test_what_is_missing_is_said_with_the_remedy(tmp_path):
    [line] = find_apart(LAYOUT, config_of(), BASE).missing
    assert line.startswith(f"connectors/ lacks {NAME}") and "with --source" in line
    (tmp_path / "broken.safetensors").write_text("no tensors")
    save_file({NAME: WANTED[:3]}, tmp_path / "small.safetensors")
    save_file({"x": WANTED}, tmp_path / "x.safetensors")
    for name, words in (("broken", "no whole"), ("small", r"is \[3, 72\], not"), ("x", "has none")):
        [line] = find_apart(LAYOUT, config_of(), BASE, tmp_path / f"{name}.safetensors").missing
        assert re.search(words, line)
    without = types.SimpleNamespace(apart=dict)
    with pytest.raises(UserError, match="name the folder of the whole pipeline"):
        find_apart(without, config_of(), {}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no model_index.json there"):
        check_target(tmp_path / "out", tmp_path / "nowhere")


def test_a_network_without_audio_makes_no_whole_model(tmp_path):
    network = dataclasses.replace(LAYOUT.network, audio="off")
    layout, folder = dataclasses.replace(LAYOUT, network=network), save_folder(tmp_path / "published", WEIGHTS)
    [line] = find_apart(layout, config_of(), BASE, folder).missing
    assert "model.audio = off" in line and "--format diffusers" in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_holds_every_published_tensor(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("world_distill.weights.merged_model.SHARD_BYTES", 40_000)  # several files
    found = Apart({"connectors": {NAME: WANTED}})
    summary = merged(tmp_path / "out", found, dtype=dtype)
    assert summary["tensors"] == sum(map(len, WEIGHTS.values()))
    for part, tensors in WEIGHTS.items():
        files = list((tmp_path / "out" / part).glob("*.safetensors"))
        have = {name: x for file in files for name, x in load_file(file).items()}
        assert len(files) > 1 and have.keys() == tensors.keys()
        for name, x in tensors.items():
            np.testing.assert_array_equal(have[name], x.astype(have[name].dtype), err_msg=name)
            assert have[name].dtype == dtype


def test_a_source_that_is_a_file_is_not_copied(tmp_path):
    save_file({NAME: WANTED}, tmp_path / "x.safetensors")
    found = find_apart(LAYOUT, config_of(), BASE, tmp_path / "x.safetensors")
    merged(tmp_path / "out", found, source=tmp_path / "x.safetensors")
    assert {path.name for path in (tmp_path / "out").iterdir()} == WEIGHTS.keys()


@pytest.mark.torch
def test_diffusers_loads_the_connectors_with_no_key_missing(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    def load(name, found):
        merged(tmp_path / name, found)
        return LTX2TextConnectors.from_pretrained(tmp_path / name / "connectors", output_loading_info=True)

    folder = save_folder(tmp_path / "published", WEIGHTS)
    network, info = load("whole", find_apart(LAYOUT, config_of(), BASE, folder))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert network.state_dict().keys() == WEIGHTS["connectors"].keys()
    for name, x in network.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), WEIGHTS["connectors"][name], err_msg=name)
    assert load("without", Apart())[1]["missing_keys"] == [NAME]
