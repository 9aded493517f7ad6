"""Floating-point operations of a JAX program, counted from its jaxpr: matrix products and convolutions.

Counting the traced program, not a formula of the model, gets right what formulas miss: that gradients of frozen weights
are not computed, that a backward pass computes blocks again, and how often a loop's body runs (XLA's own cost analysis
counts it once). Elementwise work is left out, as it is in published utilisation figures.
"""

import math
from typing import Any

from jax.extend import core

_AGAIN = "rematted_computation"  # JAX's name of the scope in which `jax.checkpoint` computes again


def count(jaxpr: core.ClosedJaxpr | core.Jaxpr, *, remat: bool = True, kernels: bool = False) -> float:
    """Operations (a multiplication and an addition are two) of one call, over all devices.

    A `cond` counts as its costliest branch, a `while` without a known number of turns as one turn.

    Args:
      jaxpr: the program.
      remat: with what a backward pass computes again to save memory: what is done, not what the model needs.
      kernels: only those within Pallas kernels.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of(equation, remat, kernels) for equation in jaxpr.eqns)


def _of(equation: core.JaxprEqn, remat: bool, kernels: bool) -> float:
    name, params = equation.primitive.name, equation.params
    if not remat and _AGAIN in str(equation.source_info.name_stack):
        return 0.0
    if name == "dot_general":
        return 0.0 if kernels else _product(equation)
    if name == "conv_general_dilated":
        return 0.0 if kernels else _convolution(equation)
    if name == "cond":
        return max(count(branch, remat=remat, kernels=kernels) for branch in params["branches"])
    if name == "scan":
        return params["length"] * count(params["jaxpr"], remat=remat, kernels=kernels)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * count(params["jaxpr"], remat=remat)
    if name == "shard_map":  # its body is one device's part
        return params["mesh"].size * count(params["jaxpr"], remat=remat, kernels=kernels)
    return sum(count(part, remat=remat, kernels=kernels) for part in inner(params))


def inner(params: dict[str, Any]) -> list[core.ClosedJaxpr | core.Jaxpr]:
    """The programs inside an equation, those that say how to differentiate it left out."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                found.append(item)
    return found


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _product(equation: core.JaxprEqn) -> float:
    (left, _), _ = equation.params["dimension_numbers"]
    a = _shape(equation.invars[0])
    contracted = math.prod(a[i] for i in left)
    return 2.0 * math.prod(_shape(equation.outvars[0])) * contracted


def _convolution(equation: core.JaxprEqn) -> float:
    kernel = _shape(equation.invars[1])
    numbers = equation.params["dimension_numbers"].rhs_spec  # out features, in features of a group, space ...
    per_output = math.prod(kernel[i] for i in numbers[1:])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * per_output
