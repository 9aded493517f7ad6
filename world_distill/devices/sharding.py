"""Where every array lies: one table from logical axis names to the axes of the device mesh.

A model names the axes of a parameter where the parameter is born (`"embed"`, `"mlp"`, ...) and knows
nothing of devices. `RULES` maps the names to four mesh axes:

    data     copies of the weights, another part of the batch each
    fsdp     another part of the batch each, and the weights in parts, gathered layer by layer
    context  parts of one clip's tokens
    tensor   parts of the heads and of the hidden units; between layers, of one clip's tokens, too

Shardings have to be handed to `jax.jit(init, out_shardings=...)`: without them the result comes back
replicated on every device, and nothing says so.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from world_distill.structs import PyTree

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Pairs, as `flax.nnx.logical_axis_rules` takes them. None: never split.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", "context"),  # tokens of a clip
    ("stream", ("context", "tensor")),  # the same on the residual stream, where each token is by itself
    ("embed", "fsdp"),  # the residual stream's width
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("head_dim", None),
    ("channels", None),  # of latents or of patches
    ("conv", ("fsdp", "context", "tensor")),  # channels of an autoencoder's, gathered all at once before use
    ("text", None),  # the text encoder's width
    ("rank", None),  # of LoRA factors
    ("factor", ("tensor", "fsdp")),  # the wide axis of a factor where the layer's is heads or mlp, or has no name
    ("layers", None),  # blocks stacked for scan
)

# Split along the first of their mesh axes, as many as divide: widths that nobody chose with devices in mind.
_AS_FAR_AS_EVEN = ("conv", "factor")

# Below this size a copy on every device costs less than an error would.
SMALL_BYTES = 1 << 20


def make_mesh(data: int = 1, fsdp: int = -1, context: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of all devices (or of `devices`) with the axes `MESH_AXES`; one size may be -1, the rest.

    Devices of several TPU slices, which are joined by a slower network, are split along `data` first.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` not to that of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, context, tensor]
    asked = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {asked}: sizes are positive, and at most one is -1 (the rest)")
    if -1 in sizes:
        others = -math.prod(sizes)
        sizes[sizes.index(-1)] = len(devices) // others  # 0 where the others are too many
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {asked} does not fit {len(devices)} device(s)")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    # Splitting: an axis of 64 on a torus of 16x16 takes one of its axes and a part of the other.
    if slices > 1:
        if sizes[0] % slices:
            raise ValueError(f"mesh {asked}: {slices} slices need mesh.data to be a multiple of {slices}")
        within = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto, since the default (explicit axes) makes shardings a part of every type.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def tree_shardings(mesh: Mesh, axes_tree: PyTree, shapes_tree: PyTree) -> PyTree:
    """A NamedSharding for every leaf of `shapes_tree`.

    Args:
      mesh: from `make_mesh`.
      axes_tree: like `shapes_tree`, with a tuple of logical names (or None) a dimension at each leaf,
        or None where the whole leaf is replicated.
      shapes_tree: arrays or `ShapeDtypeStruct`s, as from `jax.eval_shape`.

    A dimension that its mesh axes do not divide is not split if the leaf is small (`SMALL_BYTES`).

    Raises:
      ValueError: a large leaf does not divide, a name is not in `RULES`, or a leaf has more or fewer
        dimensions than names; every such leaf is named. Or the trees differ in structure.
    """
    problems: list[str] = []

    def leaf_sharding(path, shape, names) -> NamedSharding:
        try:
            return NamedSharding(mesh, _spec(mesh, names, shape))
        except ValueError as e:
            problems.append(f"{jax.tree_util.keystr(path)} {shape.shape}: {e}")
            return replicated(mesh)

    shardings = jax.tree_util.tree_map_with_path(leaf_sharding, shapes_tree, axes_tree)
    if problems:
        raise ValueError("no sharding for " + "; ".join(problems))
    return shardings


def constrain(
    mesh: Mesh | None, x: jax.Array, names: tuple[str | None, ...], gradient: tuple[str | None, ...] | None = None
) -> jax.Array:
    """An activation laid out by the logical names of its dimensions; one that does not divide is not split.

    Its gradient is laid out by the names `gradient`, or as it is itself.
    """
    if mesh is None or mesh.size == 1:
        return x
    there, back = (NamedSharding(mesh, dividing_spec(mesh, axes, x.shape)) for axes in (names, gradient or names))
    return _laid_out(there, back, x)


def spread_kept(mesh: Mesh | None, values: PyTree) -> PyTree:
    """Arrays [k b n p] with rows along data and fsdp, and places along context and tensor.

    Computing takes clips whole, a few at a time. What is kept of all clips for later would else lie as a copy on every
    device that shares a clip.
    """
    return jax.tree.map(lambda x: constrain(mesh, x, (None, "batch", None, "stream")), values)


def kept_rows(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """That of what all rollouts are told, arrays [b n ...]: rows along data and fsdp, n along context and tensor.

    An axis that does not divide is whole.
    """
    names = ("batch", "stream", *[None] * len(shape))[: len(shape)]
    return NamedSharding(mesh, dividing_spec(mesh, names, shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _laid_out(there: NamedSharding, back: NamedSharding, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, there)


_laid_out.defvjp(
    lambda there, back, x: (_laid_out(there, back, x), None),
    lambda there, back, _, dx: (jax.lax.with_sharding_constraint(dx, back),),
)


def pin_order(mesh: Mesh | None, x: jax.Array, names: tuple[str | None, ...], order: tuple[int, ...]) -> jax.Array:
    """An activation whose axes lie in a TPU's memory in this order, the innermost last, and its gradient too.

    Elsewhere `x` itself. What the compiler would else choose for `x` may suit only what makes it, and is copied for
    what reads it. `names` are of its dimensions, as for `constrain`.
    """
    if platform_of(mesh) != "tpu":
        return x
    lay = lambda x: with_layout_constraint(x, Layout(order))  # noqa: E731
    if mesh is None or mesh.size == 1:
        return lay(x)
    # For each device's part: of the whole, rows that lie along both data and fsdp would be gathered.
    spec = dividing_spec(mesh, names, x.shape)
    return jax.shard_map(lay, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def gathered(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """The tree, whole on every device."""
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def spread_pixels(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Frames [b f h w c] with rows along data and fsdp, and width or height along context and along tensor."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, pixels_spec(mesh, x.shape)))


def pixels_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of `spread_pixels` for frames of a shape [b f h w c]."""
    height, width = pixel_axes(mesh, *shape[2:4])
    rows = dividing_spec(mesh, ("batch",), shape[:1])[0]
    return PartitionSpec(rows, None, height or None, width or None, None)


