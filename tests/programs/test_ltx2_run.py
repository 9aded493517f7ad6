"""LTX-2 from scenes to a LoRA file, on 8 devices: encode, train, evaluate, export, generate; joint and video alone."""

import re

import jax
import numpy as np
import pytest
from small import check_advantages

from tests.runs import assert_same, final_states, lasting
from world_distill import cli
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.errors import UserError
from world_distill.programs import evaluate, generate, prepare, train
from world_distill.programs.run_inputs import open_inputs
from world_distill.settings.loading import load_config
from world_distill.storage.metric_log import read_log
from world_distill.training import run_folder
from world_distill.weights import base_model
from world_distill.weights.lora_files import read_lora
from world_distill.weights.lora_layouts import LoraModel

pytestmark = pytest.mark.once

SMALL = {
    "steps": 2, "save_every": 1, "model.size": (64, 64), "world.size": 64, "objective.updates": 1,
    "objective.minibatches": 1, "objective.draws": 2, "host_devices": 8, "mesh.data": 2, "mesh.tensor": 2,
    "scenes.train": 3, "scenes.validation": 1, "scenes.test": 2, "annotator.pairs": 2, "evaluate_batch": 8,
    "encode_batch": 2, "judge.factory": "hash_judge:HashJudge",
}  # fmt: skip
GRPO = {
    "objective.rl": "flow_grpo", "objective.times": "index", "sampler.sde": "cps", "sampler.eta": 0.8,
    "sampler.window": (4, 4), "objective.grpo_clip": 1e-4, "objective.beta_d": ((0, 0.1),), "objective.draws": 1,
}  # fmt: skip


def config_of(**changes):
    return load_config("ltx2:debug", SMALL | changes)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx2")
    prepare.make_records(config_of(), folder / "data")
    return folder / "data"


def run_of(records, folder, **changes):
    config = config_of(**changes)
    config.data = str(records)
    train.train(config, folder)
    return config


@pytest.fixture(scope="module")
def joint(records, tmp_path_factory):
    """The folder of a finished run with both streams."""
    folder = tmp_path_factory.mktemp("joint")
    check_advantages(run_of(records, folder), folder)
    return folder


def test_records_hold_a_scene_and_a_row_a_token(records):
    record = RecordReader(records, "train")[0]
    assert record.scene["video"].shape == (1, 2, 2, 6) and record.task_states["text"].shape[1] == 24


def test_both_streams_train_and_the_audio_layers_stay(joint):
    opened = run_folder.open_run(joint)
    video = opened.executor["blocks"]["video"]
    assert opened.executor.keys() == {"blocks"} and opened.executor["blocks"].keys() == {"video"}
    assert all(np.abs(layer["b"]).max() > 0 for layer in video["self_attention"].values())
    assert opened.family.latents["audio"].shape == (28, 4) and not opened.family.latents["audio"].counts.any()
    lines = read_log(joint / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and all(line["train/gradient_norm"] > 0 for line in lines)


def test_a_run_goes_on_bit_for_bit(records, joint, tmp_path):
    run_of(records, tmp_path, steps=1)
    config = run_of(records, tmp_path)
    assert_same(*final_states(config, joint, tmp_path))  # weights, averages, moments, key, and the order of tasks
    whole, stopped = (read_log(folder / "metrics.jsonl") for folder in (joint, tmp_path))
    assert list(map(lasting, whole)) == list(map(lasting, stopped))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model.size": (64, 96)}, "image size '64x64', and this config has '64x96'"),
        ({"model.channels": 5, "model.vae.channels": 5}, "arrays scene '2x2x6', and this config has '2x2x5'"),
        ({"model.text_encoder": "gemma"}, "text encoder 'words', and this config has 'gemma'"),
        ({"text_length": 8}, r"has a text of \d+ tokens, and texts are padded to 8"),
        ({"text_length": 2000}, "config.text_length = 2000: family ltx2 reads at most 1024 tokens"),
        ({"sampler.steps": 4}, "explicit times make 8 steps, but steps=4"),
        ({"sampler.shift": 3.0}, "explicit times are used as they are"),
        ({"sampler.explicit": (0.5, 1.0), "sampler.steps": 2}, "times must fall strictly"),
        ({"sampler.window": (4, 4)}, "sampler.window = .* has no effect without noise"),
        (GRPO | {"sampler.window": (6, 4)}, "window"),
        (GRPO | {"sampler.sde": "flow_grpo"}, "add noise above the noise level"),
        ({"executor.targets": ".*"}, "names audio.head.kernel, which would never change"),
        ({"executor.targets": "blocks.audio.*", "model.audio": "off"}, "match no layer"),
        ({"mesh.context": 8}, "mesh .* does not fit 8 device"),
    ],
)
def test_settings_and_records_that_do_not_fit_are_named_before_weights_are_read(
    records, tmp_path, monkeypatch, changes, words
):
    monkeypatch.setattr(base_model, "load_base", None)
    with pytest.raises((UserError, RecordError, ValueError), match=words):
        open_inputs(config_of(data=str(records), **changes), tmp_path)
    assert not any(tmp_path.iterdir())


