"""Dropout masks: the right share, no pattern, no dependence on the mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import layers

KEY = jax.random.key(3)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_keeps_the_right_share(rate):
    keep = np.asarray(layers.dropout_mask(KEY, shape=(400, 500), rate=rate))
    # Six standard deviations of a binomial share.
    assert keep.mean() == pytest.approx(1 - rate, abs=6 * np.sqrt(rate * (1 - rate) / keep.size))
    assert keep.mean(axis=0).std() == pytest.approx(np.sqrt(rate * (1 - rate) / 400), rel=0.2)
    assert keep.mean(axis=1).std() == pytest.approx(np.sqrt(rate * (1 - rate) / 500), rel=0.2)


def test_positions_and_keys_are_uncorrelated():
    draws = [
        np.asarray(layers.dropout_mask(jax.random.fold_in(KEY, i), shape=(256, 256), rate=0.5)) - 0.5 for i in range(6)
    ]
    bound = 6 * 0.25 / 256  # six standard deviations of the mean product of independent halves
    for i, a in enumerate(draws):
        for shift in (1, 2, 16, 256):
            assert abs(np.mean(a.ravel()[:-shift] * a.ravel()[shift:])) < bound
        for b in draws[i + 1 :]:
            assert abs(np.mean(a * b)) < bound
            for shift in range(-32, 33):
                assert abs(np.mean(a.ravel() * np.roll(b.ravel(), shift))) < bound


def test_the_extremes():
    x = jnp.ones((4, 5))
    chex.assert_trees_all_close(layers.dropout(x, KEY, rate=0.0), x)
    chex.assert_trees_all_close(layers.dropout(x, KEY, rate=1.0), jnp.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"rate 1\.5 is not a probability"):
        layers.dropout(x, KEY, rate=1.5)


def test_scales_what_it_keeps_and_its_gradient_alike():
    x = jax.random.normal(KEY, (50, 60))
    y, pull = jax.vjp(lambda v: layers.dropout(v, KEY, rate=0.25), x)
    keep = np.asarray(layers.dropout_mask(KEY, shape=x.shape, rate=0.25))
    chex.assert_trees_all_close(y, np.where(keep, x / 0.75, 0), rtol=1e-6)
    chex.assert_trees_all_close(pull(jnp.ones_like(x))[0], np.where(keep, 1 / 0.75, 0).astype(np.float32), rtol=1e-6)


def test_low_precision_keeps_its_type():
    assert layers.dropout(jnp.ones((4, 5), jnp.bfloat16), KEY, rate=0.3).dtype == jnp.bfloat16


def test_the_mask_does_not_depend_on_the_mesh():
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    sharded = jax.jit(
        lambda key: layers.dropout_mask(key, shape=(8, 6, 4), rate=0.4),
        out_shardings=NamedSharding(mesh, PartitionSpec("a", "b")),
    )(KEY)
    assert len(sharded.sharding.device_set) == 8
    chex.assert_trees_all_equal(np.asarray(sharded), np.asarray(layers.dropout_mask(KEY, shape=(8, 6, 4), rate=0.4)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 0.3, 2.0])
def test_a_reversed_gradient_is_that_of_the_plain_alternative(dtype, factor):
    x = jax.random.normal(KEY, (3, 5)).astype(dtype)

    def plain(x):
        return (1 + factor) * jax.lax.stop_gradient(x) - factor * x

    def total(turn, x):
        return jnp.sum(jnp.sin(turn(x).astype(jnp.float32)))

    def reverse(x):
        return layers.reverse_gradient(x, jnp.float32(factor))

    chex.assert_trees_all_equal(reverse(x), x)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    ours, theirs = (jax.jit(jax.grad(lambda x, t=turn: total(t, x)))(x) for turn in (reverse, plain))
    assert ours.dtype == dtype
    chex.assert_trees_all_close(ours, theirs, atol=tolerance)
    chex.assert_trees_all_close(jax.vmap(jax.grad(lambda x: total(reverse, x)))(x), ours, atol=tolerance)
    assert jax.grad(lambda f: jnp.sum(layers.reverse_gradient(x, f)).astype(jnp.float32))(2.0) == 0
