"""Executors beside the base: equal to it when fresh, to the merged weights when trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import redraw
from streams import velocity_of

from tests.models.tiny_inputs import base_weights, inputs, make_family
from world_distill.devices.sharding import RULES
from world_distill.models import lora as lora_lib


@pytest.fixture(scope="module")
def base():
    return base_weights()


@functools.cache
def denoiser(scale=1.0):
    return jax.jit(velocity_of(make_family(lora_scale=scale)))


def velocity(base, lora, scale=1.0):
    x_t, t, condition = inputs()
    return np.asarray(denoiser(scale)(base, lora, x_t, t, condition))


def merge(base, lora, scale):
    """The base with scale A B added to each adapted kernel, in float64."""
    merged = dict(base)
    for name, value in lora.items():
        if "a" in value and not isinstance(value["a"], dict):
            change = scale * np.matmul(np.float64(value["a"]), np.float64(value["b"]))
            merged[name] = base[name] | {"kernel": jnp.asarray(base[name]["kernel"] + change, jnp.float32)}
        else:
            merged[name] = merge(base[name], value, scale)
    return merged


# ---- What an Executor is


@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
def test_a_fresh_executor_is_the_base_bit_for_bit(base, rank):
    fresh = make_family().init_lora(jax.random.key(3), base, rank=rank)
    np.testing.assert_array_equal(velocity(base, fresh), velocity(base, None))
    assert not np.allclose(velocity(base, redraw(fresh, 4)), velocity(base, None), atol=1e-2)


def test_full_differences_are_added_to_the_weights(base):
    family = make_family()
    full = family.init_lora(jax.random.key(0), base, rank=None)
    assert jax.tree.map(jnp.shape, full) == {"full": jax.tree.map(jnp.shape, base)}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(full))
    full = redraw(full, 5, 0.05)
    moved = jax.tree.map(lambda w, d: w + d, base, full["full"])
    np.testing.assert_array_equal(velocity(base, full), velocity(moved, None))
    # Every weight has its difference: none is left out, none is added twice.
    weights, rest = lora_lib.apply_full(base, full)
    assert rest is None
    jax.tree.map(np.testing.assert_array_equal, weights, moved)


def test_lora_is_a_low_rank_change_of_stacked_and_single_layers(base):
    shapes = jax.eval_shape(lambda key: make_family().init_lora(key, base, rank=4), jax.random.key(0))
    lora = redraw(shapes, 6)
    assert lora["blocks"]["mlp"]["up"]["a"].shape == (2, 32, 4)
    assert lora["blocks"]["mlp"]["up"]["b"].shape == (2, 4, 64)
    assert lora["text_in"]["a"].shape == (8, 4)
    for scale in (1.0, 2.5):
        expected = velocity(merge(base, lora, scale), None)
        np.testing.assert_allclose(velocity(base, lora, scale), expected, atol=2e-4 * np.abs(expected).max())
    assert not np.allclose(velocity(base, lora, 1.0), velocity(base, lora, 2.5), atol=1e-2)


def test_each_block_has_its_own_factors(base):
    """One layer's factors do not reach the others, and none is ignored."""
    targets = r"blocks\.mlp\.down"
    lora = redraw(lora_lib.init_lora(jax.random.key(3), base, rank=2, targets=targets), 7)
    for layer in range(2):
        only = jax.tree.map(lambda x, layer=layer: jnp.zeros_like(x).at[layer].set(x[layer]), lora)
        change = np.einsum("ir,ro->io", *(np.float64(only["blocks"]["mlp"]["down"][k][layer]) for k in "ab"))
        kernel = base["blocks"]["mlp"]["down"]["kernel"].at[layer].add(change)
        down = base["blocks"]["mlp"]["down"] | {"kernel": kernel}
        moved = base | {"blocks": base["blocks"] | {"mlp": base["blocks"]["mlp"] | {"down": down}}}
        expected = velocity(moved, None)
        np.testing.assert_allclose(velocity(base, only), expected, atol=2e-4 * np.abs(expected).max())
        assert not np.allclose(expected, velocity(base, None), atol=1e-3)


# ---- Where LoRA goes


def adapted(lora, prefix=""):
    """Dotted paths of the layers that a LoRA tree has factors for."""
    paths = set()
    for name, value in lora.items():
        path = f"{prefix}{name}"
        paths |= {path} if value.keys() == {"a", "b"} else adapted(value, f"{path}.")
    return paths


def test_targets_choose_layers_by_their_whole_path(base):
    def chosen(targets):
        make = functools.partial(lora_lib.init_lora, base=base, rank=2, targets=targets)
        return adapted(jax.eval_shape(make, jax.random.key(0)))

    assert chosen(r"blocks\.self_attention\.(q|v)") == {"blocks.self_attention.q", "blocks.self_attention.v"}
    assert chosen("text_in") == {"text_in"}
    assert chosen(".*_out") == {"text_out", "time_out"}
    attentions = {f"blocks.{a}_attention.{name}" for a in ("self", "cross") for name in ("q", "k", "v", "out")}
    assert chosen(r"blocks\..*") == attentions | {"blocks.mlp.up", "blocks.mlp.down"}
    # All linear layers, and nothing but those: tables and norms have no kernel.
    with_kernel = {
        ".".join(k.key for k in path[:-1])
        for path, _ in jax.tree_util.tree_leaves_with_path(base)
        if path[-1].key == "kernel"
    }
    assert chosen(".*") == with_kernel


