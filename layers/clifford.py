"""Projective geometric algebra G(3, 0, 1): products, equivariant maps, embeddings and geometric attention.

A multivector has 16 components on the last axis, in the order
1; e0, e1, e2, e3; e01, e02, e03, e12, e13, e23; e012, e013, e023, e123; e0123
with e0^2 = 0 and e1^2 = e2^2 = e3^2 = 1.
"""

import itertools
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from layers.masks import Mask
from layers.softmax import dot_product_attention

__all__ = [
    "pga_attention",
    "pga_distance_features",
    "pga_dual",
    "pga_embed_plane",
    "pga_embed_point",
    "pga_embed_rotation",
    "pga_embed_translation",
    "pga_extract_point",
    "pga_gated_gelu",
    "pga_geometric_product",
    "pga_grade",
    "pga_inner_product",
    "pga_join",
    "pga_layer_norm",
    "pga_linear",
    "pga_outer_product",
    "pga_reverse",
    "pga_sandwich",
]

_BLADES = tuple(blade for grade in range(5) for blade in itertools.combinations(range(4), grade))
_GRADES = np.array([len(blade) for blade in _BLADES])
# Components whose blade has no e0: the ones that the inner product sees.
_EUCLIDEAN = np.array([i for i, blade in enumerate(_BLADES) if 0 not in blade])


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _multiply_blades(first, second):
    """(blade, factor) of the geometric product of two basis blades."""
    factors = [*first, *second]
    swaps = sum(a > b for a, b in itertools.combinations(factors, 2))
    shared = set(first) & set(second)
    blade = tuple(sorted(set(first) ^ set(second)))
    return blade, 0 if 0 in shared else (-1) ** swaps


@lru_cache
def _table(outer: bool) -> np.ndarray:
    """T[i, j, k]: how much of blade i is in blade j times blade k."""
    table = np.zeros((16, 16, 16), np.float32)
    for (j, first), (k, second) in itertools.product(enumerate(_BLADES), repeat=2):
        blade, factor = _multiply_blades(first, second)
        if not outer or not set(first) & set(second):
            table[_BLADES.index(blade), j, k] = factor
    return table


@lru_cache
def _dual_signs() -> np.ndarray:
    """Signs s with (blade 15 - i) outer (s_i blade i) = e0123."""
    return np.array([_multiply_blades(_BLADES[15 - i], _BLADES[i])[1] for i in range(16)], np.float32)


@lru_cache
def _linear_basis(normalize: bool) -> np.ndarray:
    """The nine equivariant maps (9, 16, 16): grade projections, then e0 times grades 0..3."""
    maps = [np.diag((grade == _GRADES).astype(np.float32)) for grade in range(5)]
    maps += [_table(outer=True)[:, 1] @ maps[grade] for grade in range(4)]
    basis = np.stack(maps)
    return basis / np.sqrt(np.sum(basis**2, axis=(1, 2), keepdims=True)) if normalize else basis


def _bilinear(table, x, y):
    x, y = jnp.broadcast_arrays(x, y)
    left = jnp.einsum("ijk,...j->...ik", table.astype(x.dtype), x, precision="highest")
    return jnp.einsum("...ik,...k->...i", left, y, precision="highest")


@jax.jit
def pga_geometric_product(x: Float[Array, "*#B 16"], y: Float[Array, "*#B 16"]) -> Float[Array, "*B 16"]:
    """x y: associative, bilinear, e_i e_j = -e_j e_i, e_i e_i = 1 and e_0 e_0 = 0. O(192).

    Source: card ga_wireless_splat, Mechanism; arXiv:2305.18415, section 2.
    """
    return _bilinear(_table(outer=False), _wide(x), _wide(y)).astype(jnp.result_type(x, y))


@jax.jit
def pga_outer_product(x: Float[Array, "*#B 16"], y: Float[Array, "*#B 16"]) -> Float[Array, "*B 16"]:
    """x ^ y: the part of the geometric product in which blades share no factor; planes meet. O(81).

    Source: card ga_wireless_splat, Mechanism; arXiv:2305.18415, section 2.
    """
    return _bilinear(_table(outer=True), _wide(x), _wide(y)).astype(jnp.result_type(x, y))


