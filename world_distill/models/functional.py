"""NNX modules as pure functions of their weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from world_distill.structs import PyTree


@functools.lru_cache(maxsize=16)
def functional(module: Callable[..., nnx.Module], config: Any) -> "Functional":
    """`module(config, rngs=...)` as functions; the same for the same config, since taking it apart takes a while."""
    return Functional(lambda rngs: module(config, rngs=rngs))


class Functional:
    """A module seen as three functions: fresh weights, their logical axes, and the forward pass.

    Weights are nested dicts of arrays that are passed in, so that one module serves any number of them.

    Args:
      make: builds the module from `nnx.Rngs`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make

    def _module(self, key: jax.Array) -> nnx.Module:
        # Placing parameters is the caller's business (jit with out_shardings), not the constructor's.
        with nnx.use_eager_sharding(False):
            return self._make(nnx.Rngs(key))

    @functools.cached_property
    def _abstract(self) -> tuple[Any, nnx.State]:  # (graph, shapes)
        return nnx.split(nnx.eval_shape(lambda: self._module(jax.random.key(0))))

    def init(self, key: jax.Array) -> PyTree:
        """Random weights (traceable)."""
        return nnx.to_pure_dict(nnx.state(self._module(key)))

    def axes(self) -> PyTree:
        """Logical axis names of every weight, a tuple or None each."""
        return nnx.to_pure_dict(nnx.get_partition_spec(self._abstract[1]))

    def __call__(self, weights: PyTree, *args: Any, **kwargs: Any) -> Any:
        """The forward pass with these weights."""
        graph, state = self._abstract
        state = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(graph, state)(*args, **kwargs)
