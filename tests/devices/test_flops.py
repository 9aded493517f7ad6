"""Counted operations against sums by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from world_distill.devices.flops import count
from world_distill.devices.sharding import make_mesh
from world_distill.models.attention import splash_attention


def flops(f, *shapes):
    return count(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def test_products_and_convolutions():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bhn,bhm->bnm", a, b), (2, 3, 5), (2, 3, 7)) == 2 * 2 * 3 * 5 * 7
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    assert flops(conv, (1, 8, 8, 4), (3, 3, 4, 6)) == 2 * 8 * 8 * 6 * 3 * 3 * 4


def test_a_loop_counts_each_turn_and_a_branch_the_costliest():
    step = lambda c, _: (c @ c, None)  # noqa: E731
    assert flops(lambda a: jax.lax.scan(step, a, None, length=5)[0], (4, 4)) == 5 * 2 * 4**3
    branch = lambda a: jax.lax.cond(a.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, a)  # noqa: E731
    assert flops(branch, (4, 4)) == 2 * 2 * 4**3


def test_frozen_weights_cost_no_gradient_and_remat_a_forward_more():
    def loss(x, w, remat):
        f = lambda x: jnp.tanh(x @ w) @ w  # noqa: E731
        return (jax.checkpoint(f) if remat else f)(x).sum()

    one = 2 * 2 * 6 * 6
    frozen = jax.grad(loss)
    assert flops(lambda x, w: frozen(x, w, False), (2, 6), (6, 6)) == 4 * one
    assert flops(lambda x, w: jax.grad(loss, (0, 1))(x, w, False), (2, 6), (6, 6)) == 6 * one
    again = jax.make_jaxpr(lambda x, w: frozen(x, w, True))(jnp.ones((2, 6)), jnp.ones((6, 6)))
    assert count(again) > 4 * one == count(again, remat=False)


def test_a_part_of_each_device_counts_for_all():
    mesh = make_mesh(data=8, fsdp=1)
    f = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(f, (16, 5), (5, 7)) == 2 * 16 * 5 * 7


def test_operations_within_kernels_are_told_apart():
    """Of two heads of 128 over 256 tokens, next to a product."""
    shapes = [jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.float32)] * 3

    def f(q, k, v):
        return jnp.sum(splash_attention(q, k, v, interpret=True) @ jnp.ones((128, 5)))

    jaxpr = jax.make_jaxpr(f)(*shapes)
    attention, product = 2 * 2 * 2 * 256 * 256 * 128, 2 * 2 * 256 * 128 * 5
    assert count(jaxpr, kernels=True) == attention
    assert count(jaxpr) == attention + product
