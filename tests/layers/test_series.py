"""Moving averages, decomposition and instance normalisation against plain loops and closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layers

RNG = np.random.default_rng(0)


def moving_average_by_loop(x: np.ndarray, window: int) -> np.ndarray:
    half, length = window // 2, x.shape[1]
    rows = [np.clip(np.arange(t - half, t + half + 1), 0, length - 1) for t in range(length)]
    return np.stack([x[:, r].mean(axis=1) for r in rows], axis=1)


@pytest.mark.parametrize(("length", "window"), [(1, 1), (7, 3), (12, 25), (31, 5)])
def test_moving_average_is_the_mean_of_the_window(length, window):
    x = RNG.normal(size=(2, length, 3)).astype(np.float32)
    chex.assert_trees_all_close(layers.moving_average(x, window=window), moving_average_by_loop(x, window), atol=1e-6)


@pytest.mark.parametrize("window", [0, 4, -3])
def test_moving_average_wants_an_odd_window(window):
    with pytest.raises(ValueError, match=f"window {window} is not a positive odd number"):
        layers.moving_average(jnp.ones((1, 8, 1)), window=window)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(1e-3, 1e3))
def test_the_parts_add_up_to_the_series(seed, scale):
    x = (np.random.default_rng(seed).normal(size=(2, 40, 3)) * scale).astype(np.float32)
    parts = layers.series_decomposition(x, window=7)
    chex.assert_trees_all_close(parts.seasonal + parts.trend, x, rtol=1e-6, atol=1e-6 * scale)


def test_a_constant_has_no_seasonal_part():
    parts = layers.series_decomposition(jnp.full((1, 30, 2), 3.7), window=25)
    chex.assert_trees_all_close(parts.seasonal, jnp.zeros((1, 30, 2)), atol=1e-6)


def test_the_trend_of_a_ramp_is_the_ramp_away_from_the_ends():
    ramp = jnp.arange(60.0)[None, :, None]
    trend = layers.series_decomposition(ramp, window=25).trend
    chex.assert_trees_all_close(trend[:, 12:-12], ramp[:, 12:-12], rtol=1e-6)


def test_moving_average_has_the_gradient_of_the_loop():
    x = RNG.normal(size=(1, 9, 1)).astype(np.float32)
    weights = RNG.normal(size=(1, 9, 1)).astype(np.float32)
    gradient = jax.grad(lambda v: jnp.sum(layers.moving_average(v, window=5) * weights))(jnp.asarray(x))
    columns = [moving_average_by_loop(np.eye(9, dtype=np.float32)[None, :, j : j + 1], 5)[0, :, 0] for j in range(9)]
    chex.assert_trees_all_close(gradient[0, :, 0], np.stack(columns) @ weights[0, :, 0], atol=1e-6)


def test_instance_norm_gives_mean_zero_and_unit_scale_and_comes_back():
    x = (RNG.normal(size=(2, 50, 3)) * 40 + 1000).astype(np.float32)
    z, statistics = layers.instance_normalize(x)
    chex.assert_trees_all_close(np.mean(z, axis=1), np.zeros((2, 3)), atol=1e-4)
    chex.assert_trees_all_close(np.std(z, axis=1), np.ones((2, 3)), rtol=1e-4)
    chex.assert_trees_all_close(layers.instance_denormalize(z, statistics), x, rtol=1e-5)


def test_instance_norm_holds_the_mean_constant_and_differentiates_the_scale():
    x = RNG.normal(size=(1, 6, 1)).astype(np.float64)
    cotangent = RNG.normal(size=(1, 6, 1))
    gradient = jax.grad(lambda v: jnp.sum(layers.instance_normalize(v)[0] * cotangent))(jnp.asarray(x, jnp.float32))
    mean = x.mean()
    # d/dx_i of sum_t c_t (x_t - m) / s, m fixed: c_i / s - (sum_t c_t (x_t - m)) s_i / s^2, s_i = (x_i - m) / (6 s).
    s = np.sqrt(x.var() + 1e-5)
    expected = cotangent / s - np.sum(cotangent * (x - mean)) * (x - mean) / (x.size * s) / s**2
    chex.assert_trees_all_close(gradient, expected.astype(np.float32), atol=1e-5)


def test_a_constant_series_stays_finite():
    z, _ = layers.instance_normalize(jnp.full((1, 5, 1), 2.0))
    chex.assert_trees_all_close(z, jnp.zeros((1, 5, 1)))
    gradient = jax.grad(lambda v: jnp.sum(layers.instance_normalize(v)[0] ** 2))(jnp.full((1, 5, 1), 2.0))
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize(
    "function", [lambda x: layers.moving_average(x, window=5), lambda x: layers.instance_normalize(x)[0]]
)
def test_low_precision_keeps_its_type_and_its_values(function):
    x = RNG.normal(size=(2, 33, 3)).astype(np.float32)
    low = function(jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), function(jnp.asarray(x)), atol=0.03)


def test_vmap_and_eager_agree_with_jit():
    x = jnp.asarray(RNG.normal(size=(3, 2, 11, 2)), jnp.float32)
    mapped = jax.vmap(lambda v: layers.series_decomposition(v, window=3))(x)
    with jax.disable_jit():
        one = layers.series_decomposition(x[1], window=3)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[1], mapped), one, atol=1e-6)
