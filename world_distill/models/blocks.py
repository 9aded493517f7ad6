"""What the blocks of a video transformer share: what their backward pass keeps, and how their tokens lie on a mesh.

Tokens have two axes, frames f and the places m in a frame. Every token of the residual stream is by itself, so places
lie along the mesh axes `context` and `tensor`. They are gathered along `tensor` before the products that are split by
heads or hidden units, and the products' sums are scattered (sequence parallelism: Korthikanti et al., arXiv
2205.05198).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from world_distill.devices.sharding import constrain, platform_of
from world_distill.models.attention import SAVED

# What a backward pass computes again: nothing; all but matrix products and attention ("dots"); all but attention; the
# whole block ("full"). All but "none" keep the inputs of blocks; "offload" is "full" with these in the host's memory.
Remat = Literal["none", "dots", "attention", "full", "offload"]

# An activation's axes on the residual stream, and within attention and MLP.
_STREAM = ("batch", None, "stream", None)
_WITHIN = ("batch", None, "length", None)

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
    """Where the activations [b f m d] of a transformer lie.

    Attributes:
      mesh: devices; None leaves the layout to the compiler.
    """

    mesh: Mesh | None

    def spare_places(self, places: int) -> int:
        """How many to add to the places of a frame, so that they divide by the devices that share them."""
        if self.mesh is None:
            return 0
        ways = self.mesh.shape["context"] * self.mesh.shape["tensor"]
        if self.mesh.shape["tensor"] > 1 and platform_of(self.mesh) == "tpu":
            # Their compiler scatters sums only in whole tiles of 16 rows; else each chip gets all, and drops the rest.
            spare = -places % (16 * ways)
            if spare <= places // 16:
                return spare
        return -places % ways

    def lay(self, x: Float[Array, "b f m d"]) -> Float[Array, "b f m d"]:
        """`x` as the residual stream lies, and its gradient too."""
        return constrain(self.mesh, x, _STREAM)

    def gather(self, x: Float[Array, "b f m d"]) -> Float[Array, "b f m d"]:
        """From the residual stream into attention or MLP; the gradient's sums are scattered."""
        return constrain(self.mesh, x, _WITHIN, _STREAM)

    def scatter(self, x: Float[Array, "b f m d"]) -> Float[Array, "b f m d"]:
        """From attention or MLP to the residual stream; the gradient is gathered."""
        return constrain(self.mesh, x, _STREAM, _WITHIN)

    def rows(self, x: Float[Array, "*n d"]) -> Float[Array, "*m d"]:
        """[n d] on one CPU, where XLA would else transpose each activation for the gradient of the matrix it meets.

        Elsewhere `x` itself: there, batch and tokens may lie on several devices.
        """
        alone = self.mesh is None or self.mesh.size == 1
        return x.reshape(-1, x.shape[-1]) if alone and platform_of(self.mesh) == "cpu" else x
