"""Hyperbolic space of curvature -c: Lorentz hyperboloid, Poincaré ball, Klein ball, and attention on the hyperboloid.

Hyperboloid points are (time, space...) with <x, x>_L = -x_0^2 + |x_1..|^2 = -1/c and time > 0; the balls have radius
1/sqrt(c). Everything is computed in float32 at least, with gradients that are finite where points coincide.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.masks import Mask, as_mask
from layers.rotations import of_root
from layers.softmax import masked_normalize

__all__ = [
    "klein_to_lorentz",
    "klein_to_poincare",
    "lorentz_attention",
    "lorentz_centroid",
    "lorentz_distance",
    "lorentz_exp",
    "lorentz_exp_origin",
    "lorentz_inner",
    "lorentz_log",
    "lorentz_log_origin",
    "lorentz_project",
    "lorentz_scores",
    "lorentz_to_klein",
    "lorentz_to_poincare",
    "lorentz_transport",
    "poincare_add",
    "poincare_distance",
    "poincare_exp",
    "poincare_exp_origin",
    "poincare_log",
    "poincare_log_origin",
    "poincare_midpoint",
    "poincare_project",
    "poincare_to_klein",
    "poincare_to_lorentz",
]

Curvature = Float[Array, ""] | float


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _square(x):
    return jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def _root(x):
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


_cosh = of_root(jnp.cosh, 1.0, 1 / 2, 1 / 24, 1 / 720)
_sinhc = of_root(lambda r: jnp.sinh(r) / r, 1.0, 1 / 6, 1 / 120, 1 / 5040)
_asinhc = of_root(lambda r: jnp.arcsinh(r) / r, 1.0, -1 / 6, 3 / 40, -5 / 112, 35 / 1152)
_tanhc = of_root(lambda r: jnp.tanh(r) / r, 1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835)
_atanhc = of_root(lambda r: jnp.arctanh(jnp.minimum(r, 1 - 1e-7)) / r, 1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9)


def _shorten(x, longest):
    """x, scaled down where its norm is above `longest`."""
    square = _square(x)
    too_long = square > longest**2
    return jnp.where(too_long, x * (longest / jnp.sqrt(jnp.where(too_long, square, 1.0))), x)


# ---- Lorentz hyperboloid ---------------------------------------------------------------------------------------------


def _inner(x, y):
    product = x * y
    return jnp.sum(product[..., 1:], axis=-1, keepdims=True) - product[..., :1]


def _lift(space, curvature):
    return jnp.concatenate([jnp.sqrt(1 / curvature + _square(space)), space], axis=-1)


def _gap(x, y, curvature):
    """c <x - y, x - y>_L = 2 (cosh(sqrt(c) d) - 1); from the difference, which keeps its digits at small distances."""
    return jnp.maximum(curvature * _inner(x - y, x - y), 0.0)


@jax.jit
def lorentz_inner(x: Float[Array, "*#B D"], y: Float[Array, "*#B D"]) -> Float[Array, "*B"]:
    """<x, y>_L = -x_0 y_0 + sum_i x_i y_i. Source: card hyperpose, Mechanism."""
    return _inner(_wide(x), _wide(y))[..., 0].astype(jnp.result_type(x, y))


@jax.jit
def lorentz_project(x: Float[Array, "*B D"], *, curvature: Curvature = 1.0) -> Float[Array, "*B D"]:
    """The hyperboloid point with x's space components: time sqrt(1/c + |space|^2). Source: card hyperpose."""
    return _lift(_wide(x)[..., 1:], curvature).astype(x.dtype)


@partial(jax.jit, static_argnames=("max_norm",))
def lorentz_exp_origin(
    v: Float[Array, "*B d"], *, curvature: Curvature = 1.0, max_norm: float | None = None
) -> Float[Array, "*B D"]:
    """exp_o(v) = (cosh(r)/sqrt(c), sinh(r)/r v) with r = sqrt(c) |v|: d numbers to a point of d + 1.

    `max_norm` shortens longer v first (float32 overflows beyond r = 88). Source: card hyperpose, Mechanism (15).
    """
    wide = _wide(v) if max_norm is None else _shorten(_wide(v), max_norm)
    square = curvature * _square(wide)
    time = _cosh(square) / jnp.sqrt(jnp.asarray(curvature, wide.dtype))
    return jnp.concatenate([time, _sinhc(square) * wide], axis=-1).astype(v.dtype)


