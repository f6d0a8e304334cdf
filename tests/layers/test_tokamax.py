"""Attention by tokamax. It pins packages that the trainer needs newer, hence an environment of its own: see .ci/run."""

import chex
import jax
import jax.numpy as jnp
import pytest

import layers

KEYS = jax.random.split(jax.random.key(3), 4)
OPTIONS = {
    "none": {},
    "causal": {"mask": layers.CausalMask()},
    "bias": {"bias": jax.random.normal(KEYS[3], (4, 40, 40))},
    "soft_cap": {"soft_cap": 2.0, "scale": 0.3},
    "rows that see nothing": {"mask": layers.WindowMask(left=-2)},
}


@pytest.mark.tokamax
@pytest.mark.parametrize("name", OPTIONS)
def test_tokamax_computes_the_same(name):
    query, key, value = (jax.random.normal(k, (2, 40, heads, 16)) for k, heads in zip(KEYS, (4, 2, 2), strict=False))

    def outcome(implementation):
        def attention(*arrays):
            return layers.dot_product_attention(*arrays, **OPTIONS[name], implementation=implementation)

        loss = jax.grad(lambda *arrays: jnp.sum(jnp.sin(attention(*arrays))), argnums=(0, 1, 2))
        return attention(query, key, value), loss(query, key, value)

    chex.assert_trees_all_close(outcome("tokamax"), outcome("reference"), rtol=3e-5, atol=1e-4)


@pytest.mark.tokamax
def test_a_bias_goes_before_its_soft_cap():
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match="'tokamax' does not support soft_cap beside a bias"):
        layers.dot_product_attention(x, x, x, bias=jnp.zeros(()), soft_cap=1.0, implementation="tokamax")
