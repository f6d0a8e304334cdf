"""GELU against the definition."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

import layers

X = np.linspace(-6, 6, 41)


def test_gelu_is_x_times_the_normal_distribution_function():
    expected = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in X])
    chex.assert_trees_all_close(layers.gelu(jnp.asarray(X, jnp.float32)), expected.astype(np.float32), atol=2e-6)


def test_gelu_has_the_derivative_of_its_definition():
    derivative = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(X, jnp.float32))
    density = np.exp(-(X**2) / 2) / math.sqrt(2 * math.pi)
    expected = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in X]) + X * density
    chex.assert_trees_all_close(derivative, expected.astype(np.float32), atol=2e-6)


def test_the_tanh_form_is_another_function():
    exact, approximate = layers.gelu(jnp.float32(1.5)), layers.gelu(jnp.float32(1.5), approximate=True)
    assert 1e-5 < abs(exact - approximate) < 1e-3


def test_low_precision_is_computed_in_single():
    x = jnp.asarray(X, jnp.bfloat16)
    assert layers.gelu(x).dtype == jnp.bfloat16
    chex.assert_trees_all_equal(layers.gelu(x), layers.gelu(x.astype(jnp.float32)).astype(jnp.bfloat16))
