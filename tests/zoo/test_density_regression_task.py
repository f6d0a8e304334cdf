"""Counting by density: loss, errors and their ranges, the baseline."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.tasks import density_regression as task


def test_scores_follow_their_definitions():
    count = jnp.array([3.0, 39.0, 40.0, 500.0])
    density = jnp.zeros((4, 2, 3, 1)).at[:, 0, 1, 0].set(count + jnp.array([1.0, -2.0, 4.0, 10.0]))
    batch = {"count": count, "density": jnp.zeros_like(density)}
    totals = {name: np.asarray(v).sum(0) for name, v in task.metrics(density, batch).items()} | {"examples": 4}
    found = task.summarise(totals, None)
    assert found == {
        "mae": 17 / 4,
        "rmse": np.sqrt(121 / 4),
        "mae_0_to_39": 1.5,
        "mae_40_to_99": 4.0,
        "mae_from_400": 10.0,
    }
    error, _ = task.loss(density, batch)
    np.testing.assert_allclose(error, np.mean([16, 37**2, 44**2, 510**2]) / 6)


def test_the_baseline_spreads_what_is_expected():
    batch = task.example(height=32, width=48, cell=8, batch_size=5, key=jax.random.key(0))
    found = task.even_spread(batch)
    assert found.shape == batch["density"].shape == (5, 4, 6, 1)
    np.testing.assert_allclose(task.counted(found), batch["count"].mean(), rtol=1e-6)
    assert task.picture(batch, found).axes