@jax.jit
def pga_inner_product(x: Float[Array, "*#B 16"], y: Float[Array, "*#B 16"]) -> Float[Array, "*B"]:
    """<x, y> = scalar part of reverse(x) y: the sum of x_c y_c over the eight blades c without e0; invariant.

    Source: card ga_wireless_splat, Mechanism.
    """
    product = _wide(x)[..., _EUCLIDEAN] * _wide(y)[..., _EUCLIDEAN]
    return jnp.sum(product, axis=-1).astype(jnp.result_type(x, y))


@jax.jit
def pga_reverse(x: Float[Array, "*B 16"]) -> Float[Array, "*B 16"]:
    """Factors in opposite order: grades 2 and 3 change sign. Source: arXiv:2305.18415, section 2."""
    return x * np.where((_GRADES == 2) | (_GRADES == 3), -1, 1).astype(x.dtype)


@partial(jax.jit, static_argnames=("grade",))
def pga_grade(x: Float[Array, "*B 16"], *, grade: int) -> Float[Array, "*B 16"]:
    """The part of x in one grade, 0 to 4. Source: arXiv:2305.18415, section 2."""
    if not 0 <= grade <= 4:
        raise ValueError(f"pga_grade: grade {grade} is not one of 0..4")
    return jnp.where(grade == _GRADES, x, 0)


@jax.jit
def pga_dual(x: Float[Array, "*B 16"]) -> Float[Array, "*B 16"]:
    """The right complement: x_c blade_c becomes the x_c blade' with blade_c ^ blade' = e0123.

    Source: card ga_wireless_splat, Mechanism (reversed component order with signs).
    """
    return x[..., ::-1] * _dual_signs().astype(x.dtype)


@jax.jit
def pga_join(
    x: Float[Array, "*#B 16"], y: Float[Array, "*#B 16"], reference: Float[Array, "*#B 16"] | None = None
) -> Float[Array, "*B 16"]:
    """dual(dual x ^ dual y), times the e123 component of `reference`: points join to lines, point and line to planes.

    The dual twice, as in the released code, is the join up to the sign of a grade. The reference makes it equivariant
    under reflections. Source: card ga_wireless_splat, Mechanism; arXiv:2305.18415, section 3.2.
    """
    joined = pga_dual(_bilinear(_table(outer=True), pga_dual(_wide(x)), pga_dual(_wide(y))))
    if reference is None:
        return joined.astype(jnp.result_type(x, y))
    return (_wide(reference)[..., 14:15] * joined).astype(jnp.result_type(x, y, reference))


@jax.jit
def pga_sandwich(versor: Float[Array, "*#B 16"], x: Float[Array, "*#B 16"]) -> Float[Array, "*B 16"]:
    """u x u^-1 for an even versor u (rotations, translations), u involute(x) u^-1 for an odd one (reflections).

    The versor need not be normalised, but must be all even or all odd. Source: arXiv:2305.18415, section 2.
    """
    u, wide = _wide(versor), _wide(x)
    odd = _GRADES % 2 == 1
    square = jnp.sum(jnp.square(u[..., _EUCLIDEAN]), axis=-1, keepdims=True)
    inverse = pga_reverse(u) / jnp.where(square == 0, 1.0, square)

    def turn(part, x):
        moved = _bilinear(_table(outer=False), jnp.where(part, u, 0.0), x)
        return _bilinear(_table(outer=False), moved, jnp.where(part, inverse, 0.0))

    return (turn(~odd, wide) + turn(odd, jnp.where(odd, -wide, wide))).astype(jnp.result_type(versor, x))


# ---- objects ---------------------------------------------------------------------------------------------------------


def _place(dtype, shape, entries):
    zero = jnp.zeros(shape, dtype)
    return jnp.stack([jnp.broadcast_to(entries.get(i, zero), shape).astype(dtype) for i in range(16)], axis=-1)


@jax.jit
def pga_embed_point(point: Float[Array, "*B 3"]) -> Float[Array, "*B 16"]:
    """(x, y, z) as e123 - x e023 + y e013 - z e012. Source: card ga_wireless_splat, Mechanism."""
    x, y, z = jnp.moveaxis(point, -1, 0)
    return _place(point.dtype, x.shape, {14: jnp.ones_like(x), 13: -x, 12: y, 11: -z})


