"""Definable networks learn from finitely many examples (arXiv:2605.07097): certificates, bounds and counter-examples.

No official code. Fidelity: reading. New: a fixed network whose layers are definable in an o-minimal structure has
finite sample complexity in the agnostic PAC model, however large its parameters; attention, norms and gates are, the
sine of an unbounded argument is not. Ours: `certify` reads the structure off any traced function; the bound for
Pfaffian layers is Karpinski and Macintyre's, with Khovanskii's count of solutions; the agnostic bound's constant is 1.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array, Float

from zoo.demo import Check, Demo, Findings
from zoo.paper import Paper

__all__ = ["PAPER", "Certificate", "Config", "Structure", "certify", "sample_size", "sauer", "vc_bound"]


class Structure(IntEnum):
    """Each contains the ones before it; a network lies in the largest that a layer of it needs."""

    SEMI_ALGEBRAIC = 0
    EXPONENTIAL = 1
    PFAFFIAN = 2
    RESTRICTED_ANALYTIC = 3
    NOT_DEFINABLE = 4


@dataclass
class Certificate:
    """Where a function is definable, how many chain elements and branches it has, and what is to blame."""

    structure: Structure = Structure.SEMI_ALGEBRAIC
    counts: Counter = field(default_factory=Counter)  # evaluations by primitive, and "branches"
    reasons: set[str] = field(default_factory=set)  # the primitives that need the structure

    @property
    def chain_length(self) -> int:
        """Elements of the Pfaffian chain: one for every transcendental evaluation, reciprocal and root."""
        return sum(count for name, count in self.counts.items() if name != "branches")

    def need(self, structure: Structure, name: str) -> None:
        if structure > self.structure:
            self.structure, self.reasons = structure, set()
        if structure == self.structure and structure > Structure.SEMI_ALGEBRAIC:
            self.reasons.add(name)


_ALGEBRAIC = """
    add sub mul neg abs sign max min dot_general conv_general_dilated select_n eq ne lt le gt ge and or not xor add_any
    reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_window_sum reduce_window_max
    reduce_window_min argmax argmin sort top_k cumsum cumprod cummax cummin gather scatter scatter-add dynamic_slice
    dynamic_update_slice reshape transpose broadcast_in_dim squeeze expand_dims concatenate pad slice rev iota copy
    stop_gradient convert_element_type integer_pow square clamp split is_finite device_put reduce_precision
    optimization_barrier unstack stack pvary
"""
_ROOTS = {"div", "sqrt", "rsqrt", "cbrt"}  # algebraic, but each evaluation is an element of the chain
_EXPONENTIAL = {
    "exp",
    "exp2",
    "log",
    "log1p",
    "expm1",
    "tanh",
    "logistic",
    "pow",
    "sinh",
    "cosh",
    "asinh",
    "acosh",
    "atanh",
}
_PFAFFIAN = {"erf", "erfc", "erf_inv", "atan", "asin", "acos", "atan2"}
_ANALYTIC = {"sin", "cos"}  # on a bounded interval
_BRANCHES = {"max", "min", "abs", "sign", "clamp", "select_n", "sort", "top_k", "argmax", "reduce_max", "reduce_min"}
_SHAPES = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "copy", "stop_gradient", "rev"}
_SHAPES |= {"convert_element_type", "slice", "reduce_precision", "device_put"}


@dataclass(frozen=True)
class _Value:
    """What is known of an array: fixed (no input reaches it), bounded from below and above, entries that differ."""

    fixed: bool = False
    below: bool = False
    above: bool = False
    distinct: int = 1


def certify(function: Callable[..., Any], *arguments: Any) -> Certificate:
    """The certificate of a function at these arguments' shapes; only traced, never run."""
    closed = jax.make_jaxpr(function)(*arguments)
    found = Certificate()
    inputs = [_Value(distinct=int(np.prod(v.aval.shape))) for v in closed.jaxpr.invars]
    _walk(closed, inputs, found, times=1)
    return found


