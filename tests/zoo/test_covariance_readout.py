"""The covariance readout: the pieces that its claims rest on, against something independent."""

import jax
import numpy as np
import pytest

from zoo.theory.covariance_readout import elliptical_factor, read


def test_the_pieces_of_a_context_are_read_as_a_whole():
    keys = jax.random.split(jax.random.key(0), 3)
    tilt, x, v = (jax.random.normal(k, (n, 3)) for k, n in zip(keys, (2, 37, 37), strict=True))
    expected = jax.nn.softmax(tilt @ x.T, axis=-1) @ v
    for chunk in (5, 37, 64):
        np.testing.assert_allclose(read(tilt, x, v, chunk=chunk), expected, rtol=1e-5, atol=1e-6)


def test_the_factor_of_the_sphere_is_that_of_quadrature():
    # In three dimensions a coordinate of the sphere is uniform: the tilted mean is one integral.
    for s in (0.3, 2.0):
        t = np.linspace(-1, 1, 200_001)
        radius, a = np.sqrt(3), np.sqrt(s)
        weights = np.exp(radius * a * t)
        mean = radius * np.trapezoid(weights * t, t) / np.trapezoid(weights, t)
        assert elliptical_factor(3, s) == pytest.approx(mean / a, rel=1e-6)
