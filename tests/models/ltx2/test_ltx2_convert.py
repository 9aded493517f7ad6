"""A small LTX-2 in diffusers' layout, converted, compared with diffusers, and read with and without its audio."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill import build, cli
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.models.ltx2.text import projection_digest
from world_distill.settings.loading import load_config
from world_distill.storage import array_store
from world_distill.weights import base_model

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published layout, every parameter drawn."""
    pytest.importorskip("diffusers")
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    from tests.models.ltx2 import make_goldens, make_vae_goldens

    folder = tmp_path_factory.mktemp("published") / "tiny-ltx2"
    network = make_goldens.TRANSFORMER | {"in_channels": 4, "out_channels": 4, "caption_channels": 24}
    parts = {
        "transformer": make_goldens.redraw(diffusers.LTX2VideoTransformer3DModel(**network), 1),
        "connectors": make_goldens.redraw(LTX2TextConnectors(**make_goldens.CONNECTORS), 2),
        "vae": make_vae_goldens.codec(3),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def converted(folder):
    out = folder.parent / "converted"
    assert cli.main(["convert", str(folder), str(out), "--verify"]) == 0
    return out


def config_of(converted, **changes):
    """The config of this model: what `convert` says its sizes are."""
    sizes = array_store.describe(converted)[1]["model"]
    config = load_config("ltx2:debug", {"base": str(converted), "model.size": (64, 64)})
    with config.unlocked():
        for key, value in sizes.items():
            config.model[key] = value
    config.update_from_flattened_dict(changes)
    return config


def test_numbers_are_those_of_diffusers(converted, capsys, folder):
    assert cli.main(["convert", str(folder), str(converted), "--verify"]) == 0  # there already: compares alone
    text = capsys.readouterr().out
    found = {line.split(":")[0]: float(line.split("diffusers ")[1].split(",")[0]) for line in text.splitlines()
             if "largest difference" in line}  # fmt: skip
    names = {"transformer_video", "transformer_audio", "connectors_video", "connectors_audio", "vae_encode"}
    assert found.keys() == names | {"vae_decode"} and max(found.values()) < 1e-4


def test_the_checkpoint_knows_the_projection_that_it_came_with(converted, folder):
    found = base_model.origin(str(converted))["text_weights"]
    assert found and found == projection_digest(folder / "connectors")


def test_a_base_with_audio_serves_the_video_stream_alone(converted):
    mesh = make_mesh()
    bases = {}
    for audio in ("joint", "off"):
        config = config_of(converted, **{"model.audio": audio})
        bases[audio] = base_model.load_base(build.make_family(config, mesh), config, mesh)
    whole, video = (array_store.by_name(bases[audio]) for audio in ("joint", "off"))
    assert video.keys() < whole.keys() and not any("audio" in name or "av_" in name for name in video)
    for name, x in video.items():
        np.testing.assert_array_equal(x, whole[name])
    assert all("audio" in name or "av_" in name for name in whole.keys() - video.keys())


def test_another_setting_that_shapes_do_not_show_is_refused(converted):
    config = config_of(converted)
    config.model.theta = 100.0
    mesh = make_mesh()
    with pytest.raises(UserError, match=r"config\.model\.theta = 100\.0, not 10000\.0"):
        base_model.load_base(build.make_family(config, mesh), config, mesh)


def test_another_version_is_refused_by_its_setting(folder, tmp_path, capsys):
    other = tmp_path / "other"
    for part in ("transformer", "connectors", "vae"):
        (other / part).mkdir(parents=True)
        config = json.loads((folder / part / "config.json").read_text())
        changes = {"gated_attn": True} if part == "transformer" else {}  # as in LTX-2.3
        (other / part / "config.json").write_text(json.dumps(config | changes))
    assert cli.main(["convert", str(other), str(tmp_path / "out")]) == 2
    assert "gated_attn = True; only False is built here" in capsys.readouterr().err


def test_the_converted_model_denoises(converted):
    config, mesh = config_of(converted), make_mesh()
    family = build.make_family(config, mesh)
    base = base_model.load_base(family, config, mesh)
    shapes = {name: spec.shape for name, spec in family.latents.items()}
    assert shapes["video"] == (2, 2, 2, 4) and jax.tree.leaves(base)[0].dtype == jnp.float32
