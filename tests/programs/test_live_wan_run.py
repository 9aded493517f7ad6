"""From a model that diffusers saved, through training, back to diffusers: it makes the clips that we make."""

import jax
import numpy as np
import pytest
from PIL import Image

from tests.programs.test_wan_run import call, config_of
from world_distill import cli
from world_distill.core import sampling
from world_distill.data.records.batches import pad_texts
from world_distill.programs import generate, prepare, train
from world_distill.training import run_folder
from world_distill.weights.lora_files import FILE_NAME

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="torch is in the extra `torch`")
diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
pytest.importorskip("peft", reason="peft is in the extra `torch`")

STEPS = 3
TASK = "[red disc]: Go to the blue ring."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model in diffusers' layout, every parameter random."""
    from tests.models.wan.make_goldens import TRANSFORMER, VAES, redraw

    folder = tmp_path_factory.mktemp("published")
    redraw(diffusers.WanTransformer3DModel(**TRANSFORMER), 1).save_pretrained(folder / "transformer")
    statistics = {"latents_mean": [0.1 * i for i in range(6)], "latents_std": [1 + 0.2 * i for i in range(6)]}
    redraw(diffusers.AutoencoderKLWan(**VAES["2.2"] | statistics), 2).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """Folder of a run on that model."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["convert", str(source), str(folder / "base")]) == 0
    config = config_of(
        base=str(folder / "base"), steps=1,
        **{"objective.rl": "none", "optimizer.learning_rate": ((0, 0.1),), "objective.ema_decay": 0.0},
    )  # fmt: skip
    prepare.make_records(config, folder / "data")
    train.train(config, folder)
    for flags in (["--out", FILE_NAME], ["--format", "merged", "--out", "merged"]):
        assert cli.main(["export", "--workdir", str(folder), *flags[:-1], str(folder / flags[-1])]) == 0
    return folder


@pytest.fixture(scope="module")
def ours(run, tmp_path_factory):
    """(scene, the base's clip, the Executor's clip), as `world-distill generate` makes them."""
    image = next((run / "data" / "scenes" / "test").glob("*.png"))
    clips, unused = {}, tmp_path_factory.mktemp("unused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_write", lambda folder, job, clip, *rest: clips.update({job.role: clip}))
        flags = ["--image", image, "--task", TASK, "--sampler", "unipc", "--steps", STEPS, "--batch", 1]
        assert call(*flags, "--executor", run, out=unused) == 0
        base = ["--config", "wan22_5b:debug", "--config.model.size=64,64", f"--config.base={run / 'base'}"]
        assert call(*flags, *base, out=unused) == 0
    return Image.open(image).convert("RGB"), clips["base"], clips["executor"]


def clip_of(pipeline, image, config, family):
    """What diffusers makes of the scene and the task, from the noise that `generate` starts from. [F H W 3] uint8."""
    keys = sampling.sample_keys(jax.random.key(0), np.arange(1))
    noise = sampling.draw_noise(keys, 0, family.latents)["video"]
    text = pad_texts(family.encoders.text([TASK])["text"], config.text_length).states
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        image=image, height=64, width=64, num_frames=9, num_inference_steps=STEPS, guidance_scale=1.0,
        prompt_embeds=torch.from_numpy(text), latents=torch.from_numpy(np.moveaxis(np.array(noise), -1, 1)),
        output_type="np",
    ).frames[0]  # fmt: skip
    return np.round(frames * 255).astype(int)


@pytest.fixture(scope="module")
def pipeline(source):
    """A function from the folder of the weights to diffusers' pipeline."""

    def make(folder):
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        )
        return diffusers.WanImageToVideoPipeline(
            tokenizer=None, text_encoder=None, scheduler=scheduler, expand_timesteps=True,
            vae=diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae"),
            transformer=diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer"),
        )  # fmt: skip

    return make


def test_diffusers_makes_our_clips(source, run, ours, pipeline):
    image, base, executor = ours
    config, family = run_folder.read_config(run), run_folder.open_run(run).family
    assert np.abs(executor.astype(int) - base).max() > 20  # training shows

    def check(pipe, expected):
        np.testing.assert_allclose(clip_of(pipe, image, config, family), expected.astype(int), atol=1)

    published = pipeline(source)
    check(published, base)
    published.load_lora_weights(run, weight_name=FILE_NAME)
    check(published, executor)
    check(pipeline(run / "merged"), executor)
