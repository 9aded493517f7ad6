"""LTX-2 as a family: its streams, its sizes, what it reads once, what it refuses."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small import redraw

from world_distill import build
from world_distill.core import sampling
from world_distill.core.guidance import with_guidance
from world_distill.core.texts import read_once
from world_distill.devices import flops
from world_distill.models.ltx2.family import UNHEARD
from world_distill.models.ltx2.family import build as make
from world_distill.settings.loading import load_config
from world_distill.structs import Condition, Tokens


@pytest.fixture(scope="module")
def family():
    return build.make_family(load_config("ltx2:debug"), None)


@pytest.fixture(scope="module")
def base(family):
    return redraw(jax.eval_shape(family.init_base, jax.random.key(0)), 3, size=0.3)


def draw(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def condition_of(family, rows=2, length=9):
    mask = np.arange(length) < np.array([length, 4])[:rows, None]
    scene = {name: jnp.asarray(draw(rows, *x.shape)) for name, x in family.encoders.scenes.items()}
    return Condition({"text": Tokens(jnp.asarray(draw(rows, length, 24)), jnp.asarray(mask))}, scene)


def latents_of(family, rows=2):
    return {name: jnp.asarray(draw(rows, *spec.shape)) for name, spec in family.latents.items()}


def test_streams_at_the_published_size():
    family = make()
    assert family.latents["video"].shape == (16, 16, 24, 128) and family.latents["audio"].shape == (126, 128)
    assert family.tokens == 6144 + 126
    np.testing.assert_array_equal(family.latents["video"].moves, np.arange(16) > 0)
    assert family.latents["audio"].moves.all() and not family.latents["audio"].counts.any()
    assert make(audio_counts=True).latents["audio"].counts.all()
    assert make(audio="off").latents.keys() == {"video"}
    assert make(fps=48.0).latents["audio"].shape[0] == 63  # half the seconds


def test_parameters_of_the_published_model():
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e9  # noqa: E731
    sizes = {audio: jax.eval_shape(make(audio=audio).init_base, jax.random.key(0)) for audio in ("joint", "off")}
    assert count(sizes["joint"]["transformer"]) == pytest.approx(18.876, abs=1e-3)
    assert count(sizes["off"]["transformer"]) == pytest.approx(13.04, abs=0.01)
    assert count(sizes["joint"]["connectors"]) == pytest.approx(0.709, abs=1e-3)
    assert count(sizes["joint"]["vae"]) == pytest.approx(1.2225, abs=1e-3)


def test_the_scene_stays_and_the_sound_moves(family, base):
    x, t, told = latents_of(family), jnp.array([0.9, 0.4]), condition_of(family)
    v = jax.jit(family.denoise)(base, None, x, t, told)
    assert (np.asarray(v["video"])[:, 0] == 0).all() and (np.abs(v["video"])[:, 1:] > 0).all()
    assert (np.abs(v["audio"]) > 0).all()
    # The first frame of the noisy latents is not read, the scene's is.
    other = x | {"video": x["video"].at[:, 0].add(1.0)}
    jax.tree.map(np.testing.assert_array_equal, v, jax.jit(family.denoise)(base, None, other, t, told))
    moved = dataclasses.replace(told, scene={"video": told.scene["video"] + 1})
    assert np.abs(jax.jit(family.denoise)(base, None, x, t, moved)["audio"] - v["audio"]).max() > 1e-3


def test_texts_that_were_read_once_give_the_same_velocities(family, base):
    x, t, told = latents_of(family), jnp.array([0.9, 0.4]), condition_of(family)
    negative = {"text": Tokens(jnp.asarray(draw(9, 24)), jnp.arange(9) < 2)}

    @functools.partial(jax.jit, static_argnums=0)
    def guided(once, told, negative):
        if once:
            told, negative = read_once(functools.partial(family.read_texts, base), told, negative)
            assert told.text.keys() == {"video", "audio"} == negative.keys()
        return with_guidance(family.denoise, 3.0, negative)(base, None, x, t, told)

    found, expected = guided(True, told, negative), guided(False, told, negative)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected)
    other = Condition({"text": Tokens(told.text["text"].states + 1, told.text["text"].mask)}, told.scene)
    assert np.abs(guided(True, other, negative)["video"] - found["video"]).max() > 1e-3


def test_a_rollout_reads_its_texts_once(family, base):
    told, keys = condition_of(family), sampling.sample_keys(jax.random.key(0), np.arange(2))
    count = lambda f, *given: flops.count(jax.make_jaxpr(f)(*given))  # noqa: E731

    def roll(told, steps):
        told, _ = read_once(functools.partial(family.read_texts, base), told)
        times = np.linspace(1, 0, steps + 1)
        return sampling.rollout(
            family.denoise, base, None, told, keys, times=times, streams=family.latents, keep_states=False
        ).latents

    once = count(lambda told: read_once(functools.partial(family.read_texts, base), told)[0].text, told)
    read = read_once(functools.partial(family.read_texts, base), told)[0]
    step = count(lambda x, told: family.denoise(base, None, x, jnp.ones(2), told), latents_of(family), read)
    for steps in (2, 5):
        assert count(functools.partial(roll, steps=steps), told) == once + steps * step


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"audio": "on"}, "model.audio = 'on': it is joint or off"),
        ({"audio": "off", "audio_counts": True}, "there is no audio stream"),
        ({"frames": 120}, "1 \\+ a multiple of 8"),
        ({"size": (512, 760)}, "multiples of 32"),
        ({"text_width": 4096}, "model.connectors.width = 3840"),
        ({"channels": 64}, "model.vae.channels = 128"),
        ({"frames": 1}, "the first frame is the scene, so that none is generated"),
        ({"size": (512,)}, r"model.size = \(512,\): it is \(height, width\)"),
        ({"size": (32, 64)}, "twice that at least"),
        ({"size": (512, 2080)}, "positions up to 2048x2048 and 20 s"),
        ({"frames": 481, "fps": 24.0}, r"and 20 s \(model.frames / model.fps\)"),
        ({"heads": 30}, "model.width = 4096 does not divide into 30 heads"),
        ({"audio_width": 2000}, "model.audio_width = 2000 does not divide into 32 heads"),
        ({"connectors": {"heads": 7}}, "model.connectors.width = 3840 does not divide into 7 heads"),
        ({"connectors": {"registers": 100}}, "connectors.length = 1024 is not a multiple of .* = 100"),
        ({"stride": [8, 16, 16]}, r"model.stride = \(8, 16, 16\), but model.vae compresses"),
        ({"vae": {"steps": ["spatial", "sideways"]}}, "vae.steps has 'sideways'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        make(**sizes)


def test_the_picture_hears_all_of_the_sound_but_what_is_behind_the_last_block(family, base):
    x, t, told = latents_of(family), jnp.array([0.9, 0.4]), condition_of(family)

    def loss(weights):
        return (family.denoise(base | {"transformer": weights}, None, x, t, told)["video"] ** 2).sum()

    gradients = flatten_dict(jax.jit(jax.grad(loss))(base["transformer"]), sep=".")
    idle = {name for name, gradient in gradients.items() if not np.abs(gradient).max() > 0}
    assert idle == {name for name in gradients if re.fullmatch(UNHEARD, name)} != set()


@pytest.mark.parametrize(
    "changes, rank, words",
    [
        ({}, 4, None),
        (
            {"lora_targets": r"blocks\..*"},
            4,
            "that make the sound, blocks.audio.cross_attention.k.kernel for one",
        ),
        ({"lora_targets": r"blocks\.audio_to_video\..*"}, 4, None),
        ({"lora_targets": r"blocks\.video_to_audio\.q"}, 4, "trains 1 arrays"),
        ({"lora_differences": r"blocks\.audio\..*bias"}, 4, "executor.differences"),
        ({"lora_targets": r"blocks\..*", "audio_counts": True}, 4, None),
        ({"lora_targets": r"blocks\..*", "audio": "off"}, 4, None),
        ({}, None, "executor.rank = 0 trains"),
    ],
)
def test_a_loss_of_the_picture_that_trains_the_sound_is_a_warning(changes, rank, words):
    notes = make(**changes).training_notes(rank)
    assert len(notes) == (words is not None) and (words is None or re.search(words, notes[0]))


@pytest.mark.parametrize("changes", [{"lora_targets": ".*"}, {"lora_differences": r"audio\.head\.bias"}])
def test_weights_that_would_never_change_are_refused(changes):
    with pytest.raises(ValueError, match=r"names audio\.head\.(kernel|bias).*would never change"):
        make(**changes).training_notes(4)
    assert make(**changes, audio_counts=True).training_notes(4) == []
