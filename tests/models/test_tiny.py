"""The small video model: against a plain re-implementation, and what its contract promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import redraw
from streams import counts_of, shape_of, tokens, told, velocity_of

from tests.models import make_goldens, plain_tiny
from tests.models.tiny_inputs import CONFIG, base_weights, inputs, make_family, random_lora
from world_distill import build, models
from world_distill.core import flow, sampling
from world_distill.data.records.batches import pad_texts
from world_distill.devices.sharding import RULES, make_mesh, tree_shardings
from world_distill.errors import UserError
from world_distill.models.hashed_words import encode_text
from world_distill.models.tiny import codec
from world_distill.models.tiny.modeling import T_MIN
from world_distill.settings.loading import load_config
from world_distill.storage.weight_files import load_weights, save_weights
from world_distill.weights import base_model


@pytest.fixture(scope="module")
def base():
    return base_weights()


@functools.cache
def denoiser(**changes):
    return jax.jit(velocity_of(make_family(dataclasses.replace(CONFIG, **changes))))


@functools.cache
def cleaner():
    return jax.jit(lambda base, lora, x, *told: make_family().predict_clean(base, lora, {"video": x}, *told)["video"])


def velocity(base, x_t, t, condition, lora=None):
    return np.asarray(denoiser()(base, lora, x_t, t, condition))


def close(value, expected, tolerance=2e-4):
    np.testing.assert_allclose(value, expected, atol=tolerance * np.abs(expected).max())


# ---- The network


def plain_velocity(base, x_t, t, condition, lora=None, scale=1.0):
    put_in = np.concatenate([condition.scene["video"], x_t[:, 1:]], axis=1)
    times = np.stack([np.zeros(len(t)), t, t], axis=1)  # the scene's frame is clean
    text = condition.text["text"].states, condition.text["text"].mask
    clean = plain_tiny.predict_clean(base, CONFIG, put_in, times, *text, lora, scale)
    v = (np.float64(x_t) - clean) / np.float64(t)[:, None, None, None, None]
    v[:, 0] = 0.0
    return v


def test_the_network_is_the_plain_one(base):
    """All parameters are random: gates, tables and output layers that start at zero would hide what is before them."""
    x_t, t, condition = inputs()
    expected = plain_velocity(base, x_t, t, condition)
    close(velocity(base, x_t, t, condition), expected)
    # What the network itself says is a good part of it.
    still = (x_t - condition.scene["video"]) / t[:, None, None, None, None]
    assert np.abs(expected[:, 1:] - still[:, 1:]).max() > 0.5


def test_the_network_with_lora_is_the_plain_one(base):
    family = make_family(lora_targets=".*", lora_scale=0.5)
    shapes = jax.eval_shape(lambda key: family.init_lora(key, base, rank=2), jax.random.key(0))
    lora = redraw(shapes, 3, 0.3)
    x_t, t, condition = inputs()
    expected = plain_velocity(base, x_t, t, condition, lora, 0.5)
    close(jax.jit(velocity_of(family))(base, lora, x_t, t, condition), expected)
    assert not np.allclose(expected, plain_velocity(base, x_t, t, condition), atol=0.1)


@pytest.mark.parametrize("merge_lora", [False, True])
def test_velocities_are_the_committed_ones(base, merge_lora):
    with np.load(make_goldens.PATH) as golden:
        plain, adapted = golden["v"], golden["v_lora"]
    family = make_family(lora_targets=".*", lora_scale=make_goldens.SCALE, merge_lora=merge_lora)
    x_t, t, condition = inputs()
    close(jax.jit(velocity_of(family))(base, random_lora(), x_t.at[:, 0].set(1e3), t, condition), adapted)
    close(velocity(base, x_t, t, condition), plain)
    assert not np.allclose(plain, adapted, atol=0.1)


def value_and_gradient(**changes):
    """Mean square of the velocity, and its gradients with respect to base and LoRA."""
    x_t, t, condition = inputs()
    denoise = velocity_of(make_family(dataclasses.replace(CONFIG, **changes)))
    loss = lambda base, lora: jnp.square(denoise(base, lora, x_t, t, condition)).mean()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(base_weights(), some_lora())


def some_lora():
    return redraw(
        jax.eval_shape(lambda key: make_family().init_lora(key, base_weights(), rank=2), jax.random.key(0)), 3
    )


@pytest.fixture(scope="module")
def plain_gradient():
    return value_and_gradient(unroll=1)


def test_turns_of_the_scan_and_remat_change_neither_value_nor_gradient(plain_gradient):
    jax.tree.map(functools.partial(close, tolerance=1e-4), value_and_gradient(unroll=2, remat=True), plain_gradient)


def test_a_turn_of_the_scan_may_be_longer_than_the_model(base):
    close(denoiser(unroll=5)(base, None, *inputs()), velocity(base, *inputs()), 1e-5)


def test_every_weight_has_a_say(plain_gradient):
    _, (gradient, _) = plain_gradient
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        each = leaf.reshape(len(leaf), -1) if name.startswith("blocks") else leaf.reshape(1, -1)
        assert np.all(np.abs(each).max(-1) > 1e-7), name


# ---- Condition and contract


def test_the_scene_is_pinned(base):
    x_t, t, condition = inputs()
    v = velocity(base, x_t, t, condition)
    assert not v[:, 0].any() and v[:, 1:].all()
    np.testing.assert_array_equal(counts_of(make_family()), [0, 1, 1])
    other = x_t.at[:, 0].set(1e3)
    np.testing.assert_array_equal(velocity(base, other, t, condition), v)


def test_velocity_and_clean_latents_belong_together(base):
    x_t, t, condition = inputs()
    clean = np.asarray(cleaner()(base, None, x_t, t, condition))
    v = velocity(base, x_t, t, condition)
    expected = (np.asarray(x_t) - clean)[:, 1:] / np.asarray(t)[:, None, None, None, None]
    close(v[:, 1:], expected, 1e-5)
    # Close to the data the denominator stays where it is.
    for small in (T_MIN / 5, 0.0):
        times = jnp.full_like(t, small)
        clean = np.asarray(cleaner()(base, None, x_t, times, condition))
        close(velocity(base, x_t, times, condition)[:, 1:], (np.asarray(x_t) - clean)[:, 1:] / T_MIN, 1e-5)


def test_padding_has_no_influence(base):
    x_t, t, condition = inputs()
    v = velocity(base, x_t, t, condition)
    text, mask = condition.text["text"].states, condition.text["text"].mask
    garbage = jnp.where(mask[..., None], text, 50.0)
    np.testing.assert_array_equal(velocity(base, x_t, t, condition.replace(text=tokens(garbage, mask))), v)
    longer = condition.replace(
        text=tokens(jnp.pad(text, ((0, 0), (0, 3), (0, 0)), constant_values=7.0), jnp.pad(mask, ((0, 0), (0, 3))))
    )
    close(velocity(base, x_t, t, longer), v, 1e-5)
    # But what is no padding has.
    real = condition.replace(text=tokens(text))
    changed = np.abs(velocity(base, x_t, t, real) - v).max(axis=(1, 2, 3, 4))
    assert changed[0] == 0 and changed[1] > 1e-2


def test_rows_are_independent(base):
    x_t, t, condition = inputs()
    v = velocity(base, x_t, t, condition)
    order = np.array([1, 0])
    turned = velocity(base, x_t[order], t[order], jax.tree.map(lambda x: x[order], condition))
    np.testing.assert_allclose(turned, v[order], atol=1e-5)
    one = inputs(seed=9)
    mixed = jax.tree.map(lambda mine, other: other.at[1].set(mine[1]), (x_t, t, condition), one)
    w = velocity(base, *mixed)
    np.testing.assert_allclose(w[1], v[1], atol=1e-5)
    assert np.abs(w[0] - v[0]).max() > 1e-2


@pytest.mark.parametrize("what", ["text", "scene", "t", "x_t", "lora"])
def test_all_that_goes_in_matters(base, what):
    x_t, t, condition = inputs()
    v = velocity(base, x_t, t, condition)
    lora = None
    if what == "lora":
        lora = some_lora()
    elif what == "t":
        # Not by the division alone.
        clean = [cleaner()(base, None, x_t, t * s, condition) for s in (1.0, 0.5)]
        assert np.abs(clean[0] - clean[1])[:, 1:].min(axis=0).max() > 1e-2
        return
    elif what == "x_t":
        x_t = x_t.at[:, 2, 0, 0].add(1.0)
    else:
        moved = jax.tree.map(lambda x: x.at[:, 0].add(0.5) if x.dtype != bool else x, getattr(condition, what))
        condition = condition.replace(**{what: moved})
    changed = np.abs(velocity(base, x_t, t, condition, lora) - v)
    assert np.all(changed[:, 1:].max(axis=(2, 3, 4)) > 1e-3)  # in every row and every free frame


def test_weights_may_lie_in_parts(base):
    """Heads, widths and rows split over 8 devices: the same velocities."""
    family = make_family()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    split = jax.device_put(base, tree_shardings(mesh, family.base_axes(), base))
    assert len(split["blocks"]["mlp"]["up"]["kernel"].sharding.shard_shape((2, 32, 64))) == 3
    assert split["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 16, 32)
    x_t, t, condition = inputs()
    close(np.asarray(denoiser()(split, None, x_t, t, condition)), velocity(base, x_t, t, condition), 1e-5)


# ---- Weights


def test_axes_name_every_dimension_of_every_weight():
    family = make_family()
    shapes = jax.eval_shape(family.init_base, jax.random.key(0))
    names = {name for name, _ in RULES}

    def check(shape, axes):
        assert len(axes) == len(shape.shape)
        assert all(a is None or a in names for a in axes)

    axes = family.base_axes()
    jax.tree.map(check, shapes, axes)
    assert tuple(axes["blocks"]["self_attention"]["q"]["kernel"]) == ("layers", "embed", "heads")
    assert tuple(axes["blocks"]["mlp"]["down"]["kernel"]) == ("layers", "mlp", "embed")
    assert tuple(axes["blocks"]["table"]) == ("layers", None, "embed")
    for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: not isinstance(x, dict)):
        assert ("layers" in tuple(leaf)) == (path[0].key == "blocks")


def test_a_new_base_is_a_function_of_its_key(base):
    family = make_family()
    make = jax.jit(family.init_base)
    first, again, other = make(jax.random.key(0)), make(jax.random.key(0)), make(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    up = first["blocks"]["mlp"]["up"]["kernel"]
    assert not np.array_equal(up, other["blocks"]["mlp"]["up"]["kernel"]) and not np.array_equal(up[0], up[1])
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, base)
    assert not first["head"]["kernel"].any()  # it begins by showing the scene, still
    x_t, t, condition = inputs()
    still = (x_t - condition.scene["video"]) / t[:, None, None, None, None]
    close(velocity(first, x_t, t, condition)[:, 1:], still[:, 1:], 1e-6)


def test_the_shipped_base_fits_the_default_config():
    config = load_config("sandbox", {})
    family = build.make_family(config)
    mesh = make_mesh(devices=jax.devices()[:1])
    weights = base_model.load_base(family, config, mesh)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    assert np.abs(weights["head"]["kernel"]).max() > 0  # it has been trained
    for path in family.shipped_bases.values():
        assert path.stat().st_size < 4 << 20
        facts = load_weights(path)[1]
        assert facts["command"].startswith("world-distill pretrain") and facts["seed"].isdigit()


def test_the_first_base_that_shipped_keeps_its_network():
    """Runs of earlier versions are of it: told to add the scene, its clips would be another model's."""
    config = load_config("sandbox", {"base": "1", "model.add_scene": False})
    family, mesh = build.make_family(config), make_mesh(devices=jax.devices()[:1])
    weights = base_model.load_base(family, config, mesh)
    first = load_weights(family.shipped_bases["1"])[0]
    np.testing.assert_array_equal(weights["head"]["kernel"], first["head"]["kernel"])
    clips, captions = build.make(config, "clips").batch(5, 0, 4)
    clean = family.codec.encode({}, jnp.asarray(clips))["video"]
    text = jax.tree.map(jnp.asarray, pad_texts(family.encoders.text(captions)["text"], config.text_length))
    condition = told(text.states, text.mask, clean[:, :1])
    errors = {}
    for add_scene in (False, True):
        built = build.make_family(load_config("sandbox", {"model.add_scene": add_scene}))
        t = jnp.full(4, 0.5)
        eps = jax.random.normal(jax.random.key(0), clean.shape)
        x_t = sampling.pin({"video": flow.interpolate(clean, eps, t)}, condition.scene, built.latents)
        predicted = built.predict_clean(weights, None, x_t, t, condition)["video"]
        errors[add_scene] = float(jnp.mean((predicted - clean)[:, 1:] ** 2))
    assert errors[False] < 0.1 * errors[True]