def pixel_axes(mesh: Mesh, height: int, width: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the mesh that a frame's height and its width are divided by.

    Width is divided first; what divides neither by an axis of the mesh is not divided by it.
    """
    parts: list[tuple[str, ...]] = [(), ()]
    for axis in ("context", "tensor"):
        for dim, size in ((1, width), (0, height)):
            if size % math.prod(mesh.shape[name] for name in (*parts[dim], axis)) == 0:
                parts[dim] += (axis,)
                break
    return parts[0], parts[1]


def rows_at_once(mesh: Mesh | None, count: int, asked: int | None) -> int:
    """Of `count` rows, how many to compute at a time; 0: all.

    Args:
      mesh: devices that the rows lie on.
      count: of rows.
      asked: a setting; None: on accelerators one row on each device (on those that share it, along context and tensor),
        since a clip of thousands of tokens keeps a device busy, and more of them cost memory alone. On CPUs all: they
        compute small models.
    """
    if asked is not None:
        return asked
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return 0 if platform_of(mesh) == "cpu" or count % ways else ways


def map_rows(function: Callable[..., PyTree], rows: int, *trees: PyTree) -> PyTree:
    """`function(*trees)` of arrays [b ...], for `rows` of the rows at a time; 0: all at once.

    Raises:
      ValueError: `rows` does not divide b.
    """
    count = jax.tree.leaves(trees)[0].shape[0]
    if not rows or count <= rows:
        return function(*trees)
    done = map_turns(function, rows, *trees)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(count, *x.shape[2:]), done)


def map_turns(function: Callable[..., PyTree], rows: int, *trees: PyTree) -> PyTree:
    """`map_rows` whose results [t r ...] stay as the turns made them: row r of turn t is row `r turns + t` of all.

    Neighbouring rows lie on one device: each turn takes some of every device's.

    Raises:
      ValueError: `rows` does not divide b.
    """
    count = jax.tree.leaves(trees)[0].shape[0]
    if not rows or count <= rows:
        return jax.tree.map(lambda x: x[None], function(*trees))
    if count % rows:
        raise ValueError(f"{rows} rows at a time do not divide {count}")
    turns = count // rows
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(rows, turns, *x.shape[1:]), 1, 0), trees)
    return jax.lax.map(lambda part: function(*part), parts)


def dividing_spec(mesh: Mesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of an activation of a shape; a dimension that does not divide is left whole."""
    rules, parts = dict(RULES), []
    for name, size in zip(names, shape, strict=True):
        target = rules[name] if name else ()
        axes = (target,) if isinstance(target, str) else target or ()
        whole = size % math.prod(mesh.shape[axis] for axis in axes) != 0
        parts.append(None if whole or not axes else axes if len(axes) > 1 else axes[0])
    return PartitionSpec(*parts)


def platform_of(mesh: Mesh | None) -> str:
    """What a program on the mesh runs on, which need not be what this process has: "cpu", "gpu" or "tpu"."""
    if mesh is None:
        return jax.default_backend()
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Dimension `axis` is the batch, split over data and fsdp; every other one is whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, dict(RULES)["batch"]))


