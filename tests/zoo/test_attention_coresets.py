"""Coresets as compressed caches."""

import jax
import jax.numpy as jnp
import numpy as np

import layers
from zoo.theory.attention_coresets import compress_cache


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