def test_weights_that_are_not_there_or_do_not_fit_are_named(tmp_path, base):
    small = {
        f"model.{k}": v for k, v in {"size": 12, "frames": 5, "stride": 2, "width": 32, "depth": 2, "heads": 2}.items()
    }
    path = tmp_path / "mine.safetensors"
    config = load_config("sandbox", {**small, "base": str(path)})
    family, mesh = build.make_family(config), make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="mine.safetensors is not there; `world-distill convert`"):
        base_model.load_base(family, config, mesh)
    weights = redraw(jax.eval_shape(family.init_base, jax.random.key(0)), 0)
    save_weights(path, weights, {})
    jax.tree.map(np.testing.assert_array_equal, base_model.load_base(family, config, mesh), weights)

    weights["extra"] = weights.pop("pooled")
    weights["text_in"]["kernel"] = weights["text_in"]["kernel"][:7]
    save_weights(path, weights, {})
    with pytest.raises(UserError) as error:
        base_model.load_base(family, config, mesh)
    for part in ("mine.safetensors", "missing pooled.bias (32,)", "unexpected extra.kernel", "(7, 32), not (64, 32)"):
        assert part in str(error.value)

    del weights["blocks"]
    save_weights(path, weights, {})
    with pytest.raises(UserError, match="of [0-9]+ arrays differ") as error:
        base_model.load_base(family, config, mesh)
    assert len(str(error.value).splitlines()) == 14 and "and " in str(error.value).splitlines()[-1]

    class Bare:
        name, shipped_bases = "bare", {}

    with pytest.raises(UserError, match="names no weights: --config.base=FOLDER .*convert`$"):
        base_model.load_base(Bare(), load_config("sandbox", {"base": ""}), mesh)