@partial(jax.jit, static_argnames=("epsilon",))
def pga_extract_point(x: Float[Array, "*B 16"], *, epsilon: float = 1e-3) -> Float[Array, "*B 3"]:
    """The (x, y, z) of a point of any weight w = e123 component: divides by w, or by +-epsilon where |w| is less.

    Source: arXiv:2305.18415, section 2.
    """
    wide = _wide(x)
    weight = wide[..., 14:15]
    weight = jnp.where(jnp.abs(weight) > epsilon, weight, jnp.where(weight < 0, -epsilon, epsilon))
    return (jnp.stack([-wide[..., 13], wide[..., 12], -wide[..., 11]], axis=-1) / weight).astype(x.dtype)


@jax.jit
def pga_embed_plane(normal: Float[Array, "*#B 3"], position: Float[Array, "*#B 3"]) -> Float[Array, "*B 16"]:
    """n1 e1 + n2 e2 + n3 e3 - (n.p) e0: the plane through p across n; a unit n makes it the reflection there.

    Source: arXiv:2305.18415, section 2.
    """
    normal, position = jnp.broadcast_arrays(normal, position)
    x, y, z = jnp.moveaxis(normal, -1, 0)
    return _place(jnp.result_type(normal, position), x.shape, {1: -jnp.sum(normal * position, -1), 2: x, 3: y, 4: z})


@jax.jit
def pga_embed_translation(offset: Float[Array, "*B 3"]) -> Float[Array, "*B 16"]:
    """1 - (t1 e01 + t2 e02 + t3 e03) / 2: its sandwich moves points by t. Source: arXiv:2305.18415, section 2."""
    x, y, z = jnp.moveaxis(offset, -1, 0)
    return _place(offset.dtype, x.shape, {0: jnp.ones_like(x), 5: -x / 2, 6: -y / 2, 7: -z / 2})


@jax.jit
def pga_embed_rotation(quaternion: Float[Array, "*B 4"]) -> Float[Array, "*B 16"]:
    """w - x e23 + y e13 - z e12 of the quaternion (w, x, y, z): its sandwich turns points as the quaternion does.

    Source: arXiv:2305.18415, section 2.
    """
    w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
    return _place(quaternion.dtype, w.shape, {0: w, 8: -z, 9: y, 10: -x})


# ---- equivariant layers ----------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("normalize_basis",))
def pga_linear(
    x: Float[Array, "*B C 16"],
    weight: Float[Array, "Co C 9"],
    *,
    scalar_bias: Float[Array, "*#b Co"] | None = None,
    normalize_basis: bool = True,
) -> Float[Array, "*B Co 16"]:
    """y_j = sum_i sum_b w_jib B_b x_i: every linear map of channels that commutes with rotations and translations.

    B_1..5 project onto grades 0..4, B_6..9 multiply grades 0..3 by e0; each over its Frobenius norm unless
    `normalize_basis=False`. `scalar_bias` goes to component 0: a bias, or what scalar channels send. O(256 C Co).
    Source: card ga_wireless_splat, Mechanism (EquiLinear); arXiv:2305.18415, proposition 2.
    """
    wide = _wide(x)
    maps = jnp.einsum("jib,bcd->jcid", _wide(weight), _linear_basis(normalize_basis).astype(wide.dtype))
    y = jnp.einsum("jcid,...id->...jc", maps, wide)
    if scalar_bias is not None:
        # Not y.at[..., 0].add: with that scatter GAI-GS's loss on data x fsdp x tensor was 1e-3 off (jax 0.10.2).
        y = y + jnp.where(jnp.arange(16) == 0, _wide(scalar_bias)[..., None], 0)
    return y.astype(x.dtype)


@partial(jax.jit, static_argnames=("epsilon",))
def pga_layer_norm(x: Float[Array, "*B C 16"], *, epsilon: float = 0.01) -> Float[Array, "*B C 16"]:
    """x / sqrt(max(mean over channels of <x, x>, epsilon)). Source: card ga_wireless_splat, EquiLayerNorm."""
    wide = _wide(x)
    square = jnp.mean(jnp.sum(jnp.square(wide[..., _EUCLIDEAN]), axis=-1), axis=-1)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, epsilon))[..., None, None]).astype(x.dtype)


