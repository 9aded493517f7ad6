"""From LTX-2 as diffusers saves it, through training, back to diffusers: its pipeline samples the latents that we do.

A run's Executor is exported as a LoRA in both layouts. The published pipeline loads it and starts from our noise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.ltx2.pipelines import pipeline_of, sampled
from tests.programs.test_ltx2_run import GRPO, config_of
from world_distill import build, cli
from world_distill.core import sampling
from world_distill.core.texts import read_once
from world_distill.models.ltx2.connectors import project_states
from world_distill.models.ltx2.text import read_projection
from world_distill.programs import prepare, train
from world_distill.structs import Condition, Tokens
from world_distill.training import run_folder

pytestmark = [pytest.mark.torch, pytest.mark.once]
torch = pytest.importorskip("torch", reason="torch is in the extra `torch`")
diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
pytest.importorskip("peft", reason="peft is in the extra `torch`")

AUDIO_CHANNELS = {"model.audio_channels": 8}  # as many as the pipeline's autoencoder of sounds can have here
STRONG = {"steps": 1, "optimizer.learning_rate": ((0, 0.1),), "objective.ema_decay": 0.0}
AWM = {"objective.rl": "awm"}
PLACES, WORDS = 1024, 10  # of a text, and its real tokens, which stand at its end in diffusers


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The debug model in diffusers' layout, every parameter random."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    from tests.models.ltx2.make_goldens import redraw

    folder = tmp_path_factory.mktemp("published")
    configs = build.make_family(config_of(**AUDIO_CHANNELS)).published.configs(lambda path: None)
    kinds = {
        "transformer": diffusers.LTX2VideoTransformer3DModel, "connectors": LTX2TextConnectors,
        "vae": diffusers.AutoencoderKLLTX2Video,
    }  # fmt: skip
    for seed, (part, kind) in enumerate(kinds.items()):
        redraw(kind.from_config(configs[part]), seed).save_pretrained(folder / part)
    return folder


@pytest.fixture(scope="module")
def base(source):
    out = source.parent / "base"
    assert cli.main(["convert", str(source), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def records(base):
    folder = base.parent / "data"
    prepare.make_records(config_of(base=str(base), **AUDIO_CHANNELS), folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(source):
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    return pipeline_of(
        diffusers.LTX2VideoTransformer3DModel.from_pretrained(source / "transformer"),
        LTX2TextConnectors.from_pretrained(source / "connectors"),
        diffusers.AutoencoderKLLTX2Video.from_pretrained(source / "vae"),
    )


@pytest.mark.parametrize("audio", ["joint", "off"])
@pytest.mark.parametrize("method", [AWM, GRPO], ids=["awm", "flow_grpo"])
def test_the_pipeline_samples_our_latents(source, base, records, pipeline, tmp_path, capsys, method, audio):
    config = config_of(base=str(base), data=str(records), **{"model.audio": audio}, **AUDIO_CHANNELS, **STRONG | method)
    train.train(config, tmp_path / "run")
    opened = run_folder.open_run(tmp_path / "run")
    family, times = opened.family, np.array([*config.sampler.explicit, 0.0])

    rng = np.random.default_rng(0)
    states = rng.normal(size=(1, PLACES, 24, 3)).astype(np.float32)
    scene = rng.normal(size=(1, *family.encoders.scenes["video"].shape)).astype(np.float32)
    mask = np.arange(PLACES)[None] >= PLACES - WORDS
    rows = project_states(jnp.asarray(states), jnp.asarray(mask), jnp.asarray(read_projection(source / "connectors")))
    text = Tokens(rows[:, -WORDS:], jnp.ones((1, WORDS), bool))
    keys = sampling.sample_keys(jax.random.key(0), np.arange(1))
    given = {
        "scene": scene, "noise": jax.device_get(sampling.draw_noise(keys, 0, family.latents)), "states": states,
        "mask": mask, "times": times[:-1], "frames": family.frames, "fps": family.fps, "audio": audio,
    }  # fmt: skip

    @jax.jit
    def sample(base, lora):
        told = Condition({"text": text}, {"video": jnp.asarray(scene)})
        told, _ = read_once(functools.partial(family.read_texts, base), told)
        return sampling.rollout(
            family.denoise, base, lora, told, keys, times=times, streams=family.latents, keep_states=False
        ).latents

    def check(lora):
        ours, theirs = sample(opened.base, lora), sampled(pipeline, **given)
        for name, x in ours.items():
            np.testing.assert_allclose(x, theirs[name], rtol=0, atol=5e-5, err_msg=name)
        return ours["video"]

    before = check(None)
    for layout in ("diffusers", "comfy"):
        path = tmp_path / f"{layout}.safetensors"
        assert cli.main(["export", "--workdir", str(tmp_path / "run"), "--format", layout, "--out", str(path)]) == 0
        pipeline.load_lora_weights(path)
        try:
            assert np.abs(check(opened.executor) - before).max() > 0.05, "training does not show"
        finally:
            pipeline.unload_lora_weights()
    check_merged(tmp_path, source, capsys, complete=audio == "joint")


def check_merged(tmp_path, source, capsys, complete):
    """diffusers finds every parameter in the merged folder, or the verb says that it would not."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    merged = tmp_path / "merged"
    assert cli.main(["export", "--workdir", str(tmp_path / "run"), "--format", "merged", "--out", str(merged)]) == 0
    assert ("not complete" in capsys.readouterr().out) is not complete
    if complete:
        kinds = {
            "transformer": diffusers.LTX2VideoTransformer3DModel, "connectors": LTX2TextConnectors,
            "vae": diffusers.AutoencoderKLLTX2Video,
        }  # fmt: skip
        for part, kind in kinds.items():
            _, info = kind.from_pretrained(merged / part, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], part
        np.testing.assert_array_equal(read_projection(merged / "connectors"), read_projection(source / "connectors"))
