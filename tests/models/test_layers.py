"""Layers against formulas written out in numpy, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from world_distill.models import layers

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def make(layer, *sizes, **options):
    with nnx.use_eager_sharding(False):  # one device: the names of the axes are for others
        return layer(*sizes, rngs=nnx.Rngs(0), **options)


def redraw(module, seed=1):
    """Gives every parameter random values, those that start at zero or one too."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, jnp.float32), state))
    return module


def dense(linear):
    """Weights and bias of a linear layer, in float64."""
    return np.float64(linear.kernel[...]), np.float64(linear.bias[...])


# ---- RMSNorm, modulation, timestep features


def test_rms_norm():
    x, weight = 3 * draw(2, 5, 8), draw(8)
    x64 = np.float64(x)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.rms_norm(x), expected, rtol=1e-5)
    np.testing.assert_allclose(layers.rms_norm(x, weight), expected * np.float64(weight), rtol=1e-5, atol=1e-6)
    tiny = layers.rms_norm(jnp.full((1, 4), 1e-3))
    np.testing.assert_allclose(tiny, 1e-3 / math.sqrt(2e-6), rtol=1e-5)  # eps is inside the root
    assert not np.any(layers.rms_norm(jnp.zeros((1, 4))))


def test_rms_norm_of_half_precision_is_computed_in_single():
    x = jnp.asarray(300 * draw(4, 64), jnp.bfloat16)
    y = layers.rms_norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, layers.rms_norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_modulate():
    x, scale, shift = draw(2, 3, 8), draw(2, 3, 8), draw(2, 3, 8)
    normed = np.float64(x) / np.sqrt((np.float64(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        layers.modulate(x, scale, shift), normed * (1 + np.float64(scale)) + np.float64(shift), rtol=1e-5, atol=1e-5
    )


def test_sinusoid():
    t = jnp.float32([[0.0, 0.3], [7.5, 999.0]])
    features = np.asarray(layers.sinusoid(t, 6))
    assert features.shape == (2, 2, 6)
    for place, value in np.ndenumerate(np.float64(t)):
        for i in range(3):
            angle = value * 10_000 ** (-i / 3)
            assert features[place][i] == pytest.approx(math.cos(angle), abs=1e-4)
            assert features[place][3 + i] == pytest.approx(math.sin(angle), abs=1e-4)


# ---- Rotary embedding


def test_rope_tables_are_the_formula_in_double_precision():
    grid, dims, theta = (3, 2, 4), (4, 2, 6), 50.0
    cos, sin = layers.rope_tables(grid, dims, theta)
    assert cos.shape == sin.shape == (24, 6) and cos.dtype == sin.dtype == np.float32
    row = 0
    for f in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                angles = [
                    p * theta ** (-2 * i / d) for p, d in zip((f, y, x), dims, strict=True) for i in range(d // 2)
                ]
                np.testing.assert_array_equal(cos[row], np.float32([math.cos(a) for a in angles]))
                np.testing.assert_array_equal(sin[row], np.float32([math.sin(a) for a in angles]))
                row += 1


def test_rope_tables_stay_exact_far_out():
    """Angles of single precision would be off by 1e-4 and more there."""
    cos, _ = layers.rope_tables((20_001, 1, 1), (8, 2, 2), 100.0)
    expected = [math.cos(20_000 * 100.0 ** (-i / 4)) for i in range(4)]
    np.testing.assert_allclose(cos[20_000, :4], expected, atol=1e-7)


def test_rope_needs_even_dimensions():
    with pytest.raises(ValueError, match=r"even.*\(4, 3, 2\)"):
        layers.rope_tables((2, 2, 2), (4, 3, 2), 100.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rope_scores_depend_on_relative_position_along_each_axis(axis):
    grid, dims = (4, 5, 6), (4, 6, 6)
    tables = layers.rope_tables(grid, dims, 10.0)
    places = [p for p in np.ndindex(grid) if all(v == 1 for i, v in enumerate(p) if i != axis)]
    rows = [np.ravel_multi_index(p, grid) for p in places]
    q, k = draw(1, 1, 1, 16), draw(1, 1, 1, 16)
    here = [t[rows] for t in tables]
    turned_q, turned_k = (
        np.float64(layers.apply_rope(jnp.repeat(v, len(rows), axis=1), *here))[0, :, 0] for v in (q, k)
    )
    scores = turned_q @ turned_k.T
    by_distance = {}
    for i in range(len(rows)):
        for j in range(len(rows)):
            by_distance.setdefault(i - j, []).append(scores[i, j])
    for same in by_distance.values():
        np.testing.assert_allclose(same, same[0], atol=1e-5)
    middle = sorted(s[0] for s in by_distance.values())
    assert min(np.diff(middle)) > 1e-4  # and every distance gives another score


def test_rope_is_a_rotation():
    tables = layers.rope_tables((2, 3, 2), (4, 2, 2), 100.0)
    x, y = draw(2, 12, 3, 8), draw(2, 12, 3, 8)
    turned_x, turned_y = layers.apply_rope(x, *tables), layers.apply_rope(y, *tables)
    np.testing.assert_allclose((turned_x * turned_y).sum(-1), (x * y).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(turned_x[:, 0], x[:, 0])  # the origin is not turned
    assert not np.allclose(turned_x[:, -1], x[:, -1], atol=0.1)
    # Neighbours are pairs: the first two entries turn by the first angle of the first axis.
    one = layers.apply_rope(jnp.eye(8)[None, :1, None].repeat(12, axis=1), *tables)
    np.testing.assert_allclose(one[0, 6, 0], [math.cos(1), math.sin(1), *[0] * 6], atol=1e-6)


# ---- Linear maps


def test_linear_with_lora_is_the_dense_sum():
    layer = redraw(make(layers.Linear, 6, 5, (None, "embed")))
    x, a, b = draw(2, 3, 6), draw(6, 2), draw(2, 5)
    kernel, bias = dense(layer)
    np.testing.assert_allclose(layer(x), np.float64(x) @ kernel + bias, rtol=1e-5, atol=1e-5)
    merged = kernel + 0.7 * np.float64(a) @ np.float64(b)
    np.testing.assert_allclose(layer(x, {"a": a, "b": b}, 0.7), np.float64(x) @ merged + bias, rtol=1e-5, atol=1e-5)


def test_linear_options():
    plain = make(layers.Linear, 6, 5, (None, "embed"), bias=False)
    assert plain.bias is None and set(nnx.to_pure_dict(nnx.state(plain))) == {"kernel"}
    x = draw(3, 6)
    np.testing.assert_allclose(plain(x), np.float64(x) @ np.float64(plain.kernel[...]), rtol=1e-5, atol=1e-6)
    assert np.any(plain(x))
    assert not np.any(make(layers.Linear, 6, 5, (None, None), zero=True)(x))


def test_sub_finds_what_is_there():
    assert layers.sub(None, "q") is None
    assert layers.sub({"q": {}}, "k") is None
    assert layers.sub({"q": {"a": 1}}, "q") == {"a": 1}


def test_mlp():
    mlp = redraw(make(layers.Mlp, 4, 12))
    x = draw(3, 4)
    (w1, b1), (w2, b2) = dense(mlp.up), dense(mlp.down)
    h = np.float64(x) @ w1 + b1
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(mlp(x), h @ w2 + b2, rtol=1e-5, atol=1e-5)


# ---- Attention


def rotate(x, cos, sin):
    """[h e] turned by one row of the tables, pair by pair."""
    out = np.array(x, np.float64)
    for i, (c, s) in enumerate(zip(np.float64(cos), np.float64(sin), strict=True)):
        out[:, 2 * i] = c * x[:, 2 * i] - s * x[:, 2 * i + 1]
        out[:, 2 * i + 1] = s * x[:, 2 * i] + c * x[:, 2 * i + 1]
    return out


def naive_attention(module, x, context=None, mask=None, rope=None):
    """Softmax attention by loops over rows, queries and heads."""
    heads = module.heads
    source = np.float64(x if context is None else context)
    q, k, v = (
        s @ w + b
        for s, (w, b) in zip((np.float64(x), source, source), map(dense, (module.q, module.k, module.v)), strict=True)
    )

    def split(row, norm=None):
        row = row.reshape(heads, -1)
        if norm is None:
            return row
        return row / np.sqrt((row**2).mean(-1, keepdims=True) + 1e-6) * np.float64(norm[...])

    out = np.zeros_like(q)
    for b in range(len(x)):
        queries, keys = [split(r, module.q_norm) for r in q[b]], [split(r, module.k_norm) for r in k[b]]
        values = [split(r) for r in v[b]]
        if rope is not None:
            queries = [rotate(r, rope[0][i], rope[1][i]) for i, r in enumerate(queries)]
            keys = [rotate(r, rope[0][i], rope[1][i]) for i, r in enumerate(keys)]
        seen = [j for j in range(len(keys)) if mask is None or mask[b, j]]
        for i, query in enumerate(queries):
            row = []
            for h in range(heads):
                scores = np.array([query[h] @ keys[j][h] for j in seen]) / math.sqrt(query.shape[-1])
                weights = np.exp(scores - scores.max())
                row.append(sum(w * values[j][h] for w, j in zip(weights / weights.sum(), seen, strict=True)))
            out[b, i] = np.concatenate(row)
    w, bias = dense(module.out)
    return out @ w + bias


@pytest.fixture(scope="module")
def attention():
    return redraw(make(layers.Attention, 16, 2))


def test_self_attention_with_rope(attention):
    rope = layers.rope_tables((2, 1, 3), (4, 2, 2), 10.0)
    x = draw(2, 6, 16)
    y = attention(x, rope=rope)
    np.testing.assert_allclose(y, naive_attention(attention, x, rope=rope), rtol=1e-4, atol=1e-5)
    assert not np.allclose(y, attention(x), atol=1e-2)  # positions matter


def test_cross_attention_with_mask(attention):
    x, context = draw(2, 3, 16), draw(2, 5, 16)
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
    y = attention(x, context, jnp.asarray(mask))
    np.testing.assert_allclose(y, naive_attention(attention, x, context, mask), rtol=1e-4, atol=1e-5)
    other = jnp.where(mask[..., None], context, 1e3)
    np.testing.assert_array_equal(attention(x, other, jnp.asarray(mask)), y)  # what is masked has no say at all


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_attention_adapts_each_of_its_layers(attention, name):
    x = draw(1, 4, 16)
    a, b = draw(16, 2), draw(2, 16)
    merged = nnx.clone(attention)
    layer = getattr(merged, name)
    layer.kernel[...] = layer.kernel[...] + 0.5 * a @ b
    y = attention(x, lora={name: {"a": a, "b": b}}, scale=0.5)
    np.testing.assert_allclose(y, merged(x), rtol=1e-4, atol=1e-4)
    assert not np.allclose(y, attention(x), atol=1e-2)


def test_layer_norm_in_one_pass_keeps_a_large_mean_apart_and_stays_finite_where_nothing_varies():
    x = np.random.default_rng(0).normal(size=(4, 512)) + 30.0
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-3)
    # Rounding of the two sums may leave less than nothing of the variance.
    rows = 1000.1 + 1e-3 * np.random.default_rng(1).normal(size=(64, 500))
    y, back = jax.vjp(layers.layer_norm, jnp.asarray(rows, jnp.float32))
    assert np.isfinite(y).all() and np.isfinite(back(y)[0]).all()
