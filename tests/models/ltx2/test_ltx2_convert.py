"""A small LTX-2 in diffusers' layout, converted, compared with diffusers, and read with and without its audio."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill import build, cli
from world_distill.data.records.negative import read_negative
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.data.records.splits import Splits
from world_distill.devices.sharding import make_mesh
from world_distill.errors import UserError
from world_distill.models.hashed_words import encode_text
from world_distill.models.ltx2.encoders import LTX2Encoders
from world_distill.models.ltx2.text import projection_digest
from world_distill.programs import prepare
from world_distill.programs.run_inputs import open_inputs
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


@pytest.fixture(scope="module")
def distilled(folder):
    """(folder, checkpoint) of the same model with another text projection alone."""
    from safetensors.numpy import load_file, save_file

    other = folder.parent / "distilled" / folder.name  # names tell nothing
    shutil.copytree(folder, other)
    file = next((other / "connectors").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["text_proj_in.weight"][0, 0] += 1
    save_file(tensors, file)
    out = folder.parent / "distilled" / "converted"
    assert cli.main(["convert", str(other), str(out)]) == 0
    return other, out


def test_records_of_another_text_projection_are_refused(converted, folder, distilled, tmp_path, monkeypatch):
    def of(base, published, **changes):
        given = {"model.text_encoder": str(published), "scenes.train": 2, "scenes.validation": 1, "scenes.test": 1}
        return config_of(base, **given, **changes, **{"world.size": 64, "text_length": 64, "evaluate_every": 0})

    def encode(config):
        reader, said = RecordReader(tmp_path, "train_annotated"), []
        counts = prepare.Encoder(config).encode_split(
            reader, tmp_path, name="train", splits=Splits(0.0, 0.0), say=said.append, progress=progress, batch=2
        )
        return counts["train"], said

    @contextlib.contextmanager
    def progress():
        yield lambda done, of: None

    # Gemma is not there: hashed words stand in for its rows.
    monkeypatch.setattr(
        LTX2Encoders, "open_text_encoder", lambda self: lambda texts: [encode_text(t, self.text_width) for t in texts]
    )
    one, (other_folder, other) = of(converted, folder), distilled
    prepare.make_records(one, tmp_path)
    digest = RecordReader(tmp_path, "train").metadata["text_weights"]
    assert read_negative(tmp_path, "train").text_encoder == f"{folder.name} {digest}"
    assert encode(one)[0]["encoded"] == 0  # complete

    # Training names no text encoder: the base says which projection it came with.
    with pytest.raises(RecordError, match=rf"text projection '{digest}', and this config has .*rows of text are not"):
        open_inputs(of(other, "", data=str(tmp_path)), tmp_path / "run")
    with pytest.raises(RecordError, match=f"digest {digest}, and .* came with the base"):
        encode(of(other, folder))
    counts, said = encode(of(other, other_folder))
    assert counts["encoded"] and counts["negative"] and any("text_weights" in line for line in said)
    assert RecordReader(tmp_path, "train").metadata["text_weights"] != digest
    monkeypatch.setattr(base_model, "load_base", lambda *args: None)
    open_inputs(of(other, "", data=str(tmp_path)), tmp_path / "run")


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


def test_another_version_is_refused_by_its_name(folder, tmp_path, capsys):
    other = tmp_path / "other"
    for part in ("transformer", "connectors", "vae"):
        (other / part).mkdir(parents=True)
        config = json.loads((folder / part / "config.json").read_text())
        changes = {"gated_attn": True} if part == "transformer" else {}  # as in LTX-2.3
        (other / part / "config.json").write_text(json.dumps(config | changes))
    assert cli.main(["convert", str(other), str(tmp_path / "out")]) == 2
    assert "it is LTX-2.3 (transformer/config.json has gated_attn = True)" in capsys.readouterr().err


def test_the_converted_model_denoises(converted):
    config, mesh = config_of(converted), make_mesh()
    family = build.make_family(config, mesh)
    base = base_model.load_base(family, config, mesh)
    shapes = {name: spec.shape for name, spec in family.latents.items()}
    assert shapes["video"] == (2, 2, 2, 4) and jax.tree.leaves(base)[0].dtype == jnp.float32