def test_records_of_the_other_family_are_named(records, tmp_path):
    with pytest.raises(RecordError, match="model family 'ltx2', and this config has 'wan'"):
        open_inputs(load_config("wan22_5b:debug", {"data": str(records)}), tmp_path)


def test_a_run_that_trains_the_sound_says_so(records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base_model, "load_base", lambda *args: None)
    config = config_of(**{"data": str(records), "executor.targets": r"blocks\..*", "evaluate_every": 0})
    open_inputs(config, tmp_path, writes=False)
    assert "warning: executor.targets" in (said := capsys.readouterr().err) and "the sound will suffer" in said
    open_inputs(config_of(data=str(records), evaluate_every=0), tmp_path, writes=False)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--size", "60x64"], "multiples of 32"),
        (["--frames", "8"], r"8 frames: their number must be 1 \+ a multiple of 8"),
        (["--frames", "1"], "the first frame is the scene"),
        (["--sampler", "unipc"], "distilled for a listed one"),
        (["--sigmas", "0.5,1"], "times must fall strictly"),
        (["--steps", "4", "--sigmas", "1,0.5"], "--sigmas lists 2 steps as they are"),
        (["--config.model.text_encoder=nowhere", "--config.base=random"], r"nowhere has no text_encoder/"),
        (["--config.model.text_encoder=", "--config.base=random"], "no text encoder: set config.model.text_encoder"),
    ],
)
def test_flags_of_generate_that_do_not_fit_are_explained(records, tmp_path, capsys, flags, words):
    image = next((records / "scenes" / "test").glob("*.png"))
    changes = [f"--config.{key}={value}" for key, value in SMALL.items() if key != "model.size"]
    size = [] if "--size" in flags else ["--size", "64x64"]
    call = ["generate", "--config", "ltx2:debug", *changes, *size, "--image", str(image), "--task", "[red disc]: Go."]
    try:
        code = cli.main([*call, *flags, "--out", str(tmp_path)])
    except SystemExit as error:  # of a flag that means nothing by itself
        code = error.code
    assert code == 2 and re.search(words, capsys.readouterr().err) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("audio", ["joint", "off"])
def test_flow_grpo_with_noise_in_the_last_steps(records, tmp_path, audio):
    config = run_of(records, tmp_path, **GRPO, **{"model.audio": audio, "steps": 1})
    [line] = read_log(tmp_path / "metrics.jsonl")
    assert line["train/gradient_norm"] > 0 and np.isfinite(line["train/ratio"])
    base = run_folder.open_run(tmp_path).base
    assert ("audio" in base["transformer"]) == ("audio" in base["connectors"]) == (audio == "joint")
    check_advantages(config, tmp_path)


def test_the_executor_and_its_files_make_the_same_clips(records, joint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = run_folder.open_run(joint)
    rows = evaluate.evaluate_roles(opened, roles=("demonstrator", "executor"), split="test")["rows"]
    assert [row["n"] for row in rows] == [2, 2]

    made = {}
    monkeypatch.setattr(generate, "_write", lambda folder, job, clip, *rest: made.setdefault(str(folder), clip))
    image = next((records / "scenes" / "test").glob("*.png"))
    flags = ["generate", "--image", str(image), "--task", "[red disc]: Go to the blue ring.", "--batch", "1"]
    changes = [f"--config.{key}={value}" for key, value in SMALL.items()]
    assert cli.main([*flags, "--executor", str(joint), "--out", "run"]) == 0
    for layout in ("comfy", "diffusers"):
        path = tmp_path / f"{layout}.safetensors"
        assert cli.main(["export", "--workdir", str(joint), "--format", layout, "--out", str(path)]) == 0
        found = read_lora(path, LoraModel.of(opened.family), scale=opened.family.lora_scale).tree
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, jax.device_get(opened.executor))
        assert cli.main([*flags, "--config", "ltx2:debug", *changes, "--executor", str(path), "--out", layout]) == 0
    assert made["run"].shape == (9, 64, 64, 3) and made["run"].std() > 0
    for layout in ("comfy", "diffusers"):
        np.testing.assert_allclose(made[layout].astype(int), made["run"].astype(int), atol=1, err_msg=layout)
