"""Split sequences on eight devices against whole ones on one."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import layers

KEYS = jax.random.split(jax.random.key(0), 6)
MESH = Mesh(np.array(jax.devices()[:4]), ("time",))
SPLIT = P(None, "time")
close = partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def on_devices(function, count):
    return jax.jit(jax.shard_map(function, mesh=MESH, in_specs=(SPLIT,) * count, out_specs=SPLIT, check_vma=False))


def with_gradients(function, arguments):
    gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=tuple(range(len(arguments))))
    return function(*arguments), jax.jit(gradient)(*arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_attention_around_the_ring_is_attention(causal, dtype):
    arguments = [
        jax.random.normal(k, (2, 12, heads, 8)).astype(dtype) for k, heads in zip(KEYS, (4, 2, 2), strict=False)
    ]
    ours = with_gradients(on_devices(partial(layers.ring_attention, axis_name="time", causal=causal), 3), arguments)
    mask = layers.CausalMask() if causal else None
    expected = with_gradients(partial(layers.dot_product_attention, mask=mask, implementation="reference"), arguments)
    if dtype == jnp.bfloat16:
        chex.assert_trees_all_close(ours, expected, rtol=0.05, atol=0.05)
        assert ours[0].dtype == jnp.bfloat16
    else:
        close(ours, expected)


def test_causal_needs_as_many_queries_as_keys():
    query, key = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 16, 2, 4))
    with pytest.raises(ValueError, match="causal with 2 queries and 4 keys a device"):
        on_devices(partial(layers.ring_attention, axis_name="time", causal=True), 3)(query, key, key)


def test_a_recurrence_on_split_time_is_the_whole_one():
    x = jax.random.normal(KEYS[0], (2, 20, 3))
    g = (-jax.nn.softplus(jax.random.normal(KEYS[1], (2, 20, 3)))).at[0, 7].set(-30.0)

    def split(x, g):
        _, final = layers.linear_recurrence(x, g, return_state=True)
        before = layers.preceding_state(final, jnp.sum(g, axis=1), axis_name="time")
        return layers.linear_recurrence(x, g, initial_state=before)

    close(with_gradients(on_devices(split, 2), (x, g)), with_gradients(layers.linear_recurrence, (x, g)))


def test_gated_linear_attention_on_split_time_is_the_whole_one():
    q, k, v = (jax.random.normal(key, (2, 16, 2, 4)) for key in KEYS[:3])
    g = jax.nn.log_sigmoid(jax.random.normal(KEYS[3], (2, 16, 2)))

    def split(q, k, v, g):
        _, final = layers.gated_linear_attention(q, k, v, g, return_state=True)
        before = layers.preceding_state(final, jnp.sum(g, axis=1)[..., None, None], axis_name="time")
        return layers.gated_linear_attention(q, k, v, g, initial_state=before)

    arguments = (q, k, v, g)
    close(with_gradients(on_devices(split, 4), arguments), with_gradients(layers.gated_linear_attention, arguments))