def rows_or_whole(mesh: Mesh, count: int) -> NamedSharding:
    """That of `batch_sharding` where it divides so many rows, else the whole on every device."""
    ways = math.prod(mesh.shape[axis] for axis in dict(RULES)["batch"])
    return replicated(mesh) if count % ways else batch_sharding(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _spec(mesh: Mesh, names: tuple[str | None, ...] | None, shape) -> PartitionSpec:
    """The partition of one leaf. Raises ValueError saying what does not fit."""
    if names is None:
        return PartitionSpec()
    if len(names) != len(shape.shape):
        raise ValueError(f"{len(names)} axis names {names}")
    rules, used, parts = dict(RULES), set(), []
    for name, size in zip(names, shape.shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"unknown axis name {name!r} (the names are {', '.join(rules)})")
        target = rules.get(name) if name else None
        axes = (target,) if isinstance(target, str) else target or ()
        axes = tuple(axis for axis in axes if axis not in used)  # one mesh axis splits one dimension
        while name in _AS_FAR_AS_EVEN and size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            nbytes = math.prod(shape.shape) * np.dtype(shape.dtype).itemsize
            if nbytes >= SMALL_BYTES:
                raise ValueError(f"{name} = {size} is not divisible by {'*'.join(axes)} = {ways}")
            axes = ()
        used.update(axes)
        parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*parts)


def like_weights(state: PyTree, weights: PyTree, shardings: PyTree, otherwise: jax.sharding.Sharding) -> PyTree:
    """Shardings for an optimiser's state: a leaf that belongs to a weight lies where the weight does.

    A leaf belongs to the weight whose path its own path ends with (as in `mu.blocks.q.kernel`) and whose shape it has;
    counters and the like get `otherwise`. Unlike `optax.tree.map_params`, this also sees through the masks of
    optimisers that treat some weights in another way (Muon).
    """
    known = {}
    for (path, weight), sharding in zip(
        jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(shardings), strict=True
    ):
        known[tuple(map(str, path))] = weight.shape, sharding

    def place(path, leaf):
        names = tuple(map(str, path))
        for start in range(len(names)):
            if names[start:] in known and known[names[start:]][0] == leaf.shape:
                return known[names[start:]][1]
        return otherwise

    return jax.tree_util.tree_map_with_path(place, state)