def _size(atom: Any) -> int:
    return int(np.prod(atom.aval.shape))


def _walk(closed: Any, inputs: list[_Value], found: Certificate, times: int) -> list[_Value]:
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: _Value(True, True, True, _size(v)) for v in jaxpr.constvars}

    def value(atom: Any) -> _Value:
        return _Value(True, True, True, _size(atom)) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [value(atom) for atom in equation.invars]
        for variable, result in zip(equation.outvars, _step(equation, operands, found, times), strict=True):
            known[variable] = result
    return [value(atom) for atom in jaxpr.outvars]


def _step(equation: Any, operands: list[_Value], found: Certificate, times: int) -> list[_Value]:
    name, sizes = equation.primitive.name, [_size(v) for v in equation.outvars]
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
    inner = [p if isinstance(p, core.ClosedJaxpr) else core.ClosedJaxpr(p, ()) for p in leaves if _is_jaxpr(p)]
    if all(v.fixed for v in operands) and not name.startswith(("random", "rng", "threefry")):
        return [_Value(True, True, True, size) for size in sizes]  # a constant, however it came about
    if name == "scan":
        kept, carried = equation.params["num_consts"], equation.params["num_carry"]
        # Nothing is taken to be known of what goes around.
        body = [_Value(distinct=v.distinct) if kept <= i < kept + carried else v for i, v in enumerate(operands)]
        _walk(inner[0], body, found, times * equation.params["length"])
        return [_Value(distinct=size) for size in sizes]
    if name == "cond":
        for branch in inner:
            _walk(branch, operands[1:], found, times)
        found.counts["branches"] += times * len(inner)
        return [_Value(distinct=size) for size in sizes]
    if inner and name != "while":
        number = len(inner[0].jaxpr.invars)
        return _walk(inner[0], operands[-number:] if number else [], found, times)

    first = operands[0]
    distinct = max(v.distinct for v in operands) if name in _SHAPES or len(operands) == 1 else max(sizes)
    moving = max((v.distinct for v in operands if not v.fixed), default=0)
    below = above = False
    if name in _ALGEBRAIC.split():
        if name == "convert_element_type" and _rounds(equation):
            found.need(Structure.NOT_DEFINABLE, "rounding of an unbounded number")
        below, above = _bounds(name, operands)
        if name in _BRANCHES:
            found.counts["branches"] += times * moving
    elif name in _ROOTS:
        denominator = operands[1] if name == "div" else first
        if not denominator.fixed:
            found.counts[name] += times * denominator.distinct
        if name == "div" and denominator.fixed:
            below, above = first.below, first.above
    elif name in _EXPONENTIAL:
        found.need(Structure.EXPONENTIAL, name)
        found.counts[name] += times * moving
        below = above = name in ("tanh", "logistic") or (first.below and first.above)
        below |= name == "exp"
    elif name in _PFAFFIAN:
        found.need(Structure.PFAFFIAN, name)
        found.counts[name] += times * moving
        below = above = name in ("erf", "erfc", "atan", "atan2")
    elif name in _ANALYTIC and first.below and first.above:
        found.need(Structure.RESTRICTED_ANALYTIC, name)
        found.counts[name] += times * moving
        below = above = True
    else:
        why = f"{name} of an unbounded argument" if name in _ANALYTIC else name
        found.need(Structure.NOT_DEFINABLE, why)
    return [_Value(False, below, above, min(distinct, size) if name in _SHAPES else distinct) for size in sizes]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def _rounds(equation: Any) -> bool:
    old, new = equation.invars[0].aval.dtype, equation.params["new_dtype"]
    return jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.integer)


