"""Executors as pytrees beside the frozen base: LoRA factors, or full differences from the base.

A LoRA tree mirrors the base's tree down to the layers that it adapts: `{..., "q": {"a": [i r], "b": [r o]}}`, with a
leading layer axis where the base's layers are stacked. `b` starts at zero, so a fresh Executor *is* the Demonstrator.
A full Executor is `{"full": differences}` with a leaf for every weight of the base, all zero at first. Both are what
an optimiser updates, an EMA averages and a checkpoint holds; the base is never copied. Beside factors, an Executor may
hold full differences of some weights, such as biases: a part of the base's tree under the name `DIFFERENCES`.
"""

import abc
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from world_distill.models.int8 import Int8Kernel, block_kernels
from world_distill.structs import PyTree, Texts

DIFFERENCES = "differences"  # beside factors: full differences of some weights


def kernels(base: PyTree, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> kernel of every linear layer in a nested dict of weights, or of their shapes."""
    found = {}
    for name, value in base.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            if "kernel" in value:
                found[path] = value["kernel"]
            found.update(kernels({k: v for k, v in value.items() if isinstance(v, dict)}, path))
    return found


def kernel_shapes(base: PyTree) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every linear layer's kernel."""
    return {path: tuple(kernel.shape) for path, kernel in kernels(base).items()}


def init_lora(key: jax.Array, base: PyTree, *, rank: int, targets: str) -> PyTree:
    """LoRA factors for every linear layer of `base` whose dotted path matches the pattern `targets`.

    Args:
      key: typed PRNG key.
      base: nested dict of weights; linear layers hold `kernel` [i o] or, stacked, [layers i o].
      rank: inner dimension of the factors.
      targets: regular expression, matched against the whole path (`blocks.self_attention.(q|k|v|out)`).

    Raises:
      ValueError: the pattern matches no layer, or the rank is above a matched layer's smaller size.
    """
    found = {path: kernel for path, kernel in sorted(kernels(base).items()) if re.fullmatch(targets, path)}
    if not found:
        raise ValueError(f"LoRA targets {targets!r} match no layer; layers are: {', '.join(sorted(kernels(base)))}")
    lora = {}
    for index, (path, kernel) in enumerate(found.items()):
        *stack, inputs, outputs = kernel.shape
        if not 0 < rank <= min(inputs, outputs):
            raise ValueError(f"LoRA rank {rank} does not fit layer {path} of shape {tuple(kernel.shape)}")
        noise = jax.random.normal(jax.random.fold_in(key, index), (*stack, inputs, rank), jnp.float32)
        lora[path] = {"a": noise / jnp.sqrt(inputs), "b": jnp.zeros((*stack, rank, outputs), jnp.float32)}
    return unflatten_dict(lora, sep=".")


def lora_axes(lora: PyTree, base_axes: PyTree) -> PyTree:
    """Logical axis names for `init_lora`'s tree (or a full Executor), from those of the base.

    A factor has one wide axis: where the layer's is not cut along fsdp, the factor's is ("factor"), since its average,
    its start and its moments would else be whole on every device.
    """
    if "full" in lora:
        return {"full": base_axes}
    axes = {}
    for name, value in lora.items():
        if name == DIFFERENCES:
            axes[name] = _part_like(value, base_axes)
        elif "a" in value and not isinstance(value["a"], dict):
            *stack, inputs, outputs = (
                axis if axis in ("layers", "embed") else "factor" for axis in base_axes[name]["kernel"]
            )
            axes[name] = {"a": (*stack, inputs, None), "b": (*stack, None, outputs)}
        else:
            axes[name] = lora_axes(value, base_axes[name])
    return axes


def _part_like(part: PyTree, tree: PyTree) -> PyTree:
    """The leaves of `tree` at the places where `part` has leaves."""
    return {k: _part_like(v, tree[k]) if isinstance(v, dict) else tree[k] for k, v in part.items()}


def init_differences(base: PyTree, pattern: str) -> PyTree:
    """Full differences, all zero, of the weights whose dotted path matches the pattern: a part of the base's tree.

    Raises:
      ValueError: the pattern matches no weight, or a kernel of int8.
    """
    flat: dict[str, Any] = dict(flatten_dict(base, sep="."))
    found = {path: w for path, w in flat.items() if re.fullmatch(pattern, path)}
    if kept := [path for path, w in found.items() if isinstance(w, Int8Kernel)]:
        raise ValueError(
            f"executor.differences {pattern!r} matches {kept[0]}, and model.int8 is for kernels that stay frozen: leave"
            " kernels out, or set model.int8 = False"
        )
    if not found:
        raise ValueError(f"executor.differences {pattern!r} matches no weight; weights are: {', '.join(sorted(flat))}")
    return unflatten_dict({path: jnp.zeros(w.shape, jnp.float32) for path, w in found.items()}, sep=".")


def init_full(base: PyTree) -> PyTree:
    """A full Executor: float32 differences from every weight of the base, all zero.

    Raises:
      ValueError: a base with kernels of int8.
    """
    if any(isinstance(w, Int8Kernel) for w in flatten_dict(base).values()):
        raise ValueError(
            "executor.rank = 0 trains every weight, and model.int8 is for weights that stay frozen: set executor.rank"
            " for LoRA, or model.int8 = False"
        )
    return {"full": jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), base)}


