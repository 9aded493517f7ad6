"""Exported files: what their headers say, their modes, and the merged model for ComfyUI."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors
from flax.traverse_util import flatten_dict

from tests.models.wan.small_wan import MODEL, load, random_lora
from tests.weights.test_lora_forms import save
from tests.weights.test_sources import CODEC, LAYOUT, MEAN, NETWORK, STD
from world_distill import build
from world_distill.errors import UserError
from world_distill.models.lora import merge
from world_distill.models.wan.family import build as build_wan
from world_distill.programs.export import describe
from world_distill.settings.loading import load_config
from world_distill.storage import array_store, atomic
from world_distill.weights import convert
from world_distill.weights.lora_files import write_lora
from world_distill.weights.lora_layouts import check_targets, unread_by_diffusers
from world_distill.weights.merged_model import write_merged, write_merged_file

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model():
    """(family, base, Executor), all random."""
    vae = {"channels": 48, "encoder_width": CODEC.encoder_width, "decoder_width": CODEC.decoder_width, "blocks": 1}
    sizes = {"channels": 48, "width": 128, "depth": 2, "heads": 1, "mlp": 24, "text_width": 12, "time_width": 16}
    family = build_wan(**sizes, vae=vae, size=(64, 64), frames=5, dtype="float32", lora_scale=0.5)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(family.init_base, jax.random.key(0))
    base = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    base["vae"] |= {"mean": jnp.asarray(MEAN), "std": jnp.asarray(STD)}
    lora = jax.eval_shape(lambda: family.init_lora(jax.random.key(0), shapes, rank=2))
    return family, base, jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), lora)


def kinds(path):
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}, file.metadata()


def test_a_merged_file_for_comfyui_is_base_plus_executor_and_converts_back(tmp_path, model):
    family, base, lora = model
    read = flatten_dict(base, sep=".").__getitem__
    summary = write_merged_file(tmp_path / "x.safetensors", family, read, lora, metadata={"base": "Wan"})
    found, header = kinds(tmp_path / "x.safetensors")
    names = {name for entry in LAYOUT.entries("original")["transformer"] for name in entry.names}
    assert found == {f"model.diffusion_model.{name}": "F32" for name in names}
    assert header == {"format": "pt", "base": "Wan"} and summary["tensors"] == len(names)
    tensors = {
        n: np.asarray(x)
        for e in LAYOUT.entries("original")["vae"]
        for n, x in e.scatter(np.asarray(read(f"vae.{e.path}"))).items()
    }
    convert.convert(tmp_path / "x.safetensors", tmp_path / "dest", vae=save(tmp_path / "vae.safetensors", tensors))
    want = base | {"transformer": merge(base["transformer"], lora, 0.5)}
    back = ocp.load(tmp_path / "dest")
    for name, x in flatten_dict(want, sep=".").items():
        np.testing.assert_allclose(back[name], x, atol=1e-5, err_msg=name)
    with pytest.raises(UserError, match="exists already"):
        write_merged_file(tmp_path / "x.safetensors", family, read, lora)


KEPT = re.compile(r".*(time_embedding|time_embedder|modulation|scale_shift_table|norm3|norm2)\b.*")


def test_what_everyone_keeps_in_float32_stays_so_in_merged_models(tmp_path, model):
    family, base, lora = model
    read = flatten_dict(base, sep=".").__getitem__
    write_merged_file(tmp_path / "x.safetensors", family, read, lora, dtype="bfloat16")
    write_merged(tmp_path / "x", family, read, lora, dtype="bfloat16", metadata={"license": "mit"})
    part, header = kinds(tmp_path / "x" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert header == {"format": "pt", "license": "mit"}
    for found in (kinds(tmp_path / "x.safetensors")[0], part):
        assert {name for name, kind in found.items() if kind == "F32"} == {n for n in found if KEPT.fullmatch(n)}
        assert set(found.values()) == {"F32", "BF16"}
    vae, _ = kinds(tmp_path / "x" / "vae" / "diffusion_pytorch_model.safetensors")
    assert set(vae.values()) == {"F32"}
    # Rounded once, after the sum.
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        q = file.get_tensor("model.diffusion_model.blocks.1.self_attn.q.weight")
    want = merge(base["transformer"], lora, 0.5)["blocks"]["self_attention"]["q"]["kernel"][1].T
    np.testing.assert_array_equal(q, np.asarray(want.astype(jnp.bfloat16)))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_modes_that_the_umask_leaves(tmp_path, model, umask):
    weights = load("transformer_3x4x6.npz")[1]
    before = os.umask(umask)
    try:
        write_lora(tmp_path / "x.safetensors", random_lora(weights, targets="head"), MODEL, scale=1.0, layout="comfy")
        atomic.write_text(tmp_path / "x.txt", "")
        family, base, lora = model
        write_merged_file(tmp_path / "y.safetensors", family, flatten_dict(base, sep=".").__getitem__, lora)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_the_header_says_what_the_file_is_made_from_and_for(tmp_path):
    config = load_config("wan22_5b:debug", {"base": str(tmp_path / "base"), "sampler.steps": 7, "sampler.shift": 5.0})
    assert describe(config, 3)["base"] == str(tmp_path / "base")  # that is not there any more
    kept = {"family": "wan", "model": {}, "source": "a/b", "revision": "c0ffee", "license": "apache-2.0"}
    writer = array_store.Writer(tmp_path / "base", kept)
    writer.add("x", np.zeros(3, np.float32))
    writer.finish()
    found = describe(config, 3)
    assert all(isinstance(value, str) for value in found.values())
    assert (found["base"], found["base_revision"], found["license"]) == ("a/b", "c0ffee", "apache-2.0")
    assert found["step"] == "3" and found["prompt_form"] == "[agent]: imperative."
    sampler = json.loads(found["sampler"])
    assert (sampler["steps"], sampler["shift"], sampler["guidance"]) == (7, 5.0, 1.0)
    assert (sampler["size"], sampler["frames"], sampler["fps"]) == ([96, 96], 9, 8.0)
    assert describe(config, 3, license="mit")["license"] == "mit"


@pytest.mark.parametrize(
    ("targets", "lines"),
    [
        (r"blocks\..*|head|text_in|text_out", []),
        ("head", ["it adapts no block"]),
        (
            r"blocks\..*|patch|time_in",
            ["it adapts patch_embedding", "it adapts one of the two layers of time_embedding"],
        ),
    ],
)
def test_what_diffusers_does_not_read_of_comfyuis_layout_is_said(targets, lines):
    lora = random_lora(load("transformer_3x4x6.npz")[1], targets=targets)
    assert unread_by_diffusers(lora, MODEL) == lines


def test_targets_that_no_file_can_hold_are_refused_before_training(monkeypatch):
    config = load_config("wan22_5b:debug", {"executor.targets": r"blocks\..*|head|patch"})
    family = build.make_family(config)
    check_targets(family)
    names = {path: name for path, name in family.published.lora_names.items() if path != "head"}
    monkeypatch.setattr(type(family.published), "lora_names", names)
    with pytest.raises(UserError, match="config.executor.targets names head, which no LoRA file can hold"):
        check_targets(family)


def test_the_sizes_of_the_small_model_are_those_of_its_layout(model):
    assert model[0].config == NETWORK