def _bounds(name: str, operands: list[_Value]) -> tuple[bool, bool]:
    lower, upper = [v.below for v in operands], [v.above for v in operands]
    both = all(lower) and all(upper)
    if name == "max":
        return any(lower), all(upper)
    if name == "min":
        return all(lower), any(upper)
    if name == "neg":
        return upper[0], lower[0]
    if name == "clamp":
        return lower[0] or lower[1], upper[2] or upper[1]
    if name in ("square", "abs"):
        return True, both
    if name in ("eq", "ne", "lt", "le", "gt", "ge", "sign", "is_finite"):
        return True, True
    return (
        (all(lower), all(upper))
        if name in ("add", "add_any", "concatenate", "reduce_sum", "select_n")
        else (both, both)
    )


# --- bounds -----------------------------------------------------------------------------------------------------------


def vc_bound(num_parameters: int, chain: int = 0, *, degree: int = 2, chain_degree: int = 3, atoms: int = 1) -> float:
    """2 log2 B + (16 + 2 log2 s) W: of sets cut out by s sign conditions of `degree` in W parameters and the chain.

    B <= 2^(q (q - 1) / 2) degree^W (min(q, W) chain_degree + W degree - W + 1)^q for a Pfaffian chain of length q.
    Source: Karpinski and Macintyre 1997; Khovanskii 1991.
    """
    w, q = num_parameters, chain
    log_b = q * (q - 1) / 2 + w * math.log2(degree) + q * math.log2(min(q, w) * chain_degree + w * degree - w + 1)
    return 2 * log_b + (16 + 2 * math.log2(atoms)) * w


def sample_size(vc: float | int, epsilon: float, delta: float) -> float:
    """(VC + log(1 / delta)) / epsilon^2, the agnostic bound with the constant 1."""
    return (vc + math.log(1 / delta)) / epsilon**2


def sauer(points: int, vc: float | int) -> int:
    """sum_{i <= vc} binom(points, i): the most labellings that a class of that VC dimension realises."""
    return sum(math.comb(points, i) for i in range(min(points, math.floor(vc)) + 1))


def patterns(labels: Float[Array, "T M"]) -> int:
    """How many different rows of signs there are."""
    return len(np.unique(np.asarray(labels) > 0, axis=0))


# --- the demonstration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes of the experiments."""

    draws: int = 60_000  # of parameters
    points: tuple[int, ...] = (8, 12, 16, 32, 64)
    shattered: int = 12  # points that the sine labels in all ways
    models: tuple[str, ...] = ("ister", "convrec")  # papers of the zoo that are certified too


def classifier(w: Float[Array, " 7"], x: Float[Array, "3 2"]) -> Float[Array, ""]:
    """One attention of three tokens, its mean, a threshold: seven parameters."""
    attention = jax.nn.softmax(x @ w[:4].reshape(2, 2) @ x.T, axis=-1)
    return jnp.mean(attention @ x, axis=0) @ w[4:6] + w[6]


def examples() -> Mapping[str, tuple[Callable[..., Any], tuple[Any, ...], Structure]]:
    """Networks of each structure, with the structure they must be found in."""
    x, w = jnp.ones((5, 4)), jnp.ones((4, 4))
    angles = jnp.arange(5.0)[:, None] * jnp.ones(4)

    def attention_block(x, w):
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        turned = normed * jnp.cos(angles) + normed[:, ::-1] * jnp.sin(angles)
        mixed = jax.nn.softmax(turned @ w @ turned.T, axis=-1) @ normed
        return jax.nn.silu(mixed @ w) * (mixed @ w)

    return {
        "ReLU network": (lambda x, w: jax.nn.relu(x @ w) @ w, (x, w), Structure.SEMI_ALGEBRAIC),
        "attention, SwiGLU, RMSNorm, RoPE": (attention_block, (x, w), Structure.EXPONENTIAL),
        "exact GELU": (lambda x, w: jax.nn.gelu(x @ w, approximate=False), (x, w), Structure.PFAFFIAN),
        "sine of a clipped number": (
            lambda x, w: jnp.sin(jnp.clip(x @ w, -1.0, 1.0)), (x, w), Structure.RESTRICTED_ANALYTIC,
        ),
        "sine of any number": (lambda x, w: jnp.sin(x @ w), (x, w), Structure.NOT_DEFINABLE),
        "rounding": (lambda x, w: jnp.floor(x @ w), (x, w), Structure.NOT_DEFINABLE),
    }  # fmt: skip