def apply_full(base: PyTree, lora: PyTree | None) -> tuple[PyTree, PyTree | None]:
    """(weights, LoRA) to compute with: full differences are added to the base, LoRA's factors are passed on."""
    if lora is None:
        return base, None
    if "full" in lora:
        return jax.tree.map(lambda w, d: w + d.astype(w.dtype), base, lora["full"]), None
    if DIFFERENCES not in lora:
        return base, lora
    factors = {name: value for name, value in lora.items() if name != DIFFERENCES}
    return _add(base, lora[DIFFERENCES]), factors or None


def _add(base: PyTree, part: PyTree) -> PyTree:
    """The base with differences of some of its weights added, in float32."""
    if not isinstance(part, dict):
        return (base.astype(jnp.float32) + part.astype(jnp.float32)).astype(base.dtype)
    return base | {name: _add(base[name], value) for name, value in part.items()}


def merge(base: PyTree, lora: PyTree | None, scale: float) -> PyTree:
    """The weights that an Executor amounts to: `W + scale a b` where LoRA adapts a layer, the base's own elsewhere.

    A full Executor's differences are added as they are. Differentiable in `lora`. Products are made in float32.
    """
    if lora is not None and ("full" in lora or DIFFERENCES in lora):
        base, lora = apply_full(base, lora)
    if lora is None:
        return base
    if "a" in lora and not isinstance(lora["a"], dict):
        change = scale * (lora["a"].astype(jnp.float32) @ lora["b"].astype(jnp.float32))
        return base | {"kernel": (base["kernel"] + change).astype(base["kernel"].dtype)}
    return base | {name: merge(base[name], part, scale) for name, part in lora.items()}


class Adapted(abc.ABC):
    """The members of `interfaces.ModelFamily` about LoRA, for a family whose layers are linear.

    Attributes:
      adapted: part of the base (an outermost key) that the Executor changes; None: all of it.
      lora_targets: pattern of the dotted paths, within that part, of the layers that LoRA adapts.
      lora_differences: pattern of the weights that get full differences beside LoRA; empty: none.
      int8: the kernels of the blocks of that part are kept as int8.
    """

    adapted: str | None
    lora_targets: str
    lora_differences: str = ""
    int8: bool = False

    @abc.abstractmethod
    def init_base(self, key: jax.Array) -> PyTree:
        """Random base weights."""

    @abc.abstractmethod
    def base_axes(self) -> PyTree:
        """Logical axis names of every base weight."""

    def adapted_part(self, base: PyTree) -> PyTree:
        """What the Executor changes, of a tree like the base."""
        return base if self.adapted is None else base[self.adapted]

    def read_texts(self, base: PyTree, texts: Texts) -> Texts:
        """The texts themselves: the network reads them as they are."""
        del base
        return texts

    def int8_kernels(self) -> list[str]:
        """Dotted paths of the base's kernels that are kept as int8."""
        if not self.int8:
            return []
        part = "" if self.adapted is None else f"{self.adapted}."
        return [f"{part}{path}" for path in block_kernels(self.adapted_part(self.base_axes()))]

    def init_lora(self, key: jax.Array, base: PyTree, *, rank: int | None) -> PyTree:
        """An Executor that equals the Demonstrator: LoRA of `rank`, or full differences if `rank` is None."""
        if rank is None:
            return init_full(self.adapted_part(base))
        lora = init_lora(key, self.adapted_part(base), rank=rank, targets=self.lora_targets)
        if self.lora_differences:
            lora[DIFFERENCES] = init_differences(self.adapted_part(base), self.lora_differences)
        return lora

    def lora_axes(self, lora: PyTree) -> PyTree:
        """Logical axis names of `init_lora`'s tree."""
        return lora_axes(lora, self.adapted_part(self.base_axes()))

    def training_notes(self, rank: int | None) -> list[str]:
        """Warnings about what losses do to the weights of such an Executor; none here."""
        del rank
        return []

    def kernel_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every kernel that LoRA may adapt, by dotted path."""
        return kernel_shapes(self.adapted_part(jax.eval_shape(self.init_base, jax.random.key(0))))