# ---- Sizes


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"size": 31}, "model.size=31 is not a multiple of model.patch=5"),
        ({"frames": 8}, r"model.frames=8 is not 1 \+ a multiple of model.stride=4"),
        ({"frames": 4, "stride": 2}, "model.frames=4"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        models.build("tiny", **sizes)


def test_sizes_that_fit():
    family = models.build("tiny", size=20, frames=7, patch=4, stride=3, width=32, heads=2)
    assert shape_of(family) == (3, 5, 5, 3 * 3 * 16)
    np.testing.assert_array_equal(counts_of(family), [0, 1, 1])
    with pytest.raises(ValueError, match="unknown model family 'huge'; there are: ltx2, tiny, wan,"):
        models.build("huge")


# ---- Codec


@pytest.mark.parametrize("patch, stride, groups", [(5, 4, 2), (2, 1, 3), (5, 2, 0)])
def test_codec_loses_nothing(patch, stride, groups):
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (2, 1 + stride * groups, 20, 40, 3), np.uint8)
    latents = codec.encode(jnp.asarray(clips), patch, stride)
    assert latents.shape == (2, 1 + groups, 20 // patch, 40 // patch, 3 * stride * patch**2)
    np.testing.assert_array_equal(codec.decode(latents, patch, stride), clips)
    # The first latent frame knows the first frame only, and each later one its own group.
    first = codec.encode(jnp.asarray(clips[:, :1]), patch, stride)
    np.testing.assert_array_equal(latents[:, :1], first)
    if groups:
        changed = clips.copy()
        changed[:, -1] ^= 255
        np.testing.assert_array_equal(codec.encode(jnp.asarray(changed), patch, stride)[:, :-1], latents[:, :-1])


def test_a_latent_pixel_is_its_patch():
    clips = np.zeros((1, 3, 4, 6, 3), np.uint8)
    clips[0, 1, 2:, 4:] = 255  # the second frame's last patch
    latents = np.asarray(codec.encode(jnp.asarray(clips), 2, 2))
    assert np.abs(latents[0, 1] - latents[0, 1, 0, 0]).max(-1).nonzero()[0].tolist() == [1]
    assert np.abs(latents[0, 1] - latents[0, 1, 0, 0]).max(-1).nonzero()[1].tolist() == [2]
    np.testing.assert_array_equal(latents[0, 0], np.broadcast_to(latents[0, 0, 0, 0], latents[0, 0].shape))


def test_decoding_clips_what_no_byte_can_hold():
    latents = jnp.stack([jnp.full((2, 1, 1, 12), v) for v in (-100.0, 100.0, 0.0)])
    frames = np.asarray(codec.decode(latents, 2, 1))
    assert frames.dtype == np.uint8 and frames.shape == (3, 2, 2, 2, 3)
    assert np.all(frames[0] == 0) and np.all(frames[1] == 255) and np.all(frames[2] == round(0.93 * 255))


def test_scenes_are_encoded_like_first_frames():
    family = models.build("tiny", size=20, frames=5, patch=5, stride=2, width=32, heads=2)
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), np.uint8)
    scenes = family.encoders.scene({}, images)["video"]
    assert isinstance(scenes, np.ndarray) and scenes.shape == (2, 1, 4, 4, 150) and scenes.dtype == np.float32
    clips = np.repeat(images[:, None], 5, axis=1)
    np.testing.assert_array_equal(family.codec.encode({}, jnp.asarray(clips))["video"][:, :1], scenes)
    latents = jnp.concatenate([scenes, jnp.zeros((2, 2, 4, 4, 150))], axis=1)
    frames = family.codec.decode({}, {"video": latents})
    assert frames.shape == (2, 5, 20, 20, 3)
    np.testing.assert_array_equal(frames[:, 0], images)
    for height, width in ((25, 25), (20, 25)):
        with pytest.raises(ValueError, match=f"{height}x{width} pixels; this model takes 20x20"):
            family.encoders.scene({}, np.zeros((1, height, width, 3), np.uint8))


