"""The flow on the sphere: its velocity, energy and noise, against gradients and averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.theory.wasserstein_flow import energy, measure, simulate


def test_the_velocity_is_the_gradient_of_the_energy_for_one_head():
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (7, 3))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    weights = jax.random.normal(keys[1], (4, 3, 3))
    weights = weights + jnp.swapaxes(weights, 1, 2)
    rotation = jnp.linalg.qr(jax.random.normal(keys[0], (3, 3)))[0]
    m = measure(x, weights, jnp.ones_like(weights))
    np.testing.assert_allclose(jnp.sum(m.velocity * x, axis=-1), 0.0, atol=1e-5)
    gradient = jax.grad(energy)(x, weights)
    np.testing.assert_allclose(m.exact_dissipation, jnp.sum(gradient * m.velocity), rtol=1e-4)
    turned = measure(x @ rotation.T, rotation @ weights @ rotation.T, jnp.ones_like(weights))
    np.testing.assert_allclose((turned.energy, turned.slope), (m.energy, m.slope), rtol=1e-4)
    # For one head slope and dissipation are the same number.
    alone = measure(x, weights[:1], weights[:1])
    np.testing.assert_allclose(alone.slope, alone.exact_dissipation, rtol=1e-4)


def test_the_noise_term_is_the_mean_change_of_energy():
    x = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    weights = jnp.array([[[0.3, 0.1], [0.1, -0.2]]])
    variance, dt = 2.0, 1e-3
    z = jax.random.normal(jax.random.key(0), (200_000, 1, 2, 2))
    kicks = jnp.sqrt(variance * dt) * (z + jnp.swapaxes(z, 2, 3)) / 2
    # With each kick its opposite, so that the first order is gone.
    changes = jax.vmap(lambda k: (energy(x, weights + k) + energy(x, weights - k)) / 2 - energy(x, weights))(kicks)
    rate = measure(x, weights, jnp.zeros_like(weights), variance).energy_rate
    assert float(jnp.mean(changes)) / dt == pytest.approx(float(rate), rel=0.05)


def test_what_starts_close_stays_close_and_order_does_not_matter():
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (10, 3))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    weights = jax.random.normal(keys[1], (3, 3, 3))
    weights = (weights + jnp.swapaxes(weights, 1, 2)) / 2
    options = {"drift": "oscillating", "steps": 100, "dt": 0.01, "every": 100}
    course = simulate(x, weights, **options)
    np.testing.assert_allclose(jnp.linalg.norm(course.tokens, axis=-1), 1.0, atol=1e-5)
    near = x + 1e-3 * jax.random.normal(keys[2], x.shape)
    near = near / jnp.linalg.norm(near, axis=-1, keepdims=True)
    moved = simulate(near, weights, **options)
    start, end = (float(jnp.linalg.norm(moved.tokens[i] - course.tokens[i])) for i in (0, -1))
    assert end < np.exp(4.0) * start
    other = simulate(x, weights + 1e-3, **options)
    assert abs(float(other.energy[-1] - course.energy[-1])) < 0.1 * abs(float(course.energy[-1]))
    order = jax.random.permutation(keys[2], 10)
    again = simulate(x[order], weights, **options)
    np.testing.assert_allclose(again.tokens[-1], course.tokens[-1][order], atol=1e-4)
    np.testing.assert_allclose(again.energy, course.energy, rtol=1e-5)