def test_targets_that_match_nothing_name_the_layers(base):
    with pytest.raises(ValueError, match=r"'blocks.q' match no layer.*blocks\.self_attention\.q.*text_out"):
        lora_lib.init_lora(jax.random.key(0), base, rank=2, targets="blocks.q")


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_rank_that_does_not_fit_names_the_layer(base, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} does not fit layer text_in of shape \(8, 32\)"):
        lora_lib.init_lora(jax.random.key(0), base, rank=rank, targets="text_in|text_out")


def test_factors_are_random_in_a_and_zero_in_b(base):
    make = functools.partial(lora_lib.init_lora, base=base, rank=8, targets=r"blocks\.(self_attention\..|mlp\..*)")
    lora, same, other = make(jax.random.key(0)), make(jax.random.key(0)), make(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, lora, same)
    seen = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(lora):
        if path[-1].key == "b":
            assert not leaf.any()
        else:
            assert np.std(leaf) == pytest.approx(leaf.shape[1] ** -0.5, rel=0.2)
            seen += [float(layer.ravel()[0]) for layer in leaf]
    seen += [float(leaf.ravel()[0]) for leaf in jax.tree.leaves(other) if leaf.any()]
    assert len(set(seen)) == len(seen)  # no two layers, blocks or keys share their noise


def test_shapes_are_known_without_weights(base):
    """`eval_shape` on abstract weights: what placing an Executor on a mesh is made of."""
    family = make_family()
    abstract = jax.eval_shape(family.init_base, jax.random.key(0))
    make = functools.partial(family.init_lora, rank=4)
    expected = jax.tree.map(jnp.shape, make(jax.random.key(0), base))
    assert jax.tree.map(lambda x: x.shape, jax.eval_shape(make, jax.random.key(0), abstract)) == expected


@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
def test_axes_mirror_the_tree(base, rank):
    family = make_family(lora_targets=".*")
    lora = jax.eval_shape(lambda key: family.init_lora(key, base, rank=rank), jax.random.key(0))
    axes = family.lora_axes(lora)
    names = {name for name, _ in RULES}

    def check(leaf, leaf_axes):
        assert len(leaf_axes) == leaf.ndim
        assert all(a is None or a in names for a in leaf_axes)

    jax.tree.map(check, lora, axes)  # raises where the structures differ
    if rank is not None:
        assert tuple(axes["blocks"]["self_attention"]["q"]["a"]) == ("layers", "embed", None)
        assert tuple(axes["blocks"]["self_attention"]["q"]["b"]) == ("layers", None, "factor")
        assert tuple(axes["text_out"]["a"]) == ("embed", None)


# ---- Training an Executor


def test_gradients_reach_every_adapted_layer_and_no_other(base):
    family = make_family(lora_targets=".*")
    lora = redraw(jax.eval_shape(lambda key: family.init_lora(key, base, rank=2), jax.random.key(0)), 8)
    fresh = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == "b" else x, lora)
    x_t, t, condition = inputs()

    @jax.jit
    def gradient(lora):
        return jax.grad(lambda w: jnp.square(velocity_of(family)(base, w, x_t, t, condition)).mean())(lora)

    # A fresh Executor learns by B alone, since A is multiplied by B = 0.
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(fresh)):
        size = np.abs(leaf).max(axis=(-1, -2))
        assert np.all((size > 0) == (path[-1].key == "b")), jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(lora)):
        assert np.all(np.abs(leaf).max(axis=(-1, -2)) > 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("rank", [2, None], ids=["lora", "full"])
def test_merged_weights_are_the_same_function_with_the_same_gradient(base, rank):
    apart, merged = (make_family(lora_targets=".*", lora_scale=0.5, merge_lora=m) for m in (False, True))
    lora = redraw(jax.eval_shape(lambda key: apart.init_lora(key, base, rank=rank), jax.random.key(0)), 8)
    lora = jax.tree.map(lambda x: 0.3 * x, lora)
    x_t, t, condition = inputs()

    def loss(family):
        return jax.jit(jax.value_and_grad(lambda w: jnp.square(velocity_of(family)(base, w, x_t, t, condition)).mean()))

    (one, gradient), (other, expected) = loss(merged)(lora), loss(apart)(lora)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))
    plain = lora_lib.merge(base, lora, 0.5)
    np.testing.assert_allclose(
        jax.jit(velocity_of(apart))(plain, None, x_t, t, condition),
        jax.jit(velocity_of(apart))(base, lora, x_t, t, condition),
        atol=1e-4,
    )
    assert lora_lib.merge(base, None, 0.5) is base
