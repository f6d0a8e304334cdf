"""The partition of unity: its limits and its explicit network."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.theory.partition_of_unity import affine_logits, glue, grid_centres


def test_a_partition_sums_to_one_keeps_constants_and_tends_to_the_nearest_centre():
    centres = grid_centres(5, 2)
    x = jax.random.uniform(jax.random.key(0), (50, 2))
    np.testing.assert_allclose(glue(x, centres, jnp.full(25, 3.0), 7.0), 3.0, rtol=1e-5)
    line = affine_logits(jnp.linspace(0, 1, 5)[:, None] * jnp.ones(2), centres, 2.0)
    np.testing.assert_allclose(jnp.diff(line, n=2, axis=0), 0.0, atol=1e-5)
    nearest = jnp.argmin(jnp.sum(jnp.square(x[:, None] - centres), axis=-1), axis=-1)
    values = jnp.arange(25.0)
    np.testing.assert_allclose(glue(x, centres, values, 1e6), values[nearest], atol=0.5)
