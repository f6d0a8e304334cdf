"""Dot-attention against a triple loop."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

RNG = np.random.default_rng(1)
SHAPE = (2, 5, 3)


def qkv(shape=SHAPE, dtype=np.float32):
    return [jnp.asarray(RNG.normal(size=shape), dtype) for _ in range(3)]


def dot_attention_by_loop(query, key, value, present=None) -> np.ndarray:
    """Three nested loops over batch, channels and tokens, in float64."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    out = np.zeros_like(value)
    batch, tokens, channels = query.shape
    for b in range(batch):
        there = [t for t in range(tokens) if present is None or present[b, t]]
        for c in range(channels):
            total = sum(math.exp(query[b, t, c]) for t in there)
            gate = 0.0
            for t in there:
                u = math.exp(query[b, t, c]) / total * key[b, t, c]
                gate += 0.5 * u * (1 + math.erf(u / math.sqrt(2)))
            for t in there:
                out[b, t, c] = value[b, t, c] * gate
    return out


def test_equals_the_triple_loop():
    arrays = qkv()
    chex.assert_trees_all_close(
        layers.dot_attention(*arrays), dot_attention_by_loop(*arrays).astype(np.float32), atol=1e-6
    )


def test_gradients_equal_finite_differences_of_the_loop():
    arrays = qkv()
    cotangent = RNG.normal(size=SHAPE)
    gradients = jax.grad(lambda *a: jnp.sum(layers.dot_attention(*a) * cotangent), argnums=(0, 1, 2))(*arrays)
    for which, gradient in enumerate(gradients):
        for index in [(0, 0, 0), (1, 4, 2), (0, 3, 1)]:
            shifted = []
            for step in (1e-4, -1e-4):
                moved = [np.asarray(a, np.float64) for a in arrays]
                moved[which][index] += step
                shifted.append(np.sum(dot_attention_by_loop(*moved) * cotangent))
            assert gradient[index] == pytest.approx((shifted[0] - shifted[1]) / 2e-4, abs=1e-4)


def test_absent_tokens_take_no_part():
    query, key, value = qkv()
    present = np.array([[True, True, False, True, False], [True, False, False, False, False]])
    ours = layers.dot_attention(query, key, value, token_mask=present)
    chex.assert_trees_all_close(ours, dot_attention_by_loop(query, key, value, present).astype(np.float32), atol=1e-6)
    short = layers.dot_attention(*(a[:1, jnp.array([0, 1, 3])] for a in (query, key, value)))
    chex.assert_trees_all_close(ours[:1, jnp.array([0, 1, 3])], short, atol=1e-6)


def test_no_token_at_all_gives_zeros_and_zero_gradients():
    arrays = qkv()
    absent = np.zeros(SHAPE[:2], bool)
    value, gradients = jax.value_and_grad(
        lambda *a: jnp.sum(layers.dot_attention(*a, token_mask=absent)), argnums=(0, 1, 2)
    )(*arrays)
    assert value == 0
    chex.assert_trees_all_close(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_weights_sum_to_one_over_the_tokens():
    _, weights = layers.dot_attention(*qkv(), return_weights=True)
    chex.assert_trees_all_close(jnp.sum(weights, axis=1), jnp.ones((SHAPE[0], SHAPE[2])), rtol=1e-6)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_no_token_by_token_array_is_made():
    tokens = 37
    jaxpr = jax.make_jaxpr(layers.dot_attention)(*[jnp.ones((1, tokens, 4))] * 3)
    shapes = [v.aval.shape for e in equations(jaxpr.jaxpr) for v in e.outvars]
    assert shapes
    assert not [s for s in shapes if s.count(tokens) > 1]


def test_work_grows_linearly_with_the_tokens():
    def flops(tokens):
        arrays = [jax.ShapeDtypeStruct((1, tokens, 16), jnp.float32)] * 3
        return jax.jit(layers.dot_attention).lower(*arrays).compile().cost_analysis()["flops"]

    assert flops(4096) / flops(1024) == pytest.approx(4.0, rel=0.05)


def test_low_precision_keeps_its_type_and_its_values():
    arrays = qkv()
    low = layers.dot_attention(*(a.astype(jnp.bfloat16) for a in arrays))
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), layers.dot_attention(*arrays), atol=0.05)


def test_batch_of_one_vmap_and_eager_agree():
    arrays = qkv()
    whole = layers.dot_attention(*arrays)
    chex.assert_trees_all_close(layers.dot_attention(*(a[1:] for a in arrays)), whole[1:], atol=1e-6)
    mapped = jax.vmap(layers.dot_attention)(*(a[:, None] for a in arrays))
    chex.assert_trees_all_close(mapped[:, 0], whole, atol=1e-6)
    with jax.disable_jit():
        chex.assert_trees_all_close(layers.dot_attention(*arrays), whole, atol=1e-6)