# ---- Text


def test_text_encoder_is_fixed():
    """The shipped base knows these very vectors."""
    states = encode_text("The red disc moves.", 64)
    assert states.shape == (4, 64) and states.dtype == np.float32
    np.testing.assert_array_equal(states, encode_text("the  RED disc: moves", 64))
    np.testing.assert_allclose(states[0, :3], [0.8348095, 1.6495727, -2.538923], atol=1e-6)
    family = make_family()
    texts = ["one step", "two steps up"]
    encoded = family.encoders.text(texts)["text"]
    assert [e.shape for e in encoded] == [(2, 8), (3, 8)]
    np.testing.assert_array_equal(encoded[1], encode_text(texts[1], 8))


def test_words_share_what_they_have_in_common():
    def state(text, i):
        words = encode_text(text, 256)
        place = encode_text(" ".join(f"w{i}x{k}" for k in range(len(words))), 256)  # any words: for the places only
        return words[i], place[i]

    same, _ = state("a red disc moves", 3)
    near, _ = state("b red disc moves", 3)  # the word and the two before it are the same
    far, _ = state("a red b moves", 3)  # the word itself is
    other, _ = state("a red disc stops", 3)
    np.testing.assert_array_equal(same, near)
    gaps = [np.linalg.norm(same - s) for s in (far, other)]
    assert 0 < gaps[0] < gaps[1]  # two of three vectors differ, then all three
    assert gaps[0] ** 2 == pytest.approx(2 * 2 / 3 * 256, rel=0.2) and gaps[1] ** 2 == pytest.approx(2 * 256, rel=0.2)
    # The same n-gram at another place differs by the places' sinusoids, which are small.
    later = encode_text("so a red disc moves", 256)[4]
    assert 0 < np.linalg.norm(later - same) < gaps[0]


