"""Projective geometric algebra: the algebra's laws, motions of points and planes, equivariance of every layer."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import clifford, rotations

RANDOM = np.random.default_rng(5)
close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
product, outer = clifford.pga_geometric_product, clifford.pga_outer_product
NAMES = ["1", "e0", "e1", "e2", "e3", "e01", "e02", "e03", "e12", "e13", "e23", "e012", "e013", "e023", "e123", "e0123"]
BLADE = dict(zip(NAMES, jnp.eye(16), strict=True))


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


QUATERNION, OFFSET, NORMAL, POINT = unit(draw(4)), draw(3), unit(draw(3)), draw(6, 3)
VERSORS = {
    "rotation": clifford.pga_embed_rotation(QUATERNION),
    "translation": clifford.pga_embed_translation(OFFSET),
    "reflection": clifford.pga_embed_plane(NORMAL, OFFSET),
}


def move(name, points):
    if name == "rotation":
        return rotations.quaternion_rotate(QUATERNION, points)
    if name == "translation":
        return points + OFFSET
    return points - 2 * ((points - OFFSET) @ NORMAL)[..., None] * NORMAL


# ---- the algebra -----------------------------------------------------------------------------------------------------


def test_the_basis_multiplies_as_it_should():
    one, zero = BLADE["1"], jnp.zeros(16)
    for i in range(4):
        close(product(BLADE[f"e{i}"], BLADE[f"e{i}"]), zero if i == 0 else one)
        for j in range(i + 1, 4):
            close(product(BLADE[f"e{i}"], BLADE[f"e{j}"]), BLADE[f"e{i}{j}"])
            close(product(BLADE[f"e{j}"], BLADE[f"e{i}"]), -BLADE[f"e{i}{j}"])
    close(product(product(BLADE["e0"], BLADE["e1"]), BLADE["e23"]), BLADE["e0123"])
    close(product(BLADE["e123"], BLADE["e123"]), -one)


def test_products_are_associative_and_reverse_turns_them_round():
    x, y, z = draw(3, 5, 16)
    for times in (product, outer):
        close(times(times(x, y), z), times(x, times(y, z)), atol=1e-3)
        close(clifford.pga_reverse(times(x, y)), times(clifford.pga_reverse(y), clifford.pga_reverse(x)))
    vector = clifford.pga_grade(x, grade=1)
    close(outer(vector, vector), jnp.zeros((5, 16)))
    close(sum(clifford.pga_grade(x, grade=g) for g in range(5)), x)
    close(clifford.pga_inner_product(x, y), product(clifford.pga_reverse(x), y)[:, 0])


def test_the_dual_completes_every_blade():
    for name in NAMES:
        close(outer(BLADE[name], clifford.pga_dual(BLADE[name])), BLADE["e0123"])


def test_join_of_points_passes_through_them():
    a, b, c = (clifford.pga_embed_point(p) for p in POINT[:3])
    line = clifford.pga_join(a, b)
    plane = clifford.pga_join(line, c)
    for point in (a, b, c):
        close(outer(plane, point), jnp.zeros(16))
    close(clifford.pga_join(line, a), jnp.zeros(16))
    close(clifford.pga_join(a, b, 2.5 * c), 2.5 * line)


def test_a_plane_meets_exactly_its_points():
    plane = clifford.pga_embed_plane(NORMAL, OFFSET)
    height = outer(plane, clifford.pga_embed_point(POINT))[:, 15]
    close(height, (POINT - OFFSET) @ NORMAL)


# ---- motions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERSORS)
def test_the_sandwich_moves_points_and_keeps_the_inner_product(name):
    moved = clifford.pga_sandwich(3.0 * VERSORS[name], clifford.pga_embed_point(POINT))
    close(clifford.pga_extract_point(moved), move(name, POINT))
    x, y = draw(2, 5, 16)
    turned = [clifford.pga_sandwich(VERSORS[name], a) for a in (x, y)]
    close(clifford.pga_inner_product(*turned), clifford.pga_inner_product(x, y), atol=1e-3)


def test_a_reflection_turns_its_own_plane_round():
    plane = VERSORS["reflection"]
    close(clifford.pga_sandwich(plane, plane), -plane)
    close(clifford.pga_sandwich(plane, BLADE["1"]), BLADE["1"])


def test_motions_compose_by_the_product():
    first, second = VERSORS["rotation"], VERSORS["translation"]
    both = clifford.pga_sandwich(product(second, first), clifford.pga_embed_point(POINT))
    close(clifford.pga_extract_point(both), move("translation", move("rotation", POINT)))
    close(clifford.pga_extract_point(jnp.zeros(16)), jnp.zeros(3))
    close(clifford.pga_extract_point(-2 * clifford.pga_embed_point(POINT)), POINT)


WEIGHT, X, Y = draw(2, 3, 9), draw(4, 3, 16), draw(4, 3, 16)
REFERENCE = jnp.mean(X, axis=(0, 1))
SHAPE = (1, 4, 2, 3, 16)
# Points are of weight about 1; in attention the distances see to translations.
QUERY, KEY, VALUE = (0.3 * draw(*SHAPE) + clifford.pga_embed_point(draw(*SHAPE[:-1], 3)) for _ in range(3))
NO_SCALARS = jnp.zeros((1, 4, 2, 0))


def attend(query, key, value, **options):
    output, _ = clifford.pga_attention(query, key, value, NO_SCALARS, NO_SCALARS, NO_SCALARS, **options)
    return output


EQUIVARIANT = {
    "product": (product, (X, Y)),
    "join": (lambda x, y, r: clifford.pga_join(x, y, r), (X, Y, REFERENCE)),
    "linear": (lambda x: clifford.pga_linear(x, WEIGHT, scalar_bias=jnp.ones(2)), (X,)),
    "norm": (clifford.pga_layer_norm, (X,)),
    "gate": (clifford.pga_gated_gelu, (X,)),
    "attention": (partial(attend, epsilon=1e-9), (QUERY, KEY, VALUE)),
}


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_layers_are_equivariant_under_motions_and_reflections(name):
    function, arguments = EQUIVARIANT[name]
    output = function(*arguments)
    for versor in VERSORS.values():
        moved = function(*(clifford.pga_sandwich(versor, x) for x in arguments))
        close(moved, clifford.pga_sandwich(versor, output), rtol=2e-3, atol=5e-3)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_the_nine_maps_are_independent_normed_and_those_of_their_names():
    maps = np.stack([
        np.asarray(clifford.pga_linear(jnp.eye(16)[:, None], jnp.eye(9)[b][None, None]))[:, 0].T for b in range(9)
    ])  # fmt: skip
    close(np.sqrt((maps**2).sum((1, 2))), np.ones(9))
    assert np.linalg.matrix_rank(maps.reshape(9, -1)) == 9
    raw = np.stack([
        np.asarray(clifford.pga_linear(jnp.eye(16)[:, None], jnp.eye(9)[b][None, None], normalize_basis=False))[:, 0].T
        for b in range(9)
    ])  # fmt: skip
    close(np.sqrt((raw**2).sum((1, 2))) ** 2, np.array([1, 4, 6, 4, 1, 1, 3, 3, 1.0]))
    sends = {5: ("1", "e0"), 6: ("e2", "e02"), 7: ("e13", "e013"), 8: ("e123", "e0123")}
    for b, (source, target) in sends.items():
        close(raw[b] @ np.asarray(BLADE[source]), np.asarray(BLADE[target]))


def test_a_scalar_bias_goes_to_the_scalars():
    bias = draw(4, 2)
    plain, biased = (clifford.pga_linear(X, WEIGHT, scalar_bias=b) for b in (None, bias))
    close(biased[..., 0], plain[..., 0] + bias)
    close(biased[..., 1:], plain[..., 1:])


def test_distance_features_multiply_to_the_negative_square_distance():
    points = clifford.pga_embed_point(POINT)
    expected = -jnp.sum(jnp.square(POINT[:, None] - POINT), -1)
    query, key = clifford.pga_distance_features(points, epsilon=0.0)
    close(query @ key.T, expected)
    query, key = clifford.pga_distance_features(points)
    close(query @ key.T, expected, rtol=1e-2)
    # The weight of a point does not count.
    close(
        clifford.pga_distance_features(3 * points, epsilon=0.0)[0],
        clifford.pga_distance_features(points, epsilon=0.0)[0],
    )
    gradient = jax.grad(lambda x: jnp.sum(clifford.pga_distance_features(x)[0]))(jnp.zeros((2, 16)))
    assert jnp.all(jnp.isfinite(gradient))


def test_attention_is_a_loop_over_heads():
    mv, scalars, log_weight = draw(2, 5, 4, 3, 16), draw(2, 5, 4, 6), draw(4, 3)
    shared, shared_scalars = draw(2, 5, 1, 3, 16), draw(2, 5, 1, 6)
    values, value_scalars, mask = draw(2, 5, 1, 2, 16), draw(2, 5, 1, 3), jnp.tril(jnp.ones((5, 5), bool))
    ours, ours_scalars = clifford.pga_attention(
        mv, shared, values, scalars, shared_scalars, value_scalars, log_distance_weight=log_weight, mask=mask
    )
    near = np.asarray(jnp.sum(clifford.pga_inner_product(mv[:, :, None], shared[:, None]), -1), np.float64)
    near = near - np.asarray(jnp.sum(mv[..., 14][:, :, None] * shared[..., 14][:, None], -1))
    query_far, key_far = clifford.pga_distance_features(mv)[0], clifford.pga_distance_features(shared[:, :, 0])[1]
    far = np.einsum("bqhcf,bkcf,hc->bqkh", query_far, key_far, np.exp(log_weight))
    logits = (near + far + np.einsum("bqhs,bks->bqkh", scalars, shared_scalars[:, :, 0])) / np.sqrt(12 * 3 + 6)
    powers = np.exp(logits - logits.max(2, keepdims=True)) * np.asarray(mask)[None, :, :, None]
    weights = (powers / powers.sum(2, keepdims=True)).astype(np.float32)
    close(ours, np.einsum("bqkh,bkcx->bqhcx", weights, values[:, :, 0]))
    close(ours_scalars, np.einsum("bqkh,bks->bqhs", weights, value_scalars[:, :, 0]))


def test_no_key_gives_zero_with_zero_gradient_and_zeros_are_safe():
    run = partial(attend, mask=jnp.zeros((1, 1, 4, 4), bool))
    assert not jnp.any(run(QUERY, KEY, VALUE))
    assert not any(np.any(g) for g in jax.grad(lambda *a: jnp.sum(run(*a)), argnums=(0, 1, 2))(QUERY, KEY, VALUE))
    gradient = jax.grad(lambda x: jnp.sum(clifford.pga_layer_norm(x)) + jnp.sum(clifford.pga_sandwich(x, x)))
    assert jnp.all(jnp.isfinite(gradient(jnp.zeros((2, 3, 16)))))


def test_errors():
    with pytest.raises(ValueError, match="grade 5 is not one of"):
        clifford.pga_grade(X, grade=5)


# ---- every function: bfloat16, jit = eager, vmap ---------------------------------------------------------------------

SWEEP = {
    "products": (lambda x, y: product(x, y) + outer(x, y) + clifford.pga_join(x, y), (X, Y)),
    "inner": (clifford.pga_inner_product, (X, Y)),
    "sandwich": (clifford.pga_sandwich, (VERSORS["rotation"], X)),
    "linear": (clifford.pga_linear, (X, WEIGHT)),
    "norm": (lambda x: clifford.pga_gated_gelu(clifford.pga_layer_norm(clifford.pga_reverse(x))), (X,)),
    "embed": (
        lambda p, n, q: clifford.pga_embed_point(p) + clifford.pga_embed_plane(n, p)
        + clifford.pga_embed_rotation(q) + clifford.pga_embed_translation(p),
        (POINT[0], NORMAL, QUATERNION),
    ),
    "attention": (attend, (QUERY, KEY, VALUE)),
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEP)
def test_bfloat16_eager_and_vmap(name):
    function, arguments = SWEEP[name]
    expected = function(*arguments)
    with jax.disable_jit():
        close(function(*arguments), expected)
    half = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x]).astype(jnp.bfloat16), arguments))[0]
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), expected, rtol=0.1, atol=0.1 * float(jnp.max(jnp.abs(expected))))
