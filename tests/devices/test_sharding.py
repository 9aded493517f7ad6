"""Meshes and shardings on 8 fake devices: what is declared is what is allocated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from world_distill.devices import sharding as meshes
from world_distill.models import build


@pytest.fixture
def mesh():
    return meshes.make_mesh(data=2, fsdp=2, context=1, tensor=2)


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def test_mesh_takes_the_rest_and_has_auto_axes():
    mesh = meshes.make_mesh(tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    one = meshes.make_mesh(devices=jax.devices()[:1])
    assert one.size == 1 and one.axis_names == meshes.MESH_AXES


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": 16},
        {"data": 2, "fsdp": 2},
        {"data": -1, "fsdp": -1},
        {"data": 0},
        {"data": 4, "fsdp": 4, "context": -1},
        {"data": -2},
    ],
)
def test_mesh_that_does_not_fit_is_refused_with_its_sizes(sizes):
    with pytest.raises(ValueError, match=f"data={sizes['data']}.*fsdp="):
        meshes.make_mesh(**sizes)


def test_rules_name_mesh_axes_only():
    for _, target in meshes.RULES:
        axes = (target,) if isinstance(target, str) else target or ()
        assert set(axes) <= set(meshes.MESH_AXES)
    assert len(dict(meshes.RULES)) == len(meshes.RULES)


def test_specs_follow_the_table(mesh):
    axes = {"up": ("layers", "embed", "mlp"), "x": ("batch", "length", None), "bias": None, "scalar": ()}
    tree = shapes(up=(3, 16, 64), x=(8, 6, 5), bias=(7,), scalar=())
    specs = jax.tree.map(lambda s: s.spec, meshes.tree_shardings(mesh, axes, tree))
    assert specs == {
        "up": PartitionSpec(None, "fsdp", "tensor"),
        "x": PartitionSpec(("data", "fsdp"), "context", None),
        "bias": PartitionSpec(),
        "scalar": PartitionSpec(),
    }


def test_a_mesh_axis_splits_one_dimension_only(mesh):
    got = meshes.tree_shardings(mesh, {"w": ("embed", "embed")}, shapes(w=(8, 8)))
    assert got["w"].spec == PartitionSpec("fsdp", None)


def test_small_leaf_that_does_not_divide_is_whole_on_that_axis(mesh):
    got = meshes.tree_shardings(mesh, {"w": ("embed", "mlp")}, shapes(w=(7, 64)))
    assert got["w"].spec == PartitionSpec(None, "tensor")


def test_a_width_that_nobody_chose_is_split_as_far_as_it_divides(mesh):
    for size, spec in ((8, PartitionSpec(("fsdp", "context", "tensor"))), (6, PartitionSpec(("fsdp", "context")))):
        [found] = jax.tree.leaves(meshes.tree_shardings(mesh, {"w": ("conv",)}, shapes(w=(size,))))
        assert found.spec == spec
    [found] = jax.tree.leaves(meshes.tree_shardings(mesh, {"w": ("conv",)}, shapes(w=(7,))))
    assert found.is_fully_replicated


def test_every_leaf_that_cannot_be_placed_is_named(mesh):
    axes = {"a": {"w": ("embed", "mlp")}, "b": ("embedd",), "c": ("embed",)}
    tree = {"a": shapes(w=(513, 1024)), **shapes(b=(4,), c=(4, 4))}
    with pytest.raises(ValueError) as error:
        meshes.tree_shardings(mesh, axes, tree)
    message = str(error.value)
    assert "['a']['w'] (513, 1024): embed = 513 is not divisible by fsdp = 2" in message
    assert "['b'] (4,): unknown axis name 'embedd'" in message
    assert "['c'] (4, 4): 1 axis names" in message


def test_trees_of_another_structure_are_refused(mesh):
    with pytest.raises(ValueError):
        meshes.tree_shardings(mesh, {"v": None}, shapes(w=(4,)))


def test_init_under_jit_allocates_shards(mesh):
    def init(key):
        return {"w": jax.random.normal(key, (3, 16, 64)), "bias": jnp.zeros(7)}

    tree = jax.eval_shape(init, jax.random.key(0))
    placed = meshes.tree_shardings(mesh, {"w": ("layers", "embed", "mlp"), "bias": None}, tree)
    sharded = jax.jit(init, out_shardings=placed)(jax.random.key(0))
    assert {s.data.shape for s in sharded["w"].addressable_shards} == {(3, 8, 32)}
    assert {s.data.shape for s in sharded["bias"].addressable_shards} == {(7,)}
    assert len(sharded["w"].addressable_shards) == 8
    np.testing.assert_array_equal(sharded["w"], init(jax.random.key(0))["w"])


def test_batch_is_split_over_data_and_fsdp(mesh):
    x = jax.device_put(np.arange(24).reshape(4, 6), meshes.batch_sharding(mesh))
    assert {s.data.shape for s in x.addressable_shards} == {(1, 6)}
    states = jax.device_put(np.zeros((3, 4, 2)), meshes.batch_sharding(mesh, axis=1))
    assert {s.data.shape for s in states.addressable_shards} == {(3, 1, 2)}
    whole = jax.device_put(np.zeros(5), meshes.replicated(mesh))
    assert {s.data.shape for s in whole.addressable_shards} == {(5,)}


def test_an_activation_and_its_gradient_lie_where_they_are_told(mesh):
    seen = []
    look = jax.custom_vjp(lambda x: x)

    def look_back(_, dx):
        jax.debug.inspect_array_sharding(dx, callback=seen.append)
        return (dx,)

    look.defvjp(lambda x: (x, None), look_back)

    def loss(x):
        y = meshes.constrain(mesh, look(jnp.sin(x)), ("batch", "length", None), ("batch", "stream", None))
        return jnp.sum(jnp.cos(meshes.constrain(mesh, y, ("batch", None, "heads"))))

    x = np.arange(4 * 6 * 8.0, dtype=np.float32).reshape(4, 6, 8)
    gradient = jax.jit(jax.grad(loss))(x)
    np.testing.assert_allclose(gradient, -np.sin(np.sin(x)) * np.cos(x), atol=1e-5)
    [found] = seen
    assert found.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor", None)), 3)


def test_an_activation_whose_axes_are_put_in_order_stays_where_it_is(mesh, monkeypatch):
    monkeypatch.setattr(meshes, "platform_of", lambda mesh: "tpu")
    names, x = ("batch", None, "heads"), np.arange(4 * 6 * 8.0, dtype=np.float32).reshape(4, 6, 8)

    def twice(x):
        return meshes.pin_order(mesh, meshes.constrain(mesh, 2 * x, names), names, (1, 0, 2))

    y, back = jax.jit(lambda x: jax.vjp(twice, x))(x)
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(back(y)[0], 4 * x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")), 3)


def test_nnx_reads_the_same_table(mesh):
    """Modules that carry their names agree with `tree_shardings`."""
    kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(meshes.RULES):
        abstract = nnx.eval_shape(lambda: nnx.Linear(16, 64, kernel_init=kernel, rngs=nnx.Rngs(0)))
        named = nnx.get_named_sharding(nnx.state(abstract), mesh)
    ours = meshes.tree_shardings(mesh, {"w": ("embed", "mlp")}, shapes(w=(16, 64)))
    assert named["kernel"].get_value().spec == ours["w"].spec


def test_a_family_declares_shardings_that_are_allocated():
    """The base of the small video model: split as declared, and each byte on as few devices as declared."""
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    family = build("tiny")
    tree = jax.eval_shape(family.init_base, jax.random.key(0))
    placed = meshes.tree_shardings(mesh, family.base_axes(), tree)
    base = jax.jit(family.init_base, out_shardings=placed)(jax.random.key(0))
    whole = sum(x.nbytes for x in jax.tree.leaves(base))
    held = sum(s.data.nbytes for x in jax.tree.leaves(base) for s in x.addressable_shards)
    assert held < 3 * whole  # 2 where all is split over fsdp and tensor, 8 where nothing is


def test_rows_are_cut_where_they_divide(mesh):
    assert meshes.rows_or_whole(mesh, 8) == meshes.batch_sharding(mesh)
    assert meshes.rows_or_whole(mesh, 6) == meshes.replicated(mesh)  # data * fsdp = 4


def test_accelerators_take_one_row_a_device_at_a_time_unless_told_otherwise(mesh, monkeypatch):
    assert meshes.rows_at_once(mesh, 16, None) == 0  # all, on CPUs
    monkeypatch.setattr(meshes, "platform_of", lambda mesh: "tpu")
    assert meshes.rows_at_once(mesh, 16, None) == 4  # data * fsdp: two devices share each row's heads
    assert meshes.rows_at_once(mesh, 16, 0) == 0 and meshes.rows_at_once(mesh, 16, 8) == 8
    assert meshes.rows_at_once(mesh, 6, None) == 0  # which 4 do not divide
    assert meshes.rows_at_once(None, 16, None) == 1


@pytest.mark.parametrize("rows", [0, 2, 4, 8])
def test_rows_that_are_mapped_a_few_at_a_time_come_back_in_their_order(rows):
    x, scale = np.arange(24.0).reshape(8, 3), np.arange(8.0)
    found = jax.jit(lambda x, s: meshes.map_rows(lambda x, s: (x * s[:, None], -s), rows, x, s))(x, scale)
    np.testing.assert_array_equal(found[0], x * scale[:, None])
    np.testing.assert_array_equal(found[1], -scale)
    with pytest.raises(ValueError, match="3 rows at a time do not divide 8"):
        meshes.map_rows(lambda x: x, 3, x)


def test_an_optimisers_state_lies_where_its_weights_do(mesh):
    weights = {"q": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}, "table": jnp.zeros((8, 4))}
    places = {
        "q": {"kernel": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), "bias": meshes.replicated(mesh)},
        "table": NamedSharding(mesh, PartitionSpec("tensor", None)),
    }
    state = {"mu": weights, "nu": {"q": {"kernel": jnp.zeros((8, 4))}}, "table": jnp.zeros(3), "count": jnp.zeros(())}
    other = meshes.batch_sharding(mesh)
    found = meshes.like_weights(state, weights, places, other)
    assert found["mu"] == places and found["nu"]["q"]["kernel"] == places["q"]["kernel"]
    assert found["table"] == found["count"] == other  # a path that ends alike, but another shape
