"""`inspect-weights` says what a file is, and what each tool does with it."""

import json

import numpy as np
import pytest

from tests.models.wan.small_wan import MODEL
from tests.weights.test_lora_forms import FORMS, IMAGE, KEY, TEXT, draw, factors, of_a_large_model, save, speed_changes
from tests.weights.test_sources import make_diffusers, make_original, weights  # noqa: F401 (a fixture)
from world_distill import cli
from world_distill.errors import UserError
from world_distill.storage import array_store
from world_distill.weights.inspect_weights import inspect

pytestmark = pytest.mark.once
SPEED = {f"diffusion_model.{k}": x for k, (x, *_) in speed_changes().items()}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (factors(), {"kind": "LoRA", "rank": "2 (6 layers)", "made for": "at least 2 blocks of width 32: no published",
                     "here": "generate --executor FILE", "ComfyUI": "reads all 12 tensors",
                     "diffusers": "reads all 12 tensors", "alpha": "not said",
                     "layers": "blocks.N.cross_attn.o, blocks.N.ffn.0, blocks.N.self_attn.q"}),
        (factors() | {f"{KEY}.alpha": np.float32([8])}, {"alpha": "8 (1 layers)"}),
        (factors() | SPEED, {"here": "holds 4 differences of biases, 2 differences of mod", "ComfyUI": "24 of 25",
                             "diffusers": "16 of 25"}),
        (factors(*FORMS["old diffusers"]), {"ComfyUI": "reads 0 of 12", "diffusers": "reads all 12"}),
        (factors(*FORMS["peft"]), {"ComfyUI": "reads 0", "diffusers": "reads 0", "prefix": "(PEFT's own folders)"}),
        (factors(*FORMS["musubi"]), {"ComfyUI": "reads all", "prefix": "lora_unet_ (musubi-tuner and kohya)"}),
        (factors() | TEXT | IMAGE, {"here": "--without image-branch --without text-encoder"}),
        (of_a_large_model(), {"made for": "40 blocks of width 5120: a 14B model", "here": "refused: it was made for",
                              "ComfyUI": "reads all 320 tensors", "rank": "1 (160 layers)"}),
        ({"lora_unet_blocks_0_self_attn_q.lokr_w1": draw(4, 4)}, {"kind": "LoKr", "here": "refused: it is a LoKr",
                                                                 "ComfyUI": "reads all 1 tensors"}),
        ({"diffusion_model.head.head.lora_A.weight": draw(2, 32),
          "diffusion_model.head.head.lora_B.weight": draw(24, 2)},
         {"diffusers": "stops with an error: it adapts no block"}),
    ],
    ids=["comfy", "alpha", "speed", "diffusers", "peft", "musubi", "parts", "14b", "lokr", "head"],
)  # fmt: skip
def test_a_lora_is_described(tmp_path, tensors, expected):
    found = inspect(save(tmp_path / "x.safetensors", tensors), MODEL)
    assert {key: found[key] for key in expected if expected[key] not in found[key]} == {}


def test_models_and_folders_are_described(tmp_path, weights):  # noqa: F811
    one = save(
        tmp_path / "one.safetensors",
        {f"model.diffusion_model.{k}": x for k, x in weights["original", "transformer"].items()},
    )
    found = inspect(one, MODEL)
    assert found["kind"] == "a transformer of Wan" and found["sizes"] == "blocks 2, width 128, heads 1, channels 48"
    assert found["here"] == f"world-distill convert {one} DEST --vae wan2.2_vae.safetensors"
    assert "original names after model.diffusion_model." in found["names"]
    assert "an autoencoder" in inspect(save(tmp_path / "vae.safetensors", weights["original", "vae"]), MODEL)["kind"]
    assert inspect(make_original(tmp_path / "original", weights), MODEL)["kind"] == "a transformer of Wan"
    assert inspect(make_diffusers(tmp_path / "diffusers", weights), MODEL)["family"] == "wan"
    writer = array_store.Writer(tmp_path / "base", {"family": "wan", "model": {}, "source": "a/b", "revision": "abc"})
    writer.add("x", np.zeros(3, np.float32))
    writer.finish()
    found = inspect(tmp_path / "base", MODEL)
    assert (found["source"], found["revision"]) == ("a/b", "abc") and "--config.base=" in found["here"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert inspect(tmp_path / "run", MODEL)["kind"] == "the folder of a run"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path, message in (("x.gguf", "is a GGUF file"), ("nothing", "is not there")):
        with pytest.raises(UserError, match=message):
            inspect(tmp_path / path, MODEL)


def test_the_command_prints_a_line_a_fact(tmp_path, capsys):
    path = save(tmp_path / "x.safetensors", factors(), header={"base": "Wan-AI/Wan2.2-TI2V-5B-Diffusers"})
    flags = ["--config", "wan22_5b:debug", "--json", str(tmp_path / "x.json")]
    assert cli.main(["inspect-weights", str(path), *flags]) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"{path}: LoRA\n") and "base          Wan-AI/Wan2.2-TI2V-5B-Diffusers" in out
    assert json.loads((tmp_path / "x.json").read_text())["ComfyUI"] == "reads all 12 tensors"
    assert cli.main(["inspect-weights", str(path), "--config", "sandbox"]) == 2
    assert "nobody publishes weights" in capsys.readouterr().err
