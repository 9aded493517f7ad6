"""Blocked attention against attention with all scores in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from world_distill.devices import chips
from world_distill.devices.sharding import make_mesh, replicated
from world_distill.models.attention import attend, attend_on, blocked_attention, suited
from world_distill.models.flash import SAVED, key_tile, tile
from world_distill.programs import plan


def inputs(queries, keys, dtype=jnp.float32):
    keys_of = jax.random.split(jax.random.key(0), 4)
    lengths = (queries, keys, keys, queries)  # the last one weighs the output
    return [jax.random.normal(key, (2, n, 3, 8)).astype(dtype) for key, n in zip(keys_of, lengths, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(f, q, k, v, weights):
    y, pull = jax.vjp(f, q, k, v)
    return y, *pull(weights)


@pytest.mark.parametrize("queries, keys", [(10, 7), (8, 12)])
def test_blocks_change_neither_values_nor_gradients(queries, keys):
    *qkv, weights = inputs(queries, keys)
    expected = value_and_grads(lambda *a: attend(*a, "xla"), *qkv, weights)
    found = value_and_grads(lambda *a: blocked_attention(*a, rows=4), *qkv, weights)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_loses_no_more_than_with_all_scores_in_memory():
    *qkv, weights = inputs(10, 7, jnp.bfloat16)
    exact = value_and_grads(lambda *a: attend(*a, "xla"), *(x.astype(jnp.float32) for x in (*qkv, weights)))
    plain = value_and_grads(lambda *a: attend(*a, "xla"), *qkv, weights)
    for a, b, c in zip(value_and_grads(attend, *qkv, weights), plain, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(a - c).max() < 1.5 * np.abs(b - c).max() + 1e-3


def test_scores_that_overflow_are_no_infinities():
    q = jnp.full((1, 2, 1, 4), 1e3)
    assert np.isfinite(value_and_grads(attend, q, q, q, q)[1]).all()


def test_dots_policy_keeps_the_output_and_no_scores():
    q, k, v, _ = inputs(8, 12)
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
    )
    pull = jax.vjp(jax.checkpoint(blocked_attention, policy=policy), q, k, v)[1]
    shapes = {x.shape for x in jax.tree.leaves(pull)}
    assert not any(12 in shape[-1:] for shape in shapes), shapes
    assert any(x.size == q.size and x.ndim == 5 for x in jax.tree.leaves(pull)), shapes


@pytest.mark.parametrize("kind, one_pass", [("splash", False), ("splash", True), ("flash", False)])
@pytest.mark.parametrize("queries, keys", [(128, 128), (150, 37), (40, 2300), (300, 2300)])  # whole; filled up; several
def test_the_kernels_for_tpus_give_the_same_values_and_gradients(queries, keys, kind, one_pass):
    *qkv, weights = (jnp.tile(x, (1, 1, 1, 16)) for x in inputs(queries, keys))  # heads of 128
    expected = value_and_grads(lambda *a: attend(*a, "xla"), *qkv, weights)
    found = value_and_grads(lambda *a: attend(*a, kind, one_pass=one_pass), *qkv, weights)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "length, queries, keys",
    [(32760, 1024, 2048), (6144, 1024, 2048), (27280, 1024, 1536), (600, 128, 128), (512, 512, 512), (126, 128, 128)],
)
def test_tiles_are_large_and_add_little_to_a_sequence(length, queries, keys):
    assert (tile(length), key_tile(length + -length % tile(length))) == (queries, keys)


# All heads divide; groups of two devices exchange tokens for heads; no heads to exchange; groups beside `tensor`.
@pytest.mark.parametrize("heads, context, tensor", [(4, 4, 1), (6, 4, 1), (3, 8, 1), (12, 4, 2)])
def test_devices_that_share_a_clip_attend_to_all_of_it(heads, context, tensor):
    mesh = make_mesh(fsdp=8 // context // tensor, context=context, tensor=tensor)
    draws = jax.random.normal(jax.random.key(0), (4, 8 // context // tensor, 40, heads, 8))
    share = lambda q, k, v: attend_on(mesh, q, k, v, itself=True, keys=23)  # noqa: E731
    alone = lambda q, k, v: attend_on(None, q, k, v, itself=True, keys=23)  # noqa: E731
    spread = jax.device_put(draws, NamedSharding(mesh, PartitionSpec(None, "fsdp", "context", "tensor")))
    for found, expected in zip(value_and_grads(share, *spread), value_and_grads(alone, *draws), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_that_tensor_does_not_divide_are_refused_with_the_axis_that_takes_them():
    mesh = make_mesh(fsdp=1, context=2, tensor=4)
    x = jnp.ones((1, 8, 6, 8))
    with pytest.raises(ValueError, match=r"6 attention heads do not divide by mesh\.tensor = 4; use mesh\.context"):
        attend_on(mesh, x, x, x, itself=True)


@pytest.mark.parametrize("kind", ["blocked", "xla", "splash", "flash"])
def test_what_lies_behind_the_keys_is_none(kind):
    """And what it holds does not matter, to values and to gradients."""
    *qkv, weights = (jnp.tile(x, (1, 1, 1, 16)) for x in inputs(128, 128))
    q, k, v = qkv
    found = value_and_grads(lambda q, k, v: attend(q, k, v, kind, keys=100), *qkv, weights)
    expected = value_and_grads(lambda q, k, v: attend(q, k[:, :100], v[:, :100], "xla"), *qkv, weights)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    other = value_and_grads(
        lambda q, k, v: attend(q, k, v, kind, keys=100), q, k.at[:, 100:].add(9.0), v.at[:, 100:].add(9.0), weights
    )
    np.testing.assert_array_equal(other[0], found[0])


@pytest.mark.parametrize(
    "platform, dtype, head, kind",
    [
        ("cpu", jnp.float32, 128, "blocked"), ("tpu", jnp.bfloat16, 128, "splash"), ("tpu", jnp.bfloat16, 64, "xla"),
        ("gpu", jnp.bfloat16, 128, "cudnn"), ("gpu", jnp.float32, 128, "xla"), ("gpu", jnp.bfloat16, 256, "xla"),
    ],
)  # fmt: skip
def test_the_platform_chooses(platform, dtype, head, kind):
    assert suited(platform, jnp.zeros((1, 1, 1, head), dtype)) == kind


@pytest.mark.parametrize(
    "name, tokens, kind",
    [("v5p", 32760, "flash"), ("v5p", 81000, "splash"), ("v6e", 81000, "flash"), ("v4", 32760, "splash")],
)
def test_a_chip_gets_our_kernel_where_its_fast_memory_holds_the_gradient_of_a_head(name, tokens, kind):
    chip = chips.chip(f"TPU {name}")
    assert suited("tpu", jnp.zeros((1, tokens, 1, 128), jnp.bfloat16), chip) == kind


def gradients_on(topology, heads, tokens=32760, kind=None):
    pytest.importorskip("libtpu", reason="libtpu is in the extra `tpu`")
    mesh = make_mesh(devices=plan.topology(topology)[:1])
    x = jax.ShapeDtypeStruct((1, tokens, heads, 128), jnp.bfloat16, sharding=replicated(mesh))
    loss = lambda q, k, v: attend_on(mesh, q, k, v, kind, itself=True).astype(jnp.float32).sum()  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x)


@pytest.mark.parametrize(
    "topology, heads, passes", [("v5e:2x2", 10, 2), ("v5e:2x2", 4, 1), ("v6e:2x2", 10, 1), ("v6e:2x2", 40, 2)]
)
def test_gradients_come_from_one_computation_of_the_scores_where_memory_has_room(topology, heads, passes):
    text = gradients_on(topology, heads, kind="splash").as_text()
    assert ("splash_mha_dq" in text) == (passes == 2) and "splash_mha_dkv" in text


# As many tokens as a core of v5p takes; v6e's own limit is far above any clip.
@pytest.mark.parametrize("topology, tokens", [("v5e:2x2", 32760), ("v5p:2x2x1", 77000), ("v6e:2x2", 77000)])
def test_the_compiler_accepts_our_kernels_for_long_clips(topology, tokens):
    text = gradients_on(topology, 1, tokens).compile().as_text()
    assert "flash_forward" in text and "flash_backward" in text and "splash" not in text


def test_keys_that_fill_up_do_nothing_where_all_scores_are_far_below_theirs():
    """Theirs are 0, and others below -100: e^100 of the sum that they do not belong to would be infinite."""
    *qkv, weights = (jnp.tile(x, (1, 1, 1, 16)) for x in inputs(130, 150))
    q, k, v = qkv
    q, k = 1.0 + 0.1 * q, 0.1 * k - 13.0
    assert jnp.einsum("bnhe,bmhe->bhnm", q, k).max() / 128**0.5 < -100
    run = lambda kind: value_and_grads(lambda *a: attend(*a, kind, keys=140), q, k, v, weights)  # noqa: E731
    for a, b in zip(run("flash"), run("xla"), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_tiles_without_a_key_are_left_out():
    *qkv, weights = (jnp.tile(x, (1, 1, 1, 16)) for x in inputs(40, 4300))
    for keys in (2048, 300):
        found, expected = (
            value_and_grads(functools.partial(attend, kind=kind, keys=keys), *qkv, weights) for kind in ("flash", "xla")
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_our_kernels_round_no_worse_than_attention_with_all_scores_in_memory():
    exact = value_and_grads(lambda *a: attend(*a, "xla"), *(jnp.tile(x, (1, 1, 1, 16)) for x in inputs(300, 2300)))
    half = [jnp.tile(x, (1, 1, 1, 16)) for x in inputs(300, 2300, jnp.bfloat16)]
    errors = {}
    for kind in ("flash", "xla"):
        found = value_and_grads(lambda *a, kind=kind: attend(*a, kind), *half)
        errors[kind] = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]
    assert np.all(np.array(errors["flash"]) < 1.2 * np.array(errors["xla"])), errors
