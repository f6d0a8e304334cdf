"""FLOPs of the matrix products and convolutions that a function asks for, whichever machine compiles it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

__all__ = ["Flops", "matmul_flops"]


@dataclass(frozen=True)
class Flops:
    count: float
    exact: bool = True
    """False: a loop runs until a condition holds, and counts once: the count is a lower bound."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.count + other.count, self.exact and other.exact)

    def times(self, n: float) -> "Flops":
        return Flops(self.count * n, self.exact)


def matmul_flops(function: Callable, *arguments: Any) -> Flops:
    """What `function` computes in products for arguments of these shapes, over all devices together.

    A multiplication and an addition are two. Scans count as often as they run, branches as their dearest, results that
    nobody uses and elementwise operations not at all: what the literature calls model FLOPs, if nothing is
    rematerialised.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr: Any, used: Sequence[bool]) -> tuple[Flops, list[bool]]:
    """What it takes to compute the outputs that are used, and which inputs it takes."""
    live = {id(v) for v, u in zip(jaxpr.outvars, used, strict=True) if u}
    total = Flops(0.0)
    for eqn in reversed(jaxpr.eqns):
        wanted = [id(v) in live for v in eqn.outvars]
        if not any(wanted) and not eqn.effects:
            continue
        flops, needed = _equation(eqn, wanted)
        total += flops
        live |= {id(v) for v, n in zip(eqn.invars, needed, strict=True) if n}
    return total, [id(v) in live for v in jaxpr.invars]


def _whole(jaxpr: Any) -> Flops:
    return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def _equation(eqn: Any, wanted: Sequence[bool]) -> tuple[Flops, list[bool]]:
    params, name, everything = eqn.params, eqn.primitive.name, [True] * len(eqn.invars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        terms = math.prod(left[i] for i in contracted)
        # Without a sum it is an elementwise operation, and compilers make it one.
        return Flops(2.0 * math.prod(eqn.outvars[0].aval.shape) * terms if terms > 1 else 0.0), everything
    if name.startswith("ragged_dot"):
        return Flops(2.0 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[-1]), everything
    if name == "conv_general_dilated":
        return Flops(_convolution(eqn)), everything
    if name == "while":
        inside = _whole(params["body_jaxpr"].jaxpr) + _whole(params["cond_jaxpr"].jaxpr)
        return Flops(inside.count, exact=inside.count == 0), everything
    if name == "cond":
        return max((_whole(branch.jaxpr) for branch in params["branches"]), key=lambda f: f.count), everything
    inner = [j for value in params.values() for j in _jaxprs(value)]
    if name == "scan":
        return _whole(inner[0]).times(params["length"]), everything
    if name == "shard_map":
        return _whole(inner[0]).times(params["mesh"].size), everything
    if name == "pallas_call":
        steps = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
        return _whole(inner[0]).times(steps), everything
    if len(inner) == 1 and len(inner[0].invars) == len(eqn.invars) and len(inner[0].outvars) == len(eqn.outvars):
        return _count(inner[0], wanted)  # a call, such as of a jitted function
    return sum((_whole(j) for j in inner), Flops(0.0)), everything


def _convolution(eqn: Any) -> float:
    """Zeros around inputs, and those that dilation puts between them, need no arithmetic."""
    (x, kernel), out, params = (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape, eqn.params
    numbers = params["dimension_numbers"]
    total = 2.0 * math.prod(out[axis] for axis in numbers.out_spec[:2]) * kernel[numbers.rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        spread = params["lhs_dilation"][i]
        taps = np.arange(kernel[numbers.rhs_spec[2 + i]]) * params["rhs_dilation"][i]
        at = np.arange(out[numbers.out_spec[2 + i]])[:, None] * params["window_strides"][i] + taps - low
        total *= np.sum((at >= 0) & (at <= (x[numbers.lhs_spec[2 + i]] - 1) * spread) & (at % spread == 0))
    return float(total)


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return _jaxprs(value.jaxpr)
    if isinstance(value, tuple | list):
        return [j for v in value for j in _jaxprs(v)]
    return []
