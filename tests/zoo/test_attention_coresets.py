"""Coresets as compressed caches."""

import jax
import jax.numpy as jnp
import numpy as np

import layers
from zoo.theory.attention_coresets import compress_cache, random_pairs


def test_a_compressed_cache_answers_nearly_as_the_whole_one():
    keys = jax.random.split(jax.random.key(0), 4)
    key, value, query = (jax.random.normal(k, (2, 128, 3, 4)) for k in keys[:3])
    key = 2 * key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    few = compress_cache(key, value, keys[3], rounds=1)
    assert few[0].shape == (2, 64, 3, 4)
    query = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    whole = layers.dot_product_attention(query, key, value, scale=1.0)
    kept = layers.dot_product_attention(query, *few, scale=1.0)
    dropped = layers.dot_product_attention(query, key[:, :64], value[:, :64], scale=1.0)
    assert jnp.max(jnp.abs(kept - whole)) < 0.7 * jnp.max(jnp.abs(dropped - whole))
    one = compress_cache(key[1:, :, 2:], value[1:, :, 2:], keys[3], rounds=0)
    np.testing.assert_array_equal(one[0], key[1:, :, 2:])


def test_greedy_signs_keep_the_sum_below_that_of_squares():
    key, value = random_pairs(jax.random.key(1), 64, 5)
    gram = np.asarray(layers.attention_gram(key, value, 1.5), np.float64)
    kept = np.asarray(layers.halve(jnp.asarray(gram), jax.random.key(2)))
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(2))[0], 64))
    first, second = order[:32], order[32:]
    signs = np.where(np.isin(first, kept), 1.0, -1.0)
    differences = gram[np.ix_(first, first)] - gram[np.ix_(first, second)]
    differences += gram[np.ix_(second, second)] - gram[np.ix_(second, first)]
    assert sorted(np.where(signs > 0, first, second)) == sorted(kept)
    assert signs @ differences @ signs <= np.trace(differences) + 1e-6


def test_rows_and_heads_are_compressed_one_by_one():
    keys = jax.random.split(jax.random.key(3), 3)
    key, value = (jax.random.normal(k, (2, 16, 2, 3)) for k in keys[:2])
    together = compress_cache(key, value, keys[2], rounds=1)
    own = jax.random.split(keys[2], (2, 2))
    for b in range(2):
        for h in range(2):
            k, v = key[b, :, h], value[b, :, h]
            longest, largest = (jnp.max(jnp.linalg.norm(x, axis=-1)) for x in (k, v))
            index = layers.attention_coreset(k / longest, v / largest, own[b, h], rounds=1, radius=longest)
            np.testing.assert_allclose(together[0][b, :, h], k[index])
            np.testing.assert_allclose(together[1][b, :, h], v[index])
