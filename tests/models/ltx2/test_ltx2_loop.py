"""The eight steps of the distilled sampler against diffusers' image-to-video pipeline, from given noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ltx2 import TIMES, dev_times
from tests.models.ltx2.pipelines import pipeline_of, sampled
from tests.models.ltx2.small_ltx2 import connector_weights, weights_of
from tests.models.ltx2.small_vae import CONFIG as VAE
from world_distill.core import sampling
from world_distill.core.flow import sampling_times
from world_distill.models.ltx2.codec import LTX2Codec
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.connectors import ConnectorConfig, project_states
from world_distill.models.ltx2.family import LTX2Family
from world_distill.structs import Condition, Tokens

pytestmark = pytest.mark.torch
LENGTH, WORDS = 16, 10  # places of a text, its real tokens


def test_times_of_the_undistilled_model_are_the_schedulers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    for tokens, mu in ((1024, 0.95), (6144, 0.95 + 5 / 3 * 1.1)):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 30, 30), mu=mu)
        np.testing.assert_allclose(dev_times(30, tokens), scheduler.sigmas[:-1], rtol=0, atol=1e-6)


def draw(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def parts():
    """diffusers' networks, every parameter drawn: transformer, connectors, vae."""
    torch = pytest.importorskip("torch", reason="torch is in the extra `torch`")
    diffusers = pytest.importorskip("diffusers")
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    from tests.models.ltx2 import make_goldens, make_vae_goldens

    del torch, diffusers
    network = make_goldens.TRANSFORMER | {
        "in_channels": 4, "out_channels": 4, "audio_in_channels": 8, "audio_out_channels": 8, "caption_channels": 24,
    }  # fmt: skip
    return {
        "transformer": make_goldens.redraw(LTX2VideoTransformer3DModel(**network), 1),
        "connectors": make_goldens.redraw(LTX2TextConnectors(**make_goldens.CONNECTORS), 2),
        "vae": make_vae_goldens.codec(3),
    }


def family_of(audio):
    network = LTX2Config(
        audio=audio, channels=4, width=40, audio_channels=8, audio_width=24, depth=2, heads=4, text_width=24,
        remat="none",
    )  # fmt: skip
    texts = ConnectorConfig(audio=audio, width=24, heads=3, depth=2, registers=4, length=LENGTH, states=3)
    codec = LTX2Codec(VAE, np.dtype("float32"))
    return LTX2Family(network, codec, texts, size=(64, 96), frames=17, dtype=np.dtype("float32"))


@pytest.mark.parametrize("audio", ["joint", "off"])
def test_eight_steps_are_the_pipelines(parts, audio):
    family = family_of(audio)
    assert family.latents["video"].shape == (3, 2, 3, 4)
    scene, noise = draw(1, 1, 2, 3, 4), {name: draw(1, *spec.shape) for name, spec in family.latents.items()}
    states = draw(1, LENGTH, 24, 3)
    mask = np.arange(LENGTH)[None] >= LENGTH - WORDS

    # Ours, with the text's real tokens first.
    theirs = {name: {k: v.numpy() for k, v in part.state_dict().items()} for name, part in parts.items()}
    connectors, kernel = connector_weights(family.connectors, theirs["connectors"])
    base = {"transformer": weights_of(family.config, theirs["transformer"]), "connectors": connectors}
    rows = np.roll(np.asarray(project_states(*map(jnp.asarray, (states, mask, kernel)))), WORDS, axis=1)
    condition = Condition(
        {"text": Tokens(jnp.asarray(rows), jnp.asarray(mask[:, ::-1]))}, {"video": jnp.asarray(scene)}
    )
    x = jax.tree.map(jnp.asarray, noise | {"video": np.concatenate([scene, noise["video"][:, 1:]], 1)})
    denoise = jax.jit(family.denoise)
    times = sampling_times(8, explicit=TIMES)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = denoise(base, None, x, jnp.full(1, t), condition)
        x = sampling.sde_step(x, v, t, t_next, 0.0, None)[0]

    found = sampled(
        pipeline_of(**parts), scene=scene, noise=noise, states=states, mask=mask, times=TIMES, frames=17, fps=24.0,
        audio=audio,
    )  # fmt: skip
    assert np.abs(found["video"]).max() > 1
    for name in family.latents:
        np.testing.assert_allclose(np.asarray(x[name]), found[name], rtol=0, atol=2e-4)
