"""Lower triangular systems against LAPACK, one at a time, in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import layers

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 21, 64])
def test_equals_lapack(size, unit):
    system = RNG.normal(size=(2, 3, size, size)) / size**0.5 + 2 * np.eye(size)
    sides = RNG.normal(size=(2, 3, size, 5))
    expected = np.stack([
        [scipy.linalg.solve_triangular(a, b, lower=True, unit_diagonal=unit) for a, b in zip(*row, strict=True)]
        for row in zip(system, sides, strict=True)
    ])  # fmt: skip
    solve = partial(layers.solve_lower, unit_diagonal=unit)
    np.testing.assert_allclose(solve(jnp.float32(system), jnp.float32(sides)), expected, rtol=2e-4, atol=2e-5)
    with jax.enable_x64(True):
        found = solve(jnp.asarray(system), jnp.asarray(sides))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("unit", [False, True])
def test_gradients_are_those_of_the_dense_solution(unit):
    system, sides = jnp.float32(RNG.normal(size=(11, 11)) / 3 + 2 * np.eye(11)), jnp.float32(RNG.normal(size=(11, 2)))

    def dense(system, sides):
        lower = jnp.tril(system, -1) + (jnp.eye(11) if unit else jnp.diag(jnp.diagonal(system)))
        return jnp.sum(jnp.sin(jnp.linalg.inv(lower) @ sides))

    def ours(system, sides):
        return jnp.sum(jnp.sin(layers.solve_lower(system, sides, unit_diagonal=unit)))

    for found, expected in zip(*(jax.grad(f, (0, 1))(system, sides) for f in (ours, dense)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_stands_above_the_diagonal_is_not_read_and_jit_and_vmap_change_nothing():
    system, sides = jnp.float32(RNG.normal(size=(3, 9, 9)) + 3 * np.eye(9)), jnp.float32(RNG.normal(size=(3, 9, 1)))
    expected = layers.solve_lower(jnp.tril(system), sides)
    np.testing.assert_array_equal(layers.solve_lower(system, sides), expected)
    np.testing.assert_allclose(jax.vmap(layers.solve_lower)(system, sides), expected, atol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(layers.solve_lower(system, sides), expected, atol=1e-6)