@partial(jax.jit, static_argnames=("max_norm",))
def lorentz_log_origin(
    x: Float[Array, "*B D"], *, curvature: Curvature = 1.0, max_norm: float | None = None
) -> Float[Array, "*B d"]:
    """log_o(x) = asinh(r)/r space(x) with r = sqrt(c) |space(x)|: the inverse of `lorentz_exp_origin`.

    From the space components alone, which know a point near the origin better than its time does. `max_norm` shortens
    longer results. Source: card hyperpose, Mechanism (15).
    """
    space = _wide(x)[..., 1:]
    v = _asinhc(curvature * _square(space)) * space
    return (v if max_norm is None else _shorten(v, max_norm)).astype(x.dtype)


@jax.jit
def lorentz_exp(
    x: Float[Array, "*#B D"], v: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B D"]:
    """exp_x(v) = cosh(r) x + sinh(r)/r v with r = sqrt(c <v, v>_L), for v tangent at x (<x, v>_L = 0).

    Source: arXiv:1806.03417, section 3; card hyperpose.
    """
    base, tangent = _wide(x), _wide(v)
    square = jnp.maximum(curvature * _inner(tangent, tangent), 0.0)
    moved = _cosh(square) * base + _sinhc(square) * tangent
    return _lift(moved[..., 1:], curvature).astype(jnp.result_type(x, v))


@jax.jit
def lorentz_log(
    x: Float[Array, "*#B D"], y: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B D"]:
    """log_x(y) = acosh(a)/sqrt(a^2 - 1) (y - a x) with a = -c <x, y>_L: the tangent at x that leads to y.

    Source: arXiv:1806.03417, section 3; card hyperpose.
    """
    base, goal = _wide(x), _wide(y)
    above = _gap(base, goal, curvature) / 2
    small = above < 1e-2
    near, far = jnp.where(small, above, 0.0), jnp.where(small, 1.0, above)
    series = 1 - near / 3 * (1 - near * 2 / 5 * (1 - near * 3 / 7 * (1 - near * 4 / 9)))
    factor = jnp.where(small, series, 2 * jnp.arcsinh(jnp.sqrt(far / 2)) / jnp.sqrt(far * (far + 2)))
    return (factor * (goal - base - above * base)).astype(jnp.result_type(x, y))


@jax.jit
def lorentz_distance(
    x: Float[Array, "*#B D"], y: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B"]:
    """d = acosh(-c <x, y>_L) / sqrt(c), as 2 asinh(|x - y|_L sqrt(c) / 2) / sqrt(c).

    0, with zero gradient, where x = y. Source: card hyperpose, Mechanism (there clamped at acosh(1 + 1e-7)).
    """
    gap = _gap(_wide(x), _wide(y), curvature)[..., 0]
    return (_root(gap / curvature) * _asinhc(gap / 4)).astype(jnp.result_type(x, y))


@jax.jit
def lorentz_transport(
    x: Float[Array, "*#B D"], y: Float[Array, "*#B D"], v: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B D"]:
    """P_{x -> y}(v) = v + <y, v>_L / (1/c - <x, y>_L) (x + y): v carried along the geodesic, lengths and angles kept.

    Source: card hyperpose, Mechanism.
    """
    start, end, tangent = _wide(x), _wide(y), _wide(v)
    share = _inner(end, tangent) / (1 / curvature - _inner(start, end))
    return (tangent + share * (start + end)).astype(jnp.result_type(x, y, v))


def _centroid(total, weight, curvature):
    """The hyperboloid point along `total`; the origin where there is nothing."""
    # The Lorentz norm of a sum of points is at least the sum of theirs; rounding far from the origin may say less.
    norm = jnp.sqrt(jnp.maximum(-_inner(total, total), jnp.square(jnp.where(weight > 0, weight, 1.0)) / curvature))
    space = jnp.where(weight > 0, total / (norm * jnp.sqrt(jnp.asarray(curvature, total.dtype))), 0.0)[..., 1:]
    return _lift(space, curvature)


@jax.jit
def lorentz_centroid(
    points: Float[Array, "*B N D"],
    weights: Float[Array, "*B N"] | None = None,
    *,
    curvature: Curvature = 1.0,
) -> Float[Array, "*B D"]:
    """m = s / (sqrt(c) |s|_L) with s = sum_i w_i x_i, w_i >= 0: minimises sum w_i |x_i - m|_L^2.

    It is also the Einstein midpoint (Klein) and the gyromidpoint (Poincaré). Weights need not sum to 1; with none above
    0 the origin comes back. O(N D). Source: arXiv:2105.14686, section 3; card hyperpose.
    """
    wide = _wide(points)
    share = jnp.ones(wide.shape[:-1], wide.dtype) if weights is None else _wide(weights)
    total = jnp.einsum("...nd,...n->...d", wide, share)
    return _centroid(total, jnp.sum(share, axis=-1, keepdims=True), curvature).astype(points.dtype)


@partial(jax.jit, static_argnames=("kind",))
def lorentz_scores(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk H D"],
    *,
    kind: str = "squared_distance",
    temperature: Float[Array, "*broadcastable"] | float = 1.0,
    curvature: Curvature = 1.0,
) -> Float[Array, "B H Lq Lk"]:
    """s_qk = -d^2 / tau ("squared_distance"), -d / tau ("distance") or (1/c + <q, k>_L) / tau ("inner"); float32.

    All are 0 where query and key coincide, below elsewhere, and -|q - k|^2 / tau or half that near the origin.
    `temperature` tau broadcasts to (B, H, Lq, Lk). O(Lq Lk D). Source: card hyperpose, Mechanism 2 ("inner"; v2
    "squared_distance").
    """
    wide_query, wide_key = _wide(query), _wide(key)
    if kind == "inner":
        flipped = jnp.concatenate([-wide_query[..., :1], wide_query[..., 1:]], axis=-1)
        # The two terms of <q, k>_L nearly cancel: no rounding of the factors.
        scores = 1 / curvature + jnp.einsum("bqhd,bkhd->bhqk", flipped, wide_key, precision="highest")
    elif kind in ("distance", "squared_distance"):
        gap = _gap(jnp.swapaxes(wide_query, 1, 2)[:, :, :, None], jnp.swapaxes(wide_key, 1, 2)[:, :, None], curvature)[
            ..., 0
        ]
        ratio = _asinhc(gap / 4)
        scores = -_root(gap / curvature) * ratio if kind == "distance" else -gap / curvature * jnp.square(ratio)
    else:
        raise ValueError(f"lorentz_scores: kind {kind!r} is not one of squared_distance, distance, inner")
    return scores / temperature


@partial(jax.jit, static_argnames=("kind", "aggregation"))
def lorentz_attention(
    query: Float[Array, "B Lq H D"],
    key: Float[Array, "B Lk H D"],
    value: Float[Array, "B Lk H Dv"],
    *,
    kind: str = "squared_distance",
    temperature: Float[Array, "*broadcastable"] | float = 1.0,
    curvature: Curvature = 1.0,
    bias: Float[Array, "*broadcastable2"] | None = None,
    mask: Mask | Bool[Array, "*broadcastable3"] | None = None,
    aggregation: str = "centroid",
) -> Float[Array, "B Lq H Dv"]:
    """o_q = aggregate of v_k under softmax_k(lorentz_scores(q, k) + bias) over allowed keys.

    `aggregation` "centroid": Lorentz centroid of values on the hyperboloid; "tangent": exp_o(sum w log_o v); "mean":
    sum w v of Euclidean values. `bias` and `mask` broadcast to (B, H, Lq, Lk). A query without keys gets the origin
    (0 for "mean"). O(Lq Lk D). Source: card hyperpose, Mechanism (v3 "mean" of Euclidean values, v2 "tangent");
    centroid arXiv:2105.14686, section 3.
    """
    scores = lorentz_scores(query, key, kind=kind, temperature=temperature, curvature=curvature)
    if bias is not None:
        scores = scores + _wide(bias)
    table = as_mask(mask)
    everything = jnp.ones((1, 1, *scores.shape[2:]), bool)
    allowed = everything if table is None else table.materialize(*scores.shape[2:])
    weights = masked_normalize(scores, allowed)
    wide = _wide(value)
    if aggregation == "tangent":
        wide = lorentz_log_origin(wide, curvature=curvature)
    total = jnp.einsum("bhqk,bkhd->bqhd", weights, wide)
    if aggregation == "tangent":
        total = lorentz_exp_origin(total, curvature=curvature)
    elif aggregation == "centroid":
        present = jnp.swapaxes(jnp.sum(weights, axis=-1), 1, 2)[..., None]
        total = _centroid(total, present, curvature)
    elif aggregation != "mean":
        raise ValueError(f"lorentz_attention: aggregation {aggregation!r} is not one of centroid, tangent, mean")
    return total.astype(value.dtype)


# ---- Poincaré ball ---------------------------------------------------------------------------------------------------

_MARGIN = 1e-5


def _inside(x, curvature, margin=_MARGIN):
    return _shorten(x, (1 - margin) / jnp.sqrt(jnp.asarray(curvature, x.dtype)))


def _add(x, y, curvature):
    product = jnp.sum(x * y, axis=-1, keepdims=True)
    x_square, y_square = _square(x), _square(y)
    numerator = (1 + 2 * curvature * product + curvature * y_square) * x + (1 - curvature * x_square) * y
    return numerator / jnp.maximum(1 + 2 * curvature * product + curvature**2 * x_square * y_square, 1e-15)


def _conformal(x, curvature):
    return 2 / (1 - curvature * _square(x))


@partial(jax.jit, static_argnames=("margin",))
def poincare_project(
    x: Float[Array, "*B D"], *, curvature: Curvature = 1.0, margin: float = _MARGIN
) -> Float[Array, "*B D"]:
    """x, shortened to norm (1 - margin)/sqrt(c) where it is longer. Source: card hyperbolic_emotion_rag, 1."""
    return _inside(_wide(x), curvature, margin).astype(x.dtype)


@jax.jit
def poincare_add(
    x: Float[Array, "*#B D"], y: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B D"]:
    """Möbius addition x (+) y: the translation of y that takes 0 to x; (-x) (+) (x (+) y) = y.

    Source: card hyperbolic_emotion_rag, Mechanism 1.
    """
    return _inside(_add(_wide(x), _wide(y), curvature), curvature).astype(jnp.result_type(x, y))


@jax.jit
def poincare_exp_origin(v: Float[Array, "*B D"], *, curvature: Curvature = 1.0) -> Float[Array, "*B D"]:
    """exp_0(v) = tanh(r)/r v with r = sqrt(c) |v|, kept inside the ball. Source: card hyperbolic_emotion_rag, 1."""
    wide = _wide(v)
    return _inside(_tanhc(curvature * _square(wide)) * wide, curvature).astype(v.dtype)


@jax.jit
def poincare_log_origin(x: Float[Array, "*B D"], *, curvature: Curvature = 1.0) -> Float[Array, "*B D"]:
    """log_0(x) = artanh(r)/r x with r = sqrt(c) |x|. Source: card hyperbolic_emotion_rag, Mechanism 1."""
    wide = _inside(_wide(x), curvature)
    return (_atanhc(curvature * _square(wide)) * wide).astype(x.dtype)


@jax.jit
def poincare_exp(
    x: Float[Array, "*#B D"], v: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B D"]:
    """exp_x(v) = x (+) tanh(r)/r (l/2) v with l = 2 / (1 - c |x|^2) and r = sqrt(c) l |v| / 2.

    Source: arXiv:1805.09112, lemma 2; card hyperbolic_emotion_rag.
    """
    base = _inside(_wide(x), curvature)
    step = _conformal(base, curvature) / 2 * _wide(v)
    step = _inside(_tanhc(curvature * _square(step)) * step, curvature)
    return _inside(_add(base, step, curvature), curvature).astype(jnp.result_type(x, v))


@jax.jit
def poincare_log(
    x: Float[Array, "*#B D"], y: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B D"]:
    """log_x(y) = (2/l) artanh(r)/r w with w = (-x) (+) y, r = sqrt(c) |w| and l = 2 / (1 - c |x|^2).

    Source: arXiv:1805.09112, lemma 2; card hyperbolic_emotion_rag.
    """
    base = _inside(_wide(x), curvature)
    way = _inside(_add(-base, _inside(_wide(y), curvature), curvature), curvature)
    return (2 / _conformal(base, curvature) * _atanhc(curvature * _square(way)) * way).astype(jnp.result_type(x, y))


@jax.jit
def poincare_distance(
    x: Float[Array, "*#B D"], y: Float[Array, "*#B D"], *, curvature: Curvature = 1.0
) -> Float[Array, "*B"]:
    """d = 2/sqrt(c) artanh(sqrt(c) |(-x) (+) y|), as an asinh of |x - y|: 0, with zero gradient, where x = y.

    2 |x - y| as c goes to 0. Source: card hyperbolic_emotion_rag, Mechanism 1.
    """
    first, second = _inside(_wide(x), curvature), _inside(_wide(y), curvature)
    square = _square(first - second) * _conformal(first, curvature) * _conformal(second, curvature) / 4
    distance = 2 * _root(square) * _asinhc(curvature * square)
    return distance[..., 0].astype(jnp.result_type(x, y))


@jax.jit
def poincare_midpoint(
    points: Float[Array, "*B N D"],
    weights: Float[Array, "*B N"] | None = None,
    *,
    curvature: Curvature = 1.0,
) -> Float[Array, "*B D"]:
    """m = 1/2 (x) (sum w_i l_i x_i / sum w_i (l_i - 1)), l = 2 / (1 - c |x|^2).

    1/2 (x) y is y / (1 + sqrt(1 - c |y|^2)). Weights, not negative, need not sum to 1; with none above 0 the origin
    comes back. O(N D).
    Source: card hyperbolic_emotion_rag, Mechanism 1 (Einstein midpoint).
    """
    wide = _inside(_wide(points), curvature)
    share = jnp.ones(wide.shape[:-1], wide.dtype) if weights is None else _wide(weights)
    factor = _conformal(wide, curvature)
    total = jnp.sum(share[..., None] * (factor - 1), axis=-2)
    mean = jnp.sum(share[..., None] * factor * wide, axis=-2) / jnp.where(total > 0, total, 1.0)
    mean = _inside(mean, curvature)
    return _inside(mean / (1 + jnp.sqrt(1 - curvature * _square(mean))), curvature).astype(points.dtype)


# ---- changes of model ------------------------------------------------------------------------------------------------


@jax.jit
def lorentz_to_poincare(x: Float[Array, "*B D"], *, curvature: Curvature = 1.0) -> Float[Array, "*B d"]:
    """y = space / (1 + sqrt(c) time): d + 1 numbers to d. Source: cards hyperpose, hyperbolic_emotion_rag."""
    wide = _wide(x)
    return (wide[..., 1:] / (1 + jnp.sqrt(jnp.asarray(curvature, wide.dtype)) * wide[..., :1])).astype(x.dtype)


@jax.jit
def poincare_to_lorentz(x: Float[Array, "*B d"], *, curvature: Curvature = 1.0) -> Float[Array, "*B D"]:
    """(time, space) with space = 2 x / (1 - c |x|^2). Source: cards hyperpose, hyperbolic_emotion_rag."""
    wide = _inside(_wide(x), curvature)
    return _lift(_conformal(wide, curvature) * wide, curvature).astype(x.dtype)


@jax.jit
def lorentz_to_klein(x: Float[Array, "*B D"], *, curvature: Curvature = 1.0) -> Float[Array, "*B d"]:
    """k = space / (sqrt(c) time): geodesics become straight. Source: card hyperbolic_emotion_rag, Mechanism 1."""
    wide = _wide(x)
    return (wide[..., 1:] / (jnp.sqrt(jnp.asarray(curvature, wide.dtype)) * wide[..., :1])).astype(x.dtype)


@jax.jit
def klein_to_lorentz(x: Float[Array, "*B d"], *, curvature: Curvature = 1.0) -> Float[Array, "*B D"]:
    """(time, space) with space = k / sqrt(1 - c |k|^2). Source: card hyperbolic_emotion_rag, Mechanism 1."""
    wide = _inside(_wide(x), curvature)
    return _lift(wide * jax.lax.rsqrt(1 - curvature * _square(wide)), curvature).astype(x.dtype)


@jax.jit
def poincare_to_klein(x: Float[Array, "*B D"], *, curvature: Curvature = 1.0) -> Float[Array, "*B D"]:
    """k = 2 x / (1 + c |x|^2). Source: card hyperbolic_emotion_rag, Mechanism 1."""
    wide = _wide(x)
    return (2 * wide / (1 + curvature * _square(wide))).astype(x.dtype)


@jax.jit
def klein_to_poincare(x: Float[Array, "*B D"], *, curvature: Curvature = 1.0) -> Float[Array, "*B D"]:
    """x = k / (1 + sqrt(1 - c |k|^2)). Source: card hyperbolic_emotion_rag, Mechanism 1."""
    wide = _inside(_wide(x), curvature)
    return (wide / (1 + jnp.sqrt(1 - curvature * _square(wide)))).astype(x.dtype)