def run(config: Config, key: jax.Array) -> Findings:
    """Certificates, bounds, and how many labellings networks and sines realise."""
    import zoo

    c, keys = config, jax.random.split(key, 4)
    checks = []
    for name, (function, arguments, expected) in examples().items():
        found = certify(function, *arguments).structure
        checks.append(Check(f"{name}: structure", int(found), expected, expected, expected))
    for slug in c.models:
        model = zoo.create(slug, "tiny")
        batch = zoo.paper(slug).example(model.config, batch_size=1, key=keys[0])
        variables = jax.eval_shape(model.init, {"params": keys[0], "dropout": keys[0]}, batch)
        certificate = certify(model.apply, variables, batch)
        checks.append(
            Check(
                f"{slug} of this zoo is definable: structure",
                int(certificate.structure),
                high=Structure.RESTRICTED_ANALYTIC,
            )
        )

    heads, tokens = 2, 5
    x, w = jnp.ones((heads, tokens, 4)), jnp.ones((heads, 4, 4))
    layer = certify(lambda x, w: jax.nn.softmax(x @ w @ jnp.swapaxes(x, 1, 2), axis=-1) @ x, x, w)
    elements = heads * tokens**2 + heads * tokens
    checks += [
        Check(
            "chain of an attention layer: H n^2 exponentials, H n reciprocals",
            layer.chain_length, elements, elements, elements,
        ),
        Check(
            "VC bounds of the card's three layers",
            [vc_bound(w, q, degree=4) for w, q in ((15, 18), (53, 32), (101, 64))],
            np.array([840, 2564, 7198]) - 1, np.array([840, 2564, 7198]) + 1, [840, 2564, 7198],
        ),
    ]  # fmt: skip

    bound = vc_bound(7, certify(classifier, jnp.ones(7), jnp.ones((3, 2))).chain_length, degree=4)
    parameters = jnp.tan(jnp.pi * (jax.random.uniform(keys[1], (c.draws, 7)) - 0.5))  # Cauchy: of any size
    places = jax.random.normal(keys[2], (max(c.points), 3, 2))
    scores = jax.jit(jax.vmap(lambda w: jax.vmap(lambda x: classifier(w, x))(places)))(parameters)
    counts = [patterns(scores[:, :m]) for m in c.points]
    at = c.points.index(16)
    sines = jnp.sin(jax.random.uniform(keys[3], (c.draws, 1)) * 2.0**17 * jnp.pi * 2.0 ** -jnp.arange(1, 17))
    m = c.shattered
    labels = np.array(list(itertools.product((0, 1), repeat=m)))
    chosen = np.pi * (1 + ((1 - labels) * 2.0 ** np.arange(1, m + 1)).sum(axis=1))
    realised = np.sin(chosen[:, None] * 2.0 ** -np.arange(1, m + 1)) > 0
    checks += [
        Check(
            "labellings found for seven parameters of attention, below Sauer's count",
            counts, 1, [min(float(sauer(p, bound)), 2.0**p) for p in c.points], over=("points", c.points),
        ),
        Check("their growth: log labellings / log points", np.log(counts) / np.log(c.points), high=8.0),
        Check("share of all labellings of 16 points", counts[at] / 2**16, high=0.1),
        Check("a sine finds more of 16 points', times", patterns(sines) / counts[at], low=8.0),
        Check("a sine labels all points in all ways: share", np.mean(realised == labels), 1.0, 1.0, 1.0),
        Check(
            "a quarter of the error needs so many times the examples",
            sample_size(50, 0.1, 0.5) / sample_size(50, 0.4, 0.5), 15.9, 16.1, 16.0,
        ),
    ]  # fmt: skip
    return Findings(tuple(checks))


PAPER = Paper(slug="ominimal", demo=Demo(run, configs={"tiny": Config(), "card": Config(draws=300_000)}))