def test_order_of_words_matters():
    a, b = encode_text("red disc to blue ring", 64), encode_text("blue disc to red ring", 64)
    assert np.abs(np.sort(a, axis=0) - np.sort(b, axis=0)).max() > 0.1


def test_the_empty_text_is_one_token_and_looks_like_no_word(base):
    """Guidance compares a text with the empty one: attention over it must have something to attend to."""
    empty = encode_text("", 64)
    assert empty.shape == (1, 64) and np.abs(empty).max() > 0.1
    assert not any(np.allclose(empty, encode_text(word, 64)) for word in ("s", "a", "the"))
    x_t, t, condition = inputs()
    mask = np.zeros_like(condition.text["text"].mask)
    mask[:, :1] = True
    text = np.zeros_like(condition.text["text"].states)
    text[:, :1] = encode_text("", text.shape[-1])
    v = velocity(base, x_t, t, condition.replace(text=tokens(jnp.asarray(text), jnp.asarray(mask))))
    assert np.isfinite(v).all() and np.abs(v - velocity(base, x_t, t, condition)).max() > 1e-2


@pytest.mark.parametrize("text", ["  ", "?!…"])
def test_text_without_words_is_refused(text):
    with pytest.raises(ValueError, match="without words"):
        encode_text(text, 8)
