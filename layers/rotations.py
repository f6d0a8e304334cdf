"""Rotations, rigid motions and kinematic trees in 3-D; tangents of the sphere.

Quaternions are (w, x, y, z). Matrices act on column vectors. Rigid motions are 4 x 4 matrices and compose by `@`, left
after right. Angles are radians. Everything is float32 at least, with gradients that are finite at the identity.
"""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
    "angle_between",
    "bone_offsets",
    "forward_kinematics",
    "matrix_to_quaternion",
    "matrix_to_rotation_6d",
    "quaternion_conjugate",
    "quaternion_multiply",
    "quaternion_rotate",
    "quaternion_slerp",
    "quaternion_to_matrix",
    "rotation_6d_to_matrix",
    "rotation_distance",
    "se3_apply",
    "se3_exp",
    "se3_inverse",
    "se3_log",
    "skew_matrix",
    "so3_exp",
    "so3_log",
    "sphere_tangent",
]


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _square(x):
    return jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def _product_3(a, b):
    """The product of matrices with 3 inner entries, without matrix units, which may round float32 to bfloat16."""
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def _norm(x):
    """|x|, with zero gradient at 0."""
    square = _square(x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _unit(x):
    """x / |x|, and 0 for 0."""
    square = _square(x)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def of_root(function: Callable, *series: int | float) -> Callable:
    """f(sqrt(s)) as a smooth function of s >= 0: its power series where s is small."""

    def smooth(square):
        small = square < 1e-2
        nearby = jnp.where(small, square, 0.0)
        total = jnp.full_like(square, series[-1])
        for coefficient in reversed(series[:-1]):
            total = total * nearby + coefficient
        return jnp.where(small, total, function(jnp.sqrt(jnp.where(small, 1.0, square))))

    return smooth


_sinc = of_root(lambda r: jnp.sin(r) / r, 1, -1 / 6, 1 / 120, -1 / 5040)
_versine = of_root(lambda r: 2 * jnp.square(jnp.sin(r / 2) / r), 1 / 2, -1 / 24, 1 / 720, -1 / 40320)
_cubic = of_root(lambda r: (r - jnp.sin(r)) / r**3, 1 / 6, -1 / 120, 1 / 5040, -1 / 362880)
_inverse_cubic = of_root(lambda r: (1 - r / 2 / jnp.tan(r / 2)) / r**2, 1 / 12, 1 / 720, 1 / 30240, 1 / 1209600)


@jax.jit
def angle_between(a: Float[Array, "*#B 3"], b: Float[Array, "*#B 3"]) -> Float[Array, "*B"]:
    """atan2(|a x b|, a.b) in [0, pi]; 0, with zero gradient, where a or b is 0 or they are parallel.

    Source: card angle_i2p, Mechanism 1.
    """
    a, b, kind = *jnp.broadcast_arrays(_wide(a), _wide(b)), jnp.result_type(a, b)
    sine, cosine = _norm(jnp.cross(a, b))[..., 0], jnp.sum(a * b, axis=-1)
    none = (sine == 0) & (cosine == 0)
    return jnp.where(none, 0.0, jnp.arctan2(sine, jnp.where(none, 1.0, cosine))).astype(kind)


@jax.jit
def sphere_tangent(x: Float[Array, "*#B D"], v: Float[Array, "*#B D"]) -> Float[Array, "*B D"]:
    """v - <v, x> x: the part of v tangent to the unit sphere at x. Source: card wasserstein_flow, Mechanism (drift)."""
    point, vector = _wide(x), _wide(v)
    return (vector - jnp.sum(point * vector, axis=-1, keepdims=True) * point).astype(jnp.result_type(x, v))


# ---- quaternions -----------------------------------------------------------------------------------------------------


def _product(p, q):
    scalar = p[..., :1] * q[..., :1] - jnp.sum(p[..., 1:] * q[..., 1:], axis=-1, keepdims=True)
    vector = p[..., :1] * q[..., 1:] + q[..., :1] * p[..., 1:] + jnp.cross(p[..., 1:], q[..., 1:])
    return jnp.concatenate([scalar, vector], axis=-1)


@jax.jit
def quaternion_multiply(p: Float[Array, "*#B 4"], q: Float[Array, "*#B 4"]) -> Float[Array, "*B 4"]:
    """Hamilton product p q: the rotation q followed by p. Source: card ga_wireless_splat, Rendering."""
    wide = jnp.broadcast_arrays(_wide(p), _wide(q))
    return _product(*wide).astype(jnp.result_type(p, q))


@jax.jit
def quaternion_conjugate(q: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    """(w, -x, -y, -z): the inverse of a unit quaternion. Source: card ga_wireless_splat, Rendering."""
    return jnp.concatenate([q[..., :1], -q[..., 1:]], axis=-1)


@jax.jit
def quaternion_rotate(q: Float[Array, "*#B 4"], v: Float[Array, "*#B 3"]) -> Float[Array, "*B 3"]:
    """q v q*: v turned by the unit quaternion q. Source: card ga_wireless_splat, Rendering."""
    turn, vector = _wide(q), _wide(v)
    shape = jnp.broadcast_shapes(turn.shape[:-1], vector.shape[:-1])
    turn, vector = jnp.broadcast_to(turn, (*shape, 4)), jnp.broadcast_to(vector, (*shape, 3))
    twice = 2 * jnp.cross(turn[..., 1:], vector)
    return (vector + turn[..., :1] * twice + jnp.cross(turn[..., 1:], twice)).astype(jnp.result_type(q, v))


@partial(jax.jit, static_argnames=("normalize",))
def quaternion_to_matrix(q: Float[Array, "*B 4"], *, normalize: bool = True) -> Float[Array, "*B 3 3"]:
    """R(q) with R(q) v = q v q* for |q| = 1; `normalize=False` puts q into the same polynomial as it is.

    The zero quaternion gives the identity. Source: card ga_wireless_splat, Rendering (not normalised there).
    """
    wide = _wide(q)
    w, x, y, z = jnp.moveaxis(_unit(wide) if normalize else wide, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2).astype(q.dtype)


@jax.jit
def matrix_to_quaternion(matrix: Float[Array, "*B 3 3"]) -> Float[Array, "*B 4"]:
    """The unit quaternion of a rotation, w >= 0; from its largest component, so no rotation is near a singularity.

    Source: card avi_ht, Mechanism 5 (geodesic of the wrist's rotation); the rule is Shepperd's, 1978.
    """
    m = _wide(matrix)
    x, y, z = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    # Row i holds 4 q_i q_j.
    table = [
        [1 + x + y + z, wx, wy, wz],
        [wx, 1 + x - y - z, xy, xz],
        [wy, xy, 1 - x + y - z, yz],
        [wz, xz, yz, 1 - x - y + z],
    ]
    table = jnp.stack([jnp.stack(row, axis=-1) for row in table], axis=-2)
    best = jnp.argmax(jnp.diagonal(table, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    row = jnp.take_along_axis(table, best, axis=-2)[..., 0, :]
    q = _unit(row)
    return jnp.where(q[..., :1] < 0, -q, q).astype(matrix.dtype)


@jax.jit
def quaternion_slerp(
    start: Float[Array, "*#B 4"], end: Float[Array, "*#B 4"], fraction: Float[Array, "*#B"] | float
) -> Float[Array, "*B 4"]:
    """The unit quaternion `fraction` of the shorter way from start to end, at constant speed.

    Source: card atomic_motion (rotations of joints between frames); Shoemake 1985.
    """
    first, second = jnp.broadcast_arrays(_unit(_wide(start)), _unit(_wide(end)))
    share = jnp.asarray(fraction, first.dtype)[..., None]
    cosine = jnp.sum(first * second, axis=-1, keepdims=True)
    second = jnp.where(cosine < 0, -second, second)
    square = jnp.square(2 * jnp.arctan2(_norm(second - first), _norm(second + first)))
    scale = _sinc(square)
    kept, taken = (x * _sinc(jnp.square(x) * square) / scale for x in (1 - share, share))
    return _unit(kept * first + taken * second).astype(jnp.result_type(start, end))


# ---- 6-D, SO(3), SE(3) -----------------------------------------------------------------------------------------------


@jax.jit
def rotation_6d_to_matrix(x: Float[Array, "*B 6"]) -> Float[Array, "*B 3 3"]:
    """Gram-Schmidt of the two columns x[:3] and x[3:]; their cross product is the third.

    Columns that are 0 or parallel give finite numbers and no rotation. Source: arXiv:1812.07035; card
    atomic_motion.
    """
    wide = _wide(x)
    first = _unit(wide[..., :3])
    second = wide[..., 3:]
    second = _unit(second - jnp.sum(first * second, axis=-1, keepdims=True) * first)
    return jnp.stack([first, second, jnp.cross(first, second)], axis=-1).astype(x.dtype)


@jax.jit
def matrix_to_rotation_6d(matrix: Float[Array, "*B 3 3"]) -> Float[Array, "*B 6"]:
    """The first two columns, one after the other. Source: arXiv:1812.07035; card atomic_motion."""
    return jnp.concatenate([matrix[..., 0], matrix[..., 1]], axis=-1)


@jax.jit
def skew_matrix(v: Float[Array, "*B 3"]) -> Float[Array, "*B 3 3"]:
    """K with K u = v x u. Source: card avi_ht, Mechanism 5."""
    x, y, z = jnp.moveaxis(v, -1, 0)
    zero = jnp.zeros_like(x)
    return jnp.stack([jnp.stack(r, axis=-1) for r in ([zero, -z, y], [z, zero, -x], [-y, x, zero])], axis=-2)


@jax.jit
def so3_exp(v: Float[Array, "*B 3"]) -> Float[Array, "*B 3 3"]:
    """exp of the skew matrix of v: the rotation by |v| about v (axis-angle to matrix). Source: card avi_ht, 5."""
    wide = _wide(v)
    square, skew = _square(wide)[..., None], skew_matrix(wide)
    return (jnp.eye(3, dtype=wide.dtype) + _sinc(square) * skew + _versine(square) * _product_3(skew, skew)).astype(
        v.dtype
    )


@jax.jit
def so3_log(matrix: Float[Array, "*B 3 3"]) -> Float[Array, "*B 3"]:
    """The v with so3_exp(v) = matrix and |v| <= pi (matrix to axis-angle). Source: card avi_ht, Mechanism 5."""
    q = _wide(matrix_to_quaternion(_wide(matrix)))
    w, axis = q[..., :1], q[..., 1:]
    square = _square(axis)
    small = square < 1e-4
    safe_w, ratio = jnp.where(small, w, 1.0), jnp.where(small, square, 0.0)
    ratio = ratio / jnp.square(safe_w)
    series = 2 / safe_w * (1 - ratio / 3 + jnp.square(ratio) / 5)
    norm = jnp.sqrt(jnp.where(small, 1.0, square))
    return (axis * jnp.where(small, series, 2 * jnp.arctan2(norm, w) / norm)).astype(matrix.dtype)


@jax.jit
def rotation_distance(a: Float[Array, "*#B 3 3"], b: Float[Array, "*#B 3 3"]) -> Float[Array, "*B"]:
    """The angle of a^T b in [0, pi], the geodesic distance; zero gradient at 0 and pi, where it has a kink.

    Source: card avi_ht, Training (rotation geodesic).
    """
    m = _product_3(jnp.swapaxes(_wide(a), -1, -2), _wide(b))
    axis = jnp.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], axis=-1)
    cosine = jnp.trace(m, axis1=-2, axis2=-1) - 1
    return jnp.arctan2(_norm(axis)[..., 0], cosine).astype(jnp.result_type(a, b))


def _rigid(rotation, translation):
    top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
    bottom = jnp.broadcast_to(jnp.array([0, 0, 0, 1], top.dtype), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


@jax.jit
def se3_exp(twist: Float[Array, "*B 6"]) -> Float[Array, "*B 4 4"]:
    """exp [[K(w), u], [0, 0]] of the twist (u, w): translation part first, rotation part last.

    Source: card avi_ht, Mechanism 5.
    """
    wide = _wide(twist)
    rotation = wide[..., 3:]
    square, skew = _square(rotation)[..., None], skew_matrix(rotation)
    carry = jnp.eye(3, dtype=wide.dtype) + _versine(square) * skew + _cubic(square) * _product_3(skew, skew)
    return _rigid(so3_exp(rotation), _product_3(carry, wide[..., :3, None])[..., 0]).astype(twist.dtype)


@jax.jit
def se3_log(transform: Float[Array, "*B 4 4"]) -> Float[Array, "*B 6"]:
    """The twist (u, w), |w| <= pi, with se3_exp(twist) = transform. Source: card avi_ht, Mechanism 5."""
    wide = _wide(transform)
    rotation = so3_log(wide[..., :3, :3])
    square, skew = _square(rotation)[..., None], skew_matrix(rotation)
    carry = jnp.eye(3, dtype=wide.dtype) - skew / 2 + _inverse_cubic(square) * _product_3(skew, skew)
    return jnp.concatenate([_product_3(carry, wide[..., :3, 3:])[..., 0], rotation], axis=-1).astype(transform.dtype)


@jax.jit
def se3_inverse(transform: Float[Array, "*B 4 4"]) -> Float[Array, "*B 4 4"]:
    """[[R^T, -R^T t], [0, 1]], the inverse of a rigid motion. Source: card avi_ht, Mechanism 5."""
    wide = _wide(transform)
    turned = jnp.swapaxes(wide[..., :3, :3], -1, -2)
    return _rigid(turned, -_product_3(turned, wide[..., :3, 3:])[..., 0]).astype(transform.dtype)


@jax.jit
def se3_apply(transform: Float[Array, "*#B 4 4"], points: Float[Array, "*#B N 3"]) -> Float[Array, "*B N 3"]:
    """R p + t for every point. Source: card avi_ht, Mechanism 5."""
    wide = _wide(transform)
    moved = _product_3(_wide(points), jnp.swapaxes(wide[..., :3, :3], -1, -2)) + wide[..., None, :3, 3]
    return moved.astype(jnp.result_type(transform, points))


# ---- kinematic trees -------------------------------------------------------------------------------------------------


def _levels(function: str, parents: tuple[int, ...], count: int) -> list[np.ndarray]:
    """Joints by depth, roots first."""
    if len(parents) != count:
        raise ValueError(f"{function}: parents has {len(parents)} entries for {count} joints")
    depths = [-1] * count
    pending = list(range(count))
    while pending:
        ready = [j for j in pending if parents[j] == -1 or (0 <= parents[j] < count and depths[parents[j]] >= 0)]
        if not ready:
            raise ValueError(f"{function}: joints {pending} of parents {parents} do not hang on a root (-1)")
        for j in ready:
            depths[j] = 0 if parents[j] == -1 else depths[parents[j]] + 1
        pending = [j for j in pending if j not in ready]
    return [np.flatnonzero(np.array(depths) == depth) for depth in range(max(depths) + 1)]


@partial(jax.jit, static_argnames=("parents",))
def forward_kinematics(
    rotations: Float[Array, "*B J 3 3"],
    offsets: Float[Array, "*#B J 3"],
    *,
    parents: tuple[int, ...],
    translation: Float[Array, "*B 3"] | None = None,
) -> tuple[Float[Array, "*B J 3"], Float[Array, "*B J 3 3"]]:
    """G_j = G_parent R_j, p_j = p_parent + G_parent o_j; a root (parent -1) has G = R and p = o + translation.

    Positions and global rotations of all joints. `offsets` are the bones in the rest pose, in the parent's frame;
    identity rotations give the rest pose. One step a level of the tree. O(J). Source: cards atomic_motion, Model and
    Acceptance; avi_ht, Mechanism 6.
    """
    count = rotations.shape[-3]
    turns = _wide(rotations)
    bones = jnp.broadcast_to(_wide(offsets), (*turns.shape[:-2], 3))
    levels = _levels("forward_kinematics", parents, count)
    roots, above = levels[0], np.array(parents)
    places = bones[..., roots, :]
    if translation is not None:
        places = places + _wide(translation)[..., None, :]
    frames, spots = [turns[..., roots, :, :]], [places]
    for upper, joints in itertools.pairwise(levels):
        seat = np.searchsorted(upper, above[joints])
        frame, spot = frames[-1][..., seat, :, :], spots[-1][..., seat, :]
        spots.append(spot + _product_3(frame, bones[..., joints, :, None])[..., 0])
        frames.append(_product_3(frame, turns[..., joints, :, :]))
    order = np.argsort(np.concatenate(levels))
    positions = jnp.concatenate(spots, axis=-2)[..., order, :]
    return positions.astype(rotations.dtype), jnp.concatenate(frames, axis=-3)[..., order, :, :].astype(rotations.dtype)


@partial(jax.jit, static_argnames=("parents",))
def bone_offsets(positions: Float[Array, "*B J 3"], *, parents: tuple[int, ...]) -> Float[Array, "*B J 3"]:
    """o_j = p_j - p_parent, and p_j itself at a root; its norms are the bone lengths. O(J).

    Source: card hyperpose, Training (L_bone) and Data.
    """
    _levels("bone_offsets", parents, positions.shape[-2])
    above = np.array(parents)
    start = jnp.where((above >= 0)[:, None], positions[..., np.maximum(above, 0), :], 0)
    return positions - start
