"""Hyperbolic space: group and metric laws, the three models against one another, attention against a float64 loop."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import hyperbolic as space

RANDOM = np.random.default_rng(3)
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)
CURVATURES = [1.0, 0.3]


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


V, W = 0.7 * draw(7, 3), 0.7 * draw(7, 3)


def point(v, curvature):
    return space.lorentz_exp_origin(v, curvature=curvature)


def tangent(x, v, curvature):
    """v made tangent at x."""
    full = jnp.pad(v, ((0, 0), (1, 0)))
    return full + curvature * space.lorentz_inner(x, full)[:, None] * x


# ---- Lorentz ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", CURVATURES)
def test_exp_and_log_at_the_origin(c):
    x = point(V, c)
    close(space.lorentz_inner(x, x), jnp.full(7, -1 / c), atol=1e-4)
    close(space.lorentz_log_origin(x, curvature=c), V)
    origin = point(jnp.zeros((1, 3)), c)
    close(space.lorentz_distance(origin, x, curvature=c), jnp.linalg.norm(V, axis=-1))
    close(space.lorentz_project(x.at[:, 0].set(9.0), curvature=c), x)
    big = space.lorentz_exp_origin(100 * V, curvature=c, max_norm=4.0)
    close(big, point(4 * V / jnp.linalg.norm(V, axis=-1, keepdims=True), c), rtol=1e-4)
    close(jnp.linalg.norm(space.lorentz_log_origin(big, curvature=c, max_norm=2.0), axis=-1), jnp.full(7, 2.0))


@pytest.mark.parametrize("c", CURVATURES)
def test_exp_and_log_at_points(c):
    x, y = point(V, c), point(W, c)
    v = space.lorentz_log(x, y, curvature=c)
    close(space.lorentz_inner(x, v), jnp.zeros(7), atol=2e-4)
    close(space.lorentz_exp(x, v, curvature=c), y, rtol=1e-4, atol=1e-4)
    close(jnp.sqrt(space.lorentz_inner(v, v)), space.lorentz_distance(x, y, curvature=c), rtol=1e-3)
    near = space.lorentz_exp(x, 1e-2 * v, curvature=c)
    close(space.lorentz_log(x, near, curvature=c), 1e-2 * v, atol=1e-5)


def test_distance_is_the_acosh_of_the_inner_product_and_a_metric():
    x, y, z = (point(v, 1.0) for v in (V, W, draw(7, 3)))
    wide = [np.asarray(p, np.float64) for p in (x, y)]
    inner = np.sum(wide[0][:, 1:] * wide[1][:, 1:], -1) - wide[0][:, 0] * wide[1][:, 0]
    close(space.lorentz_distance(x, y), np.arccosh(-inner))
    close(space.lorentz_distance(x, y), space.lorentz_distance(y, x))
    assert jnp.all(space.lorentz_distance(x, z) <= space.lorentz_distance(x, y) + space.lorentz_distance(y, z) + 1e-5)
    # As the curvature goes to 0 the space becomes flat.
    flat = space.lorentz_distance(point(V, 1e-4), point(W, 1e-4), curvature=1e-4)
    close(flat, jnp.linalg.norm(V - W, axis=-1), rtol=1e-2)


@pytest.mark.parametrize("c", CURVATURES)
def test_transport_keeps_products_and_turns_the_logarithm(c):
    x, y = point(V, c), point(W, c)
    u, v = (tangent(x, a, c) for a in (W, V))
    carried = [space.lorentz_transport(x, y, a, curvature=c) for a in (u, v)]
    close(space.lorentz_inner(*carried), space.lorentz_inner(u, v), rtol=1e-3, atol=1e-3)
    close(space.lorentz_inner(y, carried[0]), jnp.zeros(7), atol=1e-3)
    way = space.lorentz_transport(x, y, space.lorentz_log(x, y, curvature=c), curvature=c)
    close(way, -space.lorentz_log(y, x, curvature=c), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("c", CURVATURES)
def test_the_three_models_agree(c):
    x, y = point(V, c), point(W, c)
    ball, klein = space.lorentz_to_poincare(x, curvature=c), space.lorentz_to_klein(x, curvature=c)
    close(space.poincare_to_lorentz(ball, curvature=c), x, rtol=1e-4)
    close(space.klein_to_lorentz(klein, curvature=c), x, rtol=1e-3)
    close(space.poincare_to_klein(ball, curvature=c), klein)
    close(space.klein_to_poincare(klein, curvature=c), ball, atol=1e-4)
    other = space.lorentz_to_poincare(y, curvature=c)
    close(space.poincare_distance(ball, other, curvature=c), space.lorentz_distance(x, y, curvature=c), rtol=1e-4)
    # exp_0 of the ball doubles lengths: its metric at 0 is 4 |v|^2.
    close(space.poincare_exp_origin(V / 2, curvature=c), ball)


@pytest.mark.parametrize("c", CURVATURES)
def test_the_midpoints_of_all_models_are_one(c):
    points, weights = point(draw(2, 5, 3), c), jnp.abs(draw(2, 5))
    ours = space.lorentz_centroid(points, weights, curvature=c)
    close(space.lorentz_inner(ours, ours), jnp.full(2, -1 / c), atol=1e-4)
    ball = space.lorentz_to_poincare(points, curvature=c)
    close(space.poincare_midpoint(ball, weights, curvature=c), space.lorentz_to_poincare(ours, curvature=c), atol=1e-4)
    klein = np.asarray(space.lorentz_to_klein(points, curvature=c), np.float64)
    share = np.asarray(weights) / np.sqrt(1 - c * np.sum(klein**2, -1))
    einstein = np.einsum("bn,bnd->bd", share, klein) / share.sum(-1, keepdims=True)
    close(space.lorentz_to_klein(ours, curvature=c), einstein.astype(np.float32), atol=1e-4)
    order = jnp.array([3, 1, 0, 4, 2])
    close(space.lorentz_centroid(points[:, order], weights[:, order], curvature=c), ours)
    same = jnp.repeat(points[:, :1], 5, 1)
    close(space.lorentz_centroid(same, curvature=c), points[:, 0], rtol=1e-4)


def test_a_midpoint_of_two_is_as_far_from_both_and_of_nothing_the_origin():
    ball = space.poincare_exp_origin(V[:2])
    middle = space.poincare_midpoint(ball)
    close(space.poincare_distance(middle, ball[0]), space.poincare_distance(middle, ball[1]), rtol=1e-4)
    nothing = jnp.zeros(2)
    assert not jnp.any(space.poincare_midpoint(ball, nothing))
    close(space.lorentz_centroid(point(V[:2], 1.0), nothing), point(jnp.zeros(3), 1.0))
    gradient = jax.grad(lambda p: jnp.sum(space.lorentz_centroid(p, nothing)))(point(V[:2], 1.0))
    assert not jnp.any(gradient)


# ---- Poincaré --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", CURVATURES)
def test_ball_identities(c):
    x, y = (space.poincare_exp_origin(0.5 * v, curvature=c) for v in (V, W))
    close(space.poincare_add(-x, space.poincare_add(x, y, curvature=c), curvature=c), y, atol=1e-4)
    close(space.poincare_log_origin(x, curvature=c), 0.5 * V, atol=1e-4)
    close(space.poincare_exp(x, space.poincare_log(x, y, curvature=c), curvature=c), y, atol=1e-4)
    close(space.poincare_log(jnp.zeros_like(y), y, curvature=c), 0.5 * W, atol=1e-4)
    shifted = jnp.linalg.norm(space.poincare_add(-x, y, curvature=c), axis=-1)
    expected = 2 / np.sqrt(c) * np.arctanh(np.sqrt(c) * np.asarray(shifted, np.float64))
    close(space.poincare_distance(x, y, curvature=c), expected.astype(np.float32), rtol=1e-3)
    close(space.poincare_distance(x, y, curvature=c), space.poincare_distance(y, x, curvature=c))
    outside = space.poincare_project(50 * V, curvature=c)
    assert jnp.all(jnp.linalg.norm(outside, axis=-1) < 1 / np.sqrt(c))
    far = space.poincare_distance(outside, -outside, curvature=c)
    assert jnp.all(jnp.isfinite(far))


def test_the_ball_is_flat_when_its_curvature_goes_to_zero():
    close(space.poincare_distance(V, W, curvature=1e-6), 2 * jnp.linalg.norm(V - W, axis=-1), rtol=1e-4)
    close(space.poincare_add(V, W, curvature=1e-7), V + W, rtol=1e-4)


# ---- gradients where things coincide ---------------------------------------------------------------------------------


def origin_like(x):
    return space.lorentz_exp_origin(jnp.zeros_like(x[..., 1:]))


SINGULAR = {
    "lorentz distance": lambda x: space.lorentz_distance(x, x[::-1]) + space.lorentz_distance(x, x),
    "lorentz log": lambda x: space.lorentz_log(x, x),
    "lorentz exp": lambda x: space.lorentz_exp(x, 0 * x),
    "origin": lambda x: space.lorentz_exp_origin(space.lorentz_log_origin(x), max_norm=1.0),
    "centroid": lambda x: space.lorentz_centroid(x),
    "poincare distance": lambda x: space.poincare_distance(x, x),
    "poincare log": lambda x: space.poincare_log(x, x) + space.poincare_log_origin(x),
    "poincare exp": lambda x: space.poincare_exp(0 * x, 0 * x),
    "poincare midpoint": space.poincare_midpoint,
}


@pytest.mark.parametrize("name", SINGULAR)
def test_gradients_are_finite_where_points_coincide(name):
    x = jnp.array([[0.3, -0.2], [0.0, 0.0], [0.3, -0.2]])
    x = x if name.startswith("poincare") else space.lorentz_exp_origin(x)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(SINGULAR[name](x)))(x)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        x, y = (jnp.asarray(RANDOM.normal(size=(4, 3))) for _ in range(2))

        def loss(v, w, c):
            x, y = (space.lorentz_exp_origin(a, curvature=c) for a in (v, w))
            ball = space.lorentz_to_poincare(x, curvature=c), space.lorentz_to_poincare(y, curvature=c)
            return (
                jnp.sum(space.lorentz_distance(x, y, curvature=c) ** 3)
                + jnp.sum(jnp.sin(space.lorentz_log(x, y, curvature=c)))
                + jnp.sum(jnp.sin(space.poincare_midpoint(ball[0], jnp.arange(4.0), curvature=c)))
                + jnp.sum(jnp.sin(space.poincare_log(*ball, curvature=c)))
            )

        scale = jnp.array([1.0, 1.0, 1e-2, 1e-2])[:, None]
        jax.test_util.check_grads(jax.jit(loss), (scale * x, scale * y, jnp.array(0.7)), 1, modes=["rev"], rtol=1e-4)


def test_series_meet_the_functions_they_stand_for():
    with jax.enable_x64(True):
        x = space.lorentz_exp_origin(jnp.asarray(RANDOM.normal(size=(4, 3))))
        way = tangent(x, jnp.asarray(RANDOM.normal(size=(4, 3))), 1.0)
        way = way / jnp.sqrt(space.lorentz_inner(way, way))[:, None]
        for length in (0.09, 0.11, 0.13, 0.15):
            y = space.lorentz_exp(x, length * way)
            chex.assert_trees_all_close(space.lorentz_log(x, y), length * way, rtol=0, atol=1e-9)
            chex.assert_trees_all_close(space.lorentz_distance(x, y), jnp.full(4, length), rtol=0, atol=1e-9)
            v = length * jnp.eye(3)
            chex.assert_trees_all_close(space.lorentz_log_origin(space.lorentz_exp_origin(v)), v, rtol=0, atol=1e-9)
            chex.assert_trees_all_close(space.poincare_log_origin(space.poincare_exp_origin(v)), v, rtol=0, atol=1e-9)


# ---- attention -------------------------------------------------------------------------------------------------------

SHAPE = (2, 5, 2, 3)
QUERY, KEY, VALUE = (space.lorentz_exp_origin(0.7 * draw(*SHAPE)) for _ in range(3))
TEMPERATURE = jnp.array([0.5, 2.0])[:, None, None]
MASK = jnp.asarray(RANDOM.uniform(size=(2, 1, 5, 5)) > 0.4).at[0, 0, 1].set(False)
BIAS = draw(2, 5, 5)


def attention_by_loop(kind, aggregation):
    query, key, value = (np.asarray(a, np.float64) for a in (QUERY, KEY, VALUE))
    signs = np.array([-1.0, 1, 1, 1])
    inner = np.einsum("d,bqhd,bkhd->bhqk", signs, query, key)
    distance = np.arccosh(np.maximum(-inner, 1))
    scores = {"inner": 1 + inner, "distance": -distance, "squared_distance": -(distance**2)}[kind]
    scores = scores / np.asarray(TEMPERATURE) + np.asarray(BIAS)
    powers = np.exp(scores) * np.asarray(MASK)
    total = powers.sum(-1, keepdims=True)
    weights = powers / np.where(total == 0, 1, total)
    if aggregation == "mean":
        return np.einsum("bhqk,bkhd->bqhd", weights, value)
    if aggregation == "tangent":
        norm = np.linalg.norm(value[..., 1:], axis=-1, keepdims=True)
        mean = np.einsum("bhqk,bkhd->bqhd", weights, np.arcsinh(norm) / norm * value[..., 1:])
        norm = np.linalg.norm(mean, axis=-1, keepdims=True)
        return np.concatenate([np.cosh(norm), np.sinh(norm) / np.where(norm == 0, 1, norm) * mean], -1)
    total = np.einsum("bhqk,bkhd->bqhd", weights, value)
    norm = np.sqrt(-np.einsum("d,bqhd->bqh", signs, total**2))[..., None]
    origin = np.array([1.0, 0, 0, 0])
    return np.where(norm == 0, origin, total / np.where(norm == 0, 1, norm))


@pytest.mark.parametrize(
    ("kind", "aggregation"),
    [("squared_distance", "centroid"), ("distance", "tangent"), ("inner", "mean"), ("inner", "centroid")],
)
def test_attention_is_a_loop(kind, aggregation):
    run = partial(
        space.lorentz_attention, kind=kind, aggregation=aggregation, temperature=TEMPERATURE, bias=BIAS, mask=MASK
    )
    close(run(QUERY, KEY, VALUE), attention_by_loop(kind, aggregation).astype(np.float32), atol=1e-4)
    gradients = jax.grad(lambda *a: jnp.sum(run(*a)), argnums=(0, 1, 2))(QUERY, QUERY, VALUE)
    assert jax.tree.all(jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), gradients))


def test_scores_are_zero_at_coincidence_never_positive_and_euclidean_near_the_origin():
    for kind in ("inner", "distance", "squared_distance"):
        scores = space.lorentz_scores(QUERY, QUERY, kind=kind)
        close(jnp.diagonal(scores, axis1=-2, axis2=-1), jnp.zeros((2, 2, 5)), atol=2e-5)
        assert jnp.all(scores <= 2e-5)
    q, k = 1e-2 * draw(1, 4, 1, 3), 1e-2 * draw(1, 4, 1, 3)
    square = jnp.sum(jnp.square(q[0, :, None, 0] - k[0, None, :, 0]), -1)
    ours = space.lorentz_scores(space.lorentz_exp_origin(q), space.lorentz_exp_origin(k), kind="inner")
    close(ours[0, 0], -square / 2, atol=1e-6)


def test_scores_are_never_positive_for_points_so_far_out_that_rounding_rules():
    far = space.lorentz_exp_origin(12.0 * QUERY[..., 1:] / jnp.linalg.norm(QUERY[..., 1:], axis=-1, keepdims=True))
    for kind in ("distance", "squared_distance"):
        assert jnp.all(space.lorentz_scores(far, far * (1 + 1e-6), kind=kind) <= 0)


def test_no_key_gives_the_origin_with_zero_gradient():
    run = partial(space.lorentz_attention, mask=jnp.zeros((1, 1, 5, 5), bool))
    for aggregation in ("centroid", "tangent"):
        close(run(QUERY, KEY, VALUE, aggregation=aggregation), origin_like(QUERY))
    assert not jnp.any(run(QUERY, KEY, VALUE, aggregation="mean"))
    gradients = jax.grad(lambda *a: jnp.sum(run(*a)), argnums=(0, 1, 2))(QUERY, KEY, VALUE)
    assert not any(np.any(g) for g in gradients)


def test_errors():
    with pytest.raises(ValueError, match="kind 'cosine'"):
        space.lorentz_scores(QUERY, KEY, kind="cosine")
    with pytest.raises(ValueError, match="aggregation 'sum'"):
        space.lorentz_attention(QUERY, KEY, VALUE, aggregation="sum")


# ---- every function: bfloat16, jit = eager, vmap ---------------------------------------------------------------------

X, Y = point(0.5 * V, 1.0), point(0.5 * W, 1.0)
P, Q = 0.4 * jnp.tanh(V), 0.4 * jnp.tanh(W)
SWEEP = {
    "lorentz": (
        lambda x, y: space.lorentz_exp(x, space.lorentz_transport(y, x, space.lorentz_log(y, x)))
        + space.lorentz_distance(x, y)[:, None], (X, Y),
    ),
    "origin": (lambda v: space.lorentz_log_origin(space.lorentz_project(space.lorentz_exp_origin(v))), (V,)),
    "centroid": (space.lorentz_centroid, (X,)),
    "attention": (space.lorentz_attention, (QUERY, KEY, VALUE)),
    "poincare": (
        lambda x, y: space.poincare_exp(x, space.poincare_log(x, y)) + space.poincare_distance(x, y)[:, None]
        + space.poincare_add(x, y) + space.poincare_midpoint(y), (P, Q),
    ),
    "models": (
        lambda x: space.klein_to_poincare(space.lorentz_to_klein(x)) + space.lorentz_to_poincare(x), (X,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWEEP)
def test_bfloat16_eager_and_vmap(name):
    function, arguments = SWEEP[name]
    expected = function(*arguments)
    with jax.disable_jit():
        close(function(*arguments), expected)
    half = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x]).astype(jnp.bfloat16), arguments))[0]
    assert half.dtype == jnp.bfloat16
    # A bfloat16 point is off the hyperboloid by a per cent.
    close(half.astype(jnp.float32), expected, rtol=0.1, atol=0.1)
