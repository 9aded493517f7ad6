import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import tokens, told

from world_distill.core.guidance import guided, with_guidance
from world_distill.devices import cycles
from world_distill.devices.sharding import batch_sharding, make_mesh, replicated
from world_distill.structs import Tokens

B, L, D = 2, 3, 5
MASK = np.array([True, True, False])


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs():
    condition = told(draw(0, B, L, D), jnp.ones((B, L), bool), draw(1, B, 1, 2, 2, 4))
    return jnp.float32(0.8), None, {"video": draw(2, B, 3, 2, 2, 4)}, jnp.float32([0.9, 0.3]), condition


def denoise(base, lora, x, t, condition):
    """Depends on everything that it is told, row by row."""
    text = condition.text["text"]
    hint = jnp.sum(text.states * text.mask[..., None], axis=(1, 2)) + t
    return {"video": base * jnp.sin(x["video"] + hint[:, None, None, None, None]) + condition.scene["video"]}


def test_guidance_is_the_formula_in_one_call():
    rows = []

    def counted(base, lora, x, *rest):
        rows.append(len(x["video"]))
        return denoise(base, lora, x, *rest)

    negative = draw(3, L, D)
    base, lora, x, t, condition = inputs()
    v = jax.jit(guided(counted, 5.0, tokens(negative, jnp.asarray(MASK))))(base, lora, x, t, condition)["video"]
    assert rows == [2 * B]
    twice = Tokens(jnp.stack([negative] * B), jnp.asarray(np.stack([MASK] * B)))
    without = condition.replace(text={"text": twice})
    v_text, v_negative = (jax.jit(denoise)(base, lora, x, t, c)["video"] for c in (condition, without))
    np.testing.assert_allclose(v, -4 * v_negative + 5 * v_text, atol=1e-5)
    assert np.abs(v - v_text).max() > 0.1


def test_velocities_are_combined_in_float32():
    def coarse(*inputs):
        return jax.tree.map(lambda v: v.astype(jnp.bfloat16), denoise(*inputs))

    v = jax.jit(guided(coarse, 1.7, tokens(draw(3, L, D), jnp.asarray(MASK))))(*inputs())["video"]
    assert v.dtype == jnp.float32
    assert (v != v.astype(jnp.bfloat16)).mean() > 0.5


def test_scale_1_is_the_denoiser_itself():
    assert guided(denoise, 1.0, tokens(draw(3, L, D))) is denoise


@pytest.mark.parametrize("scale", [0.0, 0.99, -2.0, float("inf"), float("nan")])
def test_bad_scales_are_refused(scale):
    with pytest.raises(ValueError, match="at least 1, which turns guidance off"):
        guided(denoise, scale, tokens(draw(3, L, D)))


def test_texts_of_other_lengths_are_refused():
    call = guided(denoise, 5.0, tokens(draw(3, L + 1, D)))
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(4, 5\).*pad them"):
        call(*inputs())


def test_texts_of_other_names_are_refused():
    call = guided(denoise, 5.0, {**tokens(draw(3, L, D)), "glyphs": tokens(draw(3, L, D))["text"]})
    with pytest.raises(ValueError, match=r"\['text'\].*\['glyphs', 'text'\]"):
        call(*inputs())


def test_a_program_without_guidance_needs_no_negative_text():
    assert with_guidance(denoise, 1.0, None) is denoise
    with pytest.raises(ValueError, match="guidance of scale 2 needs"):
        with_guidance(denoise, 2.0, None)


def test_no_row_leaves_its_device():
    """A batch behind another one would be dealt out anew; 16 rows on 8 devices, without any collective."""
    mesh = make_mesh()
    rows = lambda *shape: draw(4, 2 * mesh.size, *shape)  # noqa: E731
    condition = told(rows(L, D), jnp.ones((2 * mesh.size, L), bool), rows(1, 2, 2, 4))
    given = ({"video": rows(3, 2, 2, 4)}, rows(), condition)
    placed = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), given)
    negative = tokens(draw(3, L, D), jnp.asarray(MASK))

    @jax.jit
    def run(negative, x, t, condition):
        return with_guidance(denoise, 3.0, negative)(jnp.float32(0.8), None, x, t, condition)

    negatives = jax.device_put(negative, replicated(mesh))
    assert cycles.estimate(run.lower(negatives, *placed).compile().as_text()).counts == {}
    v = run(negatives, *placed)["video"]
    assert v.sharding.is_equivalent_to(batch_sharding(mesh), v.ndim)
    np.testing.assert_allclose(v, run(negative, *given)["video"], atol=1e-5)
