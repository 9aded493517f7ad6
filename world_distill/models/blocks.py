"""What the blocks of a video transformer share: what their backward pass keeps, and how their tokens lie on a mesh.

The tokens n of a clip are one sequence. Every token of the residual stream is by itself, so tokens lie along the mesh
axes `context` and `tensor`. They are gathered along `tensor` before the products that are split by heads or hidden
units, and the products' sums are scattered (sequence parallelism: Korthikanti et al., arXiv 2205.05198).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import constrain, pin_order, platform_of
from world_distill.models.flash import SAVED, tile
from world_distill.models.layers import Linear, Lora
from world_distill.models.products import joint_product
from world_distill.structs import PyTree

# What a backward pass computes again: nothing; all but matrix products and attention ("dots"); all but attention; the
# whole block ("full"). All but "none" keep the inputs of blocks; "offload" is "full" with these in the host's memory.
Remat = Literal["none", "dots", "attention", "full", "offload"]

# An activation's axes on the residual stream, and within attention and MLP.
_STREAM = ("batch", "stream", None)
_WITHIN = ("batch", "length", None)

_BLOCK_INPUT = "block_input"
_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)
_KEPT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "attention": _ATTENTION,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_BLOCK_INPUT],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


def scan_blocks(
    block: Callable[[PyTree, Any], PyTree],
    x: PyTree,
    layers: Any,
    remat: Remat,
    *,
    lay: Callable[[PyTree], PyTree] = lambda x: x,
    unroll: int = 1,
) -> PyTree:
    """`x` after all blocks, one after the other: `x = block(x, layer)`.

    Args:
      block: one block, given the residual stream and one layer's weights.
      x: the residual stream; a tree of arrays where there are several.
      layers: weights with a leading axis of layers.
      remat: what the backward pass computes again.
      lay: lays out the input of each block, which is kept for the backward pass (`StreamLayout.lay`).
      unroll: blocks in one turn of the loop.
    """

    def body(x, layer):
        return block(checkpoint_name(lay(x), _BLOCK_INPUT), layer), None

    if remat != "none":
        body = jax.checkpoint(body, policy=_KEPT[remat])
    return jax.lax.scan(body, x, layers, unroll=unroll)[0]


def spread_times(y: Float[Array, "b s d"], columns: np.ndarray) -> Float[Array, "b n d"]:
    """`y[:, columns]`, for each token the row of its time.

    Made of choices between runs of tokens, which the compiler repeats where the result is read. A lookup it would write
    out.
    """
    tokens = jnp.arange(len(columns))[:, None]
    result = y[:, columns[0], None]
    for start in np.flatnonzero(np.diff(columns)) + 1:
        result = jnp.where(tokens < start, result, y[:, columns[start], None])
    return jnp.broadcast_to(result, (len(y), len(columns), y.shape[-1]))


def gated(x: Float[Array, "b n d"], h: Float[Array, "b n d"], gate: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """`x + gate h`, in float32."""
    return (x.astype(jnp.float32) + h.astype(jnp.float32) * gate).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """Where the activations [b n d] of a transformer lie.

    Attributes:
      mesh: devices; None leaves the layout to the compiler.
    """

    mesh: Mesh | None

    def length(self, tokens: int) -> int:
        """The length that a clip's tokens are filled up to, which the devices that share them divide.

        On TPUs it is whole tiles of the attention kernel, which then reads and writes the tokens as they lie, and 16
        rows on each chip: a TPU scatters sums by 16 rows, or else sends all of them to each chip.
        """
        ways = 1 if self.mesh is None else self.mesh.shape["context"] * self.mesh.shape["tensor"]
        if platform_of(self.mesh) == "tpu":
            scattered = 16 * ways if ways > 1 else 1
            for unit in (math.lcm(tile(tokens), scattered), scattered):
                if -tokens % unit <= tokens // 16:
                    return tokens + -tokens % unit
        return tokens + -tokens % ways

    def lay(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """`x` as the residual stream lies, and its gradient too."""
        return constrain(self.mesh, x, _STREAM)

    def gather(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """From the residual stream into attention or MLP; the gradient's sums are scattered."""
        return constrain(self.mesh, x, _WITHIN, _STREAM)

    def scatter(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """From attention or MLP to the residual stream; the gradient is gathered."""
        return constrain(self.mesh, x, _STREAM, _WITHIN)

    def rows(self, x: Float[Array, "*n d"]) -> Float[Array, "*m d"]:
        """[n d] on one CPU, where XLA would else transpose each activation for the gradient of the matrix it meets.

        Elsewhere `x` itself: there, batch and tokens may lie on several devices.
        """
        return x.reshape(-1, x.shape[-1]) if self._alone else x

    @property
    def _alone(self) -> bool:
        """Whether this is one CPU."""
        return (self.mesh is None or self.mesh.size == 1) and platform_of(self.mesh) == "cpu"

    def up(
        self, x: Float[Array, "b n d"], layers: Sequence[Linear], loras: Sequence[Lora], scale: float
    ) -> list[Float[Array, "*n o"]]:
        """Products of one input with layers that are split by what they give: heads, hidden units.

        LoRA's inner products are made where the tokens lie, for all layers at once, and gathered with them.
        """
        adapted = [lora for lora in loras if lora is not None]
        if not adapted or self._alone:
            h = self.rows(self.gather(x))
            return [layer(h, lora, scale) for layer, lora in zip(layers, loras, strict=True)]
        factors = [self.factors(layer, lora) for layer, lora in zip(layers, loras, strict=True)]
        together = self._whole_gradient(jnp.concatenate([a for a, _ in filter(None, factors)], axis=-1))
        inner = constrain(self.mesh, together, *_inner_names(layers[0])).astype(x.dtype)
        gathered = self.gather(jnp.concatenate([x, self.lay(scale * (x @ inner))], axis=-1))
        h: Array = _pin_rows(self.mesh, gathered)
        found, start = [], 0
        for layer, pair in zip(layers, factors, strict=True):
            if pair is None:
                found.append(layer(h[..., : x.shape[-1]]))
                continue
            rank = pair[1].shape[0]
            outer = self._whole_gradient(jnp.pad(pair[1], ((start, inner.shape[-1] - start - rank), (0, 0))))
            outer = constrain(self.mesh, outer, *_outer_names(layer))
            found.append(layer.add_bias(joint_product(h, layer.dense_kernel, outer)))
            start += rank
        return found

    def down(self, x: Float[Array, "b n *i"], layer: Linear, lora: Lora, scale: float) -> Float[Array, "*n o"]:
        """The product with a layer that is split by what it is given, all axes of `x` behind the tokens.

        Its sums and LoRA's inner ones are scattered together.
        """
        parts = x.shape[2:]
        if self._alone:
            return layer(self.rows(x.reshape(*x.shape[:2], -1)), lora, scale)
        kernel, factors = layer.dense_kernel.reshape(*parts, -1), self.factors(layer, lora)
        if factors is None:
            return layer.add_bias(self.scatter(jnp.tensordot(x, kernel, len(parts))))
        a, b = (factor.astype(x.dtype) for factor in factors)
        inner = self.scatter(jnp.tensordot(x, a.reshape(*parts, -1), len(parts)))
        y = self.scatter(jnp.tensordot(x, kernel, len(parts)))
        return layer.add_bias(y + (scale * inner) @ b)

    def _whole_gradient(self, x: Array) -> Array:
        """Factors in one array, whose gradient is scattered along `fsdp` before each factor's is cut out of it."""
        # XLA for TPUs fails where it does both at once.
        return _gradient_first(x) if self.mesh is not None and self.mesh.shape["fsdp"] > 1 else x

    def factors(self, layer: Linear, lora: Lora) -> tuple[Float[Array, "i r"], Float[Array, "r o"]] | None:
        """LoRA's factors, gathered along `fsdp` as the layer's weights are (`settle`); gradients are scattered."""
        if lora is None:
            return None
        return constrain(self.mesh, lora["a"], *_inner_names(layer)), constrain(
            self.mesh, lora["b"], *_outer_names(layer)
        )

    def settle(self, block: nnx.Module, cut_out: nnx.Module) -> None:
        """Gathers the weights of one block along `fsdp`, and fixes where a TPU keeps them.

        The compiler would else spread a product over the devices that share its weights: parts of it come one after the
        other, each with its own zeros to write into and its own copies. Kernels of int8 are gathered before they are
        turned into the model's dtype, which is twice as wide.

        Args:
          block: cut out of the stacked blocks. Its kernels keep the order in memory that the stacked ones have. Else
            the compiler copies the kernels of all blocks, into the order that suits a product best.
          cut_out: a part of the block whose weights a TPU cuts out before they are used. A wide product that cuts them
            out itself takes a fifth longer.
        """
        for _, layer in nnx.iter_modules(block):
            if isinstance(layer, Linear):
                lay = functools.partial(_settled, self.mesh, names=layer.axes)
                layer.kernel.set_value(jax.tree.map(lay, layer.kernel.get_value()))  # an array, or those of int8
        if platform_of(self.mesh) == "tpu":
            nnx.update(cut_out, jax.lax.optimization_barrier(nnx.state(cut_out)))


def _settled(mesh: Mesh | None, kernel: Array, names: tuple[str | None, ...]) -> Array:
    """One kernel as `StreamLayout.settle` lays it out, and its gradient as the kernel lay before."""
    return constrain(mesh, pin_order(mesh, kernel, names, (0, 1)), tuple(map(_whole, names)), names)


def _own(name: str | None) -> str:
    """The name of a factor's wide axis as it is kept, given its layer's (`lora.lora_axes`)."""
    return name if name == "embed" else "factor"


def _inner_names(layer: Linear) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Names of the axes of LoRA's inner factor [i r] as it is used, and of its gradient."""
    inputs = layer.axes[0]
    return (_whole(inputs), None), (_own(inputs), None)


def _outer_names(layer: Linear) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Names of the axes of LoRA's outer factor [r o] as it is used, and of its gradient."""
    outputs = layer.axes[1]
    return (None, _whole(outputs)), (None, _own(outputs))


def _whole(name: str | None) -> str | None:
    """A weight's logical axis once it is gathered along `fsdp`."""
    return None if name == "embed" else name


@jax.custom_vjp
def _gradient_first(x: Array) -> Array:
    """`x`, whose gradient is complete before anything is made of it."""
    return x


_gradient_first.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pin_rows(mesh: Mesh | None, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """`pin_order` of gathered tokens, row by row. Only forward: a pinned gradient would be summed on every device."""
    return pin_order(mesh, x, _WITHIN, (0, 1, 2))


_pin_rows.defvjp(lambda mesh, x: (_pin_rows(mesh, x), None), lambda mesh, _, dx: (dx,))
