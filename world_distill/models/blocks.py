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
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import constrain, pin_order, platform_of
from world_distill.models.attention import SAVED, tile
from world_distill.models.layers import Linear, Lora
from world_distill.models.products import joint_product

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
    block: Callable[[Array, Any], Array],
    x: Array,
    layers: Any,
    remat: Remat,
    *,
    lay: Callable[[Array], Array] = lambda x: x,
    unroll: int = 1,
) -> Array:
    """`x` after all blocks, one after the other: `x = block(x, layer)`.

    Args:
      block: one block, given the residual stream and one layer's weights.
      x: the residual stream.
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
        inner = jnp.concatenate([lora["a"] for lora in adapted], axis=-1).astype(x.dtype)
        h = self.gather(jnp.concatenate([x, self.lay(scale * (x @ inner))], axis=-1))
        h = pin_order(self.mesh, h, _WITHIN, (0, 1, 2))
        found, start = [], 0
        for layer, lora in zip(layers, loras, strict=True):
            if lora is None:
                found.append(layer(h[..., : x.shape[-1]]))
                continue
            rank = lora["b"].shape[0]
            outer = jnp.pad(lora["b"], ((start, inner.shape[-1] - start - rank), (0, 0)))
            # Where the layer's weights lie; else both would be gathered once more, joined.
            outer = constrain(self.mesh, outer, (None, layer.axes[1]), (None, "factor"))
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
        kernel = layer.dense_kernel.reshape(*parts, -1)
        if lora is None:
            return layer.add_bias(self.scatter(jnp.tensordot(x, kernel, len(parts))))
        inner = self.scatter(jnp.tensordot(x, lora["a"].astype(x.dtype).reshape(*parts, -1), len(parts)))
        y = self.scatter(jnp.tensordot(x, kernel, len(parts)))
        return layer.add_bias(y + (scale * inner) @ lora["b"].astype(x.dtype))

    def settle(self, block: nnx.Module, cut_out: nnx.Module) -> None:
        """Fixes where the weights of one block lie, as it is cut out of the stacked blocks.

        Args:
          block: its kernels are gathered along `fsdp`, those of int8 before they are turned into the model's dtype,
            which is twice as wide. On a TPU they keep the order in memory that the stacked ones have. Else the compiler
            copies the kernels of all blocks, into the order that suits a product best.
          cut_out: a part of the block whose weights a TPU cuts out before they are used. A wide product that cuts them
            out itself takes a fifth longer.
        """
        on_tpu = platform_of(self.mesh) == "tpu"
        for _, layer in nnx.iter_modules(block):
            if isinstance(layer, Linear):
                kernel = layer.kernel.get_value()  # an array or an Int8Kernel of two
                if on_tpu:
                    pin = functools.partial(pin_order, self.mesh, names=layer.axes, order=(0, 1))
                    kernel = jax.tree.map(pin, kernel)
                whole = tuple(None if name == "embed" else name for name in layer.axes)
                gather = functools.partial(constrain, self.mesh, names=whole, gradient=layer.axes)
                layer.kernel.set_value(jax.tree.map(gather, kernel))
        if on_tpu:
            nnx.update(cut_out, jax.lax.optimization_barrier(nnx.state(cut_out)))
