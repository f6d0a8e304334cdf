"""Rotations and rigid motions: group laws, representations against one another and against matrix exponentials."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import rotations

RANDOM = np.random.default_rng(4)
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


AXIS = draw(8, 3)
AXIS = AXIS / jnp.linalg.norm(AXIS, axis=-1, keepdims=True)
# From nothing over very little to (almost) half a turn.
ANGLES = jnp.array([0.0, 1e-4, 1e-2, 0.09, 0.11, 1.0, 3.0, np.pi - 1e-3])
VECTORS = ANGLES[:, None] * AXIS
MATRICES = rotations.so3_exp(VECTORS)
POINTS = draw(8, 3)


def exponential(matrix):
    """By its power series, in float64."""
    matrix = np.asarray(matrix, np.float64)
    total = term = np.broadcast_to(np.eye(matrix.shape[-1]), matrix.shape)
    for k in range(1, 40):
        term = term @ matrix / k
        total = total + term
    return total.astype(np.float32)


def is_rotation(matrix):
    close(matrix @ jnp.swapaxes(matrix, -1, -2), jnp.broadcast_to(jnp.eye(3), matrix.shape), atol=1e-5)
    close(jnp.linalg.det(matrix), jnp.ones(matrix.shape[:-2]), atol=1e-5)


def test_so3_exp_is_the_matrix_exponential_and_log_its_inverse():
    close(MATRICES, exponential(rotations.skew_matrix(VECTORS)))
    is_rotation(MATRICES)
    close(rotations.so3_log(MATRICES), VECTORS, atol=2e-4)
    close(rotations.skew_matrix(VECTORS) @ POINTS[..., None], jnp.cross(VECTORS, POINTS)[..., None])


def test_distance_is_the_angle():
    base = rotations.so3_exp(draw(8, 3))
    close(rotations.rotation_distance(base, base @ MATRICES), ANGLES, atol=1e-4)
    close(rotations.rotation_distance(base @ MATRICES, base), ANGLES, atol=1e-4)
    half = jnp.diag(jnp.array([1.0, -1, -1]))
    close(rotations.rotation_distance(half, jnp.eye(3)), jnp.float32(np.pi))


def test_quaternions_turn_as_their_matrices_and_multiply_as_they_do():
    p, q = draw(8, 4), draw(8, 4)
    p, q = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (p, q))
    turn = rotations.quaternion_to_matrix(q)
    is_rotation(turn)
    close(rotations.quaternion_rotate(q, POINTS), (turn @ POINTS[..., None])[..., 0])
    both = rotations.quaternion_multiply(p, q)
    close(rotations.quaternion_to_matrix(both), rotations.quaternion_to_matrix(p) @ turn)
    close(rotations.quaternion_multiply(q, rotations.quaternion_conjugate(q)), jnp.zeros((8, 4)).at[:, 0].set(1.0))
    pure = jnp.pad(POINTS, ((0, 0), (1, 0)))
    sandwich = rotations.quaternion_multiply(rotations.quaternion_multiply(q, pure), rotations.quaternion_conjugate(q))
    close(sandwich[:, 1:], rotations.quaternion_rotate(q, POINTS))
    close(rotations.quaternion_to_matrix(3 * q), turn)
    raw = rotations.quaternion_to_matrix(3 * q, normalize=False)
    close(raw - jnp.eye(3), 9 * (turn - jnp.eye(3)), atol=1e-4)
    close(rotations.quaternion_to_matrix(jnp.zeros(4)), jnp.eye(3))


def test_every_rotation_has_its_quaternion():
    halves = jnp.stack([jnp.diag(jnp.array(d)) for d in ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1], [1.0, 1, 1])])
    for matrices in (MATRICES, halves, rotations.so3_exp(3 * draw(8, 3))):
        q = rotations.matrix_to_quaternion(matrices)
        close(rotations.quaternion_to_matrix(q), matrices)
        assert jnp.all(q[:, 0] >= 0)


def test_slerp_goes_at_constant_speed_on_the_shorter_way():
    start, end = draw(8, 4), draw(8, 4).at[0].set(0.0)
    end = end.at[0].set(start[0]).at[1].set(-start[1] + 1e-4)
    ends = [rotations.quaternion_to_matrix(x) for x in (start, end)]
    whole = rotations.rotation_distance(*ends)
    for fraction in (0.0, 0.25, 1.0):
        middle = rotations.quaternion_to_matrix(rotations.quaternion_slerp(start, end, fraction))
        close(rotations.rotation_distance(ends[0], middle), fraction * whole, atol=5e-4)
        close(rotations.rotation_distance(middle, ends[1]), (1 - fraction) * whole, atol=5e-4)
    gradient = jax.grad(lambda a, b: jnp.sum(rotations.quaternion_slerp(a, b, jnp.full(8, 0.3))), argnums=(0, 1))
    assert all(np.all(np.isfinite(g)) for g in gradient(start, start))


def test_six_numbers_make_a_rotation_and_come_back():
    x = draw(8, 6)
    matrix = rotations.rotation_6d_to_matrix(x)
    is_rotation(matrix)
    close(matrix[..., 0], x[:, :3] / jnp.linalg.norm(x[:, :3], axis=-1, keepdims=True))
    # The second column lies in the plane of the two.
    close(jnp.sum(matrix[..., 2] * x[:, 3:], -1), jnp.zeros(8))
    close(rotations.rotation_6d_to_matrix(rotations.matrix_to_rotation_6d(MATRICES)), MATRICES)
    degenerate = jnp.array([[0.0] * 6, [1.0, 0, 0, 2.0, 0, 0]])
    gradient = jax.grad(lambda x: jnp.sum(rotations.rotation_6d_to_matrix(x)))(degenerate)
    assert jnp.all(jnp.isfinite(gradient))


def test_se3_exp_is_the_matrix_exponential_and_log_its_inverse():
    twists = jnp.concatenate([draw(8, 3), VECTORS], -1)
    generator = jnp.zeros((8, 4, 4)).at[:, :3, :3].set(rotations.skew_matrix(VECTORS)).at[:, :3, 3].set(twists[:, :3])
    motions = rotations.se3_exp(twists)
    close(motions, exponential(generator))
    close(rotations.se3_log(motions), twists, atol=5e-4)
    close(rotations.se3_inverse(motions) @ motions, jnp.broadcast_to(jnp.eye(4), (8, 4, 4)), atol=1e-5)
    close(rotations.se3_inverse(motions), rotations.se3_exp(-twists), atol=1e-5)
    cloud = draw(8, 5, 3)
    close(
        rotations.se3_apply(motions[::-1] @ motions, cloud),
        rotations.se3_apply(motions[::-1], rotations.se3_apply(motions, cloud)),
        atol=1e-5,
    )


def test_series_meet_the_functions_they_stand_for():
    with jax.enable_x64(True):
        for angle in (0.004, 0.02, 0.09, 0.099, 0.101, 0.2):
            twists = jnp.asarray(RANDOM.normal(size=(4, 6)))
            twists = twists.at[:, 3:].mul(angle / jnp.linalg.norm(twists[:, 3:], axis=-1, keepdims=True))
            chex.assert_trees_all_close(rotations.se3_log(rotations.se3_exp(twists)), twists, rtol=0, atol=1e-10)


def test_gradients_are_those_of_finite_differences_also_at_the_identity():
    with jax.enable_x64(True):
        twists = jnp.asarray(RANDOM.normal(size=(3, 6))) * jnp.array([1.0, 1e-3, 0.0])[:, None]
        weights = jnp.asarray(RANDOM.normal(size=(3, 6)))

        def loss(twists):
            motion = rotations.se3_exp(twists) @ rotations.se3_exp(0.3 * weights)
            return jnp.sum(jnp.sin(weights * rotations.se3_log(motion))) + jnp.sum(jnp.sin(rotations.se3_exp(twists)))

        jax.test_util.check_grads(jax.jit(loss), (twists,), 1, modes=["rev"], rtol=1e-4)


@pytest.mark.parametrize("function", [
    lambda m: rotations.so3_log(m), lambda m: rotations.rotation_distance(m, m),
    lambda m: rotations.so3_exp(rotations.so3_log(m)),
])  # fmt: skip
def test_gradients_are_finite_at_the_identity_and_at_half_a_turn(function):
    matrices = jnp.stack([jnp.eye(3), jnp.diag(jnp.array([-1.0, 1, -1]))])
    assert jnp.all(jnp.isfinite(jax.grad(lambda m: jnp.sum(function(m)))(matrices)))


def test_angles_and_tangents():
    a, b = draw(8, 3), draw(8, 3)
    a, b = a.at[0].set(0.0).at[1].set(1.0), b.at[1].set(2.0).at[2].set(-3 * a[2])
    lengths = np.linalg.norm(np.asarray(a, np.float64), axis=-1) * np.linalg.norm(np.asarray(b, np.float64), axis=-1)
    cosine = np.sum(np.asarray(a, np.float64) * np.asarray(b), -1) / np.where(lengths == 0, 1, lengths)
    expected = np.where(lengths == 0, 0, np.arccos(np.clip(cosine, -1, 1)))
    close(rotations.angle_between(a, b), expected.astype(np.float32), atol=5e-4)
    close(rotations.angle_between(5 * a, b), rotations.angle_between(a, b), atol=1e-5)
    turned = [rotations.quaternion_rotate(draw(4) * 0 + jnp.array([0.6, 0.8, 0, 0]), x) for x in (a, b)]
    close(rotations.angle_between(*turned), rotations.angle_between(a, b), atol=5e-4)
    assert all(np.all(np.isfinite(g)) for g in jax.grad(
        lambda a, b: jnp.sum(rotations.angle_between(a, b)), argnums=(0, 1))(a, b))  # fmt: skip
    flat = rotations.sphere_tangent(AXIS, a)
    close(jnp.sum(flat * AXIS, -1), jnp.zeros(8))
    close(rotations.sphere_tangent(AXIS, flat), flat)


# ---- kinematic trees -------------------------------------------------------------------------------------------------

PARENTS = (1, -1, 1, 2, 0, 2, -1)  # two roots, parents after their children
TURNS, OFFSETS = rotations.so3_exp(draw(2, 7, 3)), draw(7, 3)


def walk(turns, offsets, translation):
    positions, frames = np.zeros((2, 7, 3)), np.zeros((2, 7, 3, 3))
    for joint in (1, 6, 0, 2, 3, 4, 5):
        parent = PARENTS[joint]
        if parent == -1:
            frames[:, joint], positions[:, joint] = turns[:, joint], offsets[joint] + translation
        else:
            frames[:, joint] = frames[:, parent] @ turns[:, joint]
            positions[:, joint] = positions[:, parent] + frames[:, parent] @ offsets[joint]
    return positions.astype(np.float32), frames.astype(np.float32)


def test_forward_kinematics_is_a_walk_down_the_tree():
    move = draw(2, 3)
    ours = rotations.forward_kinematics(TURNS, OFFSETS, parents=PARENTS, translation=move)
    close(ours, walk(*(np.asarray(x, np.float64) for x in (TURNS, OFFSETS, move))))
    positions, _ = rotations.forward_kinematics(TURNS, OFFSETS, parents=PARENTS)
    bones = rotations.bone_offsets(positions, parents=PARENTS)
    close(jnp.linalg.norm(bones, axis=-1), jnp.broadcast_to(jnp.linalg.norm(OFFSETS, axis=-1), (2, 7)))


def test_identity_rotations_give_the_rest_pose():
    rest, _ = rotations.forward_kinematics(jnp.broadcast_to(jnp.eye(3), (2, 7, 3, 3)), OFFSETS, parents=PARENTS)
    close(rotations.bone_offsets(rest, parents=PARENTS), jnp.broadcast_to(OFFSETS, (2, 7, 3)))
    alone, _ = rotations.forward_kinematics(TURNS[:, :1], OFFSETS[:1], parents=(-1,))
    close(alone, jnp.broadcast_to(OFFSETS[:1], (2, 1, 3)))


def test_bad_trees_say_so():
    with pytest.raises(ValueError, match="7 joints"):
        rotations.forward_kinematics(TURNS, OFFSETS, parents=(-1, 0))
    with pytest.raises(ValueError, match="do not hang on a root"):
        rotations.bone_offsets(OFFSETS[:3], parents=(-1, 2, 1))


# ---- every function: bfloat16, jit = eager, vmap ---------------------------------------------------------------------

SWEEP = {
    "quaternions": (
        lambda q, p, v: rotations.quaternion_rotate(
            rotations.quaternion_slerp(q, rotations.quaternion_multiply(q, p), 0.5), v),
        (draw(8, 4), draw(8, 4), POINTS),
    ),
    "so3": (lambda v: rotations.so3_log(rotations.so3_exp(v)), (0.3 * VECTORS,)),
    "se3": (lambda t, x: rotations.se3_apply(rotations.se3_inverse(rotations.se3_exp(t)), x), (0.5 * draw(6), POINTS)),
    "6d": (lambda x: rotations.matrix_to_quaternion(rotations.rotation_6d_to_matrix(x)), (draw(8, 6),)),
    "angle": (rotations.angle_between, (draw(8, 3), draw(8, 3))),
    "distance": (rotations.rotation_distance, (rotations.so3_exp(draw(8, 3)), rotations.so3_exp(draw(8, 3)))),
    "sphere": (rotations.sphere_tangent, (AXIS, POINTS)),
    "tree": (lambda r, o: rotations.forward_kinematics(r, o, parents=PARENTS)[0], (TURNS, OFFSETS)),
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEP)
def test_bfloat16_eager_and_vmap(name):
    function, arguments = SWEEP[name]
    expected = function(*arguments)
    with jax.disable_jit():
        close(function(*arguments), expected)
    half = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x]).astype(jnp.bfloat16), arguments))[0]
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), expected, rtol=0.1, atol=0.1)