@jax.jit
def pga_gated_gelu(x: Float[Array, "*B 16"]) -> Float[Array, "*B 16"]:
    """x gelu(x_0), the tanh form: every channel gated by its scalar. Source: card ga_wireless_splat, GeoMLP."""
    wide = _wide(x)
    return (wide * jax.nn.gelu(wide[..., :1], approximate=True)).astype(x.dtype)


@partial(jax.jit, static_argnames=("epsilon",))
def pga_distance_features(
    x: Float[Array, "*B 16"], *, epsilon: float = 1e-3
) -> tuple[Float[Array, "*B 5"], Float[Array, "*B 5"]]:
    """(as query, as key): 5 numbers each, whose dot product is -|p - p'|^2 for points p, p' of weight 1.

    t = (x11, x12, x13, x14) n(x14) with n(v) = v / (v^2 + epsilon), which stands for the division by the weight.
    Source: card ga_wireless_splat, Mechanism (distance vector); arXiv:2305.18415, section 3.2.
    """
    wide = _wide(x)
    weight = wide[..., 14:15]
    t = wide[..., 11:15] * weight / (jnp.square(weight) + epsilon)
    square = jnp.sum(jnp.square(t[..., :3]), axis=-1, keepdims=True)
    last = t[..., 3:]
    query = jnp.concatenate([square, jnp.square(last), last * t[..., :3]], axis=-1)
    key = jnp.concatenate([-jnp.square(last), -square, 2 * last * t[..., :3]], axis=-1)
    return query.astype(x.dtype), key.astype(x.dtype)


@partial(jax.jit, static_argnames=("epsilon", "implementation"))
def pga_attention(
    query: Float[Array, "B Lq H C 16"],
    key: Float[Array, "B Lk K C 16"],
    value: Float[Array, "B Lk K Cv 16"],
    query_scalars: Float[Array, "B Lq H S"],
    key_scalars: Float[Array, "B Lk K S"],
    value_scalars: Float[Array, "B Lk K Sv"],
    *,
    log_distance_weight: Float[Array, "H #C"] | None = None,
    bias: Float[Array, "*broadcastable"] | None = None,
    mask: Mask | Bool[Array, "*broadcastable2"] | None = None,
    epsilon: float = 1e-3,
    implementation: str | None = None,
) -> tuple[Float[Array, "B Lq H Cv 16"], Float[Array, "B Lq H Sv"]]:
    """softmax((sum_c <q_c, k_c> + e^{w_c} dist(q_c, k_c) + s_q.s_k) / sqrt(12 C + S)) of multivector and scalar values.

    Per channel: the 7 components of the inner product other than e123 (points have it in the distance), and
    `pga_distance_features`, weighted by e^w (w = 0 by default). K key heads serve H query heads (K = 1: multi-query).
    Scalars may carry rotary embedding; S = 0 means none. bias, mask and implementation as in `dot_product_attention`.
    Source: card ga_wireless_splat, Mechanism (Geometric attention); arXiv:2305.18415, section 3.2.
    """
    seen = _EUCLIDEAN[_EUCLIDEAN != 14]
    query_far = pga_distance_features(query, epsilon=epsilon)[0]
    key_far = pga_distance_features(key, epsilon=epsilon)[1]
    if log_distance_weight is not None:
        query_far = query_far * jnp.exp(_wide(log_distance_weight))[..., None].astype(query_far.dtype)

    def features(x, far, scalars):
        return jnp.concatenate([y.reshape(*x.shape[:3], -1) for y in (x[..., seen], far)] + [scalars], axis=-1)

    width = 12 * query.shape[3] + query_scalars.shape[-1]
    values = jnp.concatenate([value.reshape(*value.shape[:3], -1), value_scalars], axis=-1)
    output = dot_product_attention(
        features(query, query_far, query_scalars),
        features(key, key_far, key_scalars),
        values,
        bias=bias,
        mask=mask,
        scale=width**-0.5,
        implementation=implementation,
    )
    split = 16 * value.shape[3]
    parts = output[..., :split].reshape(*output.shape[:3], -1, 16), output[..., split:]
    return parts[0].astype(value.dtype), parts[1].astype(value_scalars.dtype)
