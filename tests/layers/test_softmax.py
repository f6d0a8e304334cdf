"""The attention core against a loop over queries in float64, and its edge cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers

RNG = np.random.default_rng(2)
B, LQ, LK, H, D, DV = 2, 5, 7, 4, 3, 6


def arrays(key_heads=H, dtype=np.float32, lq=LQ, lk=LK, dv=DV, batch=B):
    shapes = [(batch, lq, H, D), (batch, lk, key_heads, D), (batch, lk, key_heads, dv)]
    return [jnp.asarray(RNG.normal(size=s), dtype) for s in shapes]


def by_loop(query, key, value, *, weigh, bias=None, allowed=None, scale=D**-0.5, score=lambda s: s) -> np.ndarray:
    """`weigh` turns the scores of the keys that one query of one head may see into weights."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, q, h in np.ndindex(*query.shape[:3]):
        k = h // (query.shape[2] // key.shape[2])
        seen = [s for s in range(key.shape[1]) if allowed is None or allowed[b, h, q, s]]
        if seen:
            scores = score(np.array([query[b, q, h] @ key[b, s, k] * scale for s in seen]))
            scores = scores + (0 if bias is None else np.array([bias[b, h, q, s] for s in seen]))
            out[b, q, h] = weigh(scores) @ value[b, seen, k]
    return out


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def sparsemax(s):
    # Bisection on the threshold: slow, and obviously the definition.
    low, high = s.min() - 1, s.max()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(s - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(s - low, 0)


def entmax15(s):
    low, high = s.min() / 2 - 1, s.max() / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.maximum(s / 2 - middle, 0) ** 2).sum() > 1 else (low, middle)
    return np.maximum(s / 2 - low, 0) ** 2


WEIGHERS = {
    "softmax": softmax,
    "sigmoid": lambda s: 1 / (1 + np.exp(-s)),
    "relu": lambda s: np.maximum(s, 0),
    "linear": lambda s: s,
    "hardmax": lambda s: (s == s.max()) / (s == s.max()).sum(),
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "signed_l1": lambda s: s / np.abs(s).sum(),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalizer", WEIGHERS)
def test_equals_the_loop(normalizer, masked):
    query, key, value = arrays(key_heads=2)
    allowed = RNG.random((B, H, LQ, LK)) < 0.6 if masked else None
    if masked:
        allowed[0, 1, 2] = False
    ours = layers.dot_product_attention(query, key, value, mask=allowed, normalizer=normalizer)
    expected = by_loop(query, key, value, weigh=WEIGHERS[normalizer], allowed=allowed)
    chex.assert_trees_all_close(ours, expected.astype(np.float32), atol=2e-6)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_groups_of_query_heads_share_a_key_head(key_heads):
    query, key, value = arrays(key_heads=key_heads)
    repeated = [jnp.repeat(a, H // key_heads, axis=2) for a in (key, value)]
    chex.assert_trees_all_close(
        layers.dot_product_attention(query, key, value), layers.dot_product_attention(query, *repeated), atol=1e-6
    )


def test_bias_scale_cap_and_score_function_come_in_their_order():
    query, key, value = arrays()
    bias = RNG.normal(size=(1, H, LQ, LK)).astype(np.float32)
    ours = layers.dot_product_attention(query, key, value, bias=bias, scale=2.0, soft_cap=1.5, score_fn=jnp.square)
    expected = by_loop(
        query, key, value, weigh=softmax, bias=np.repeat(bias, B, 0), scale=2.0,
        score=lambda s: (1.5 * np.tanh(s / 1.5)) ** 2,
    )  # fmt: skip
    chex.assert_trees_all_close(ours, expected.astype(np.float32), atol=2e-6)


@pytest.mark.parametrize(("axis", "number"), [("keys", 3), ("queries", 2), ("heads", 1)])
def test_weights_sum_to_one_over_the_axis(axis, number):
    _, weights = layers.dot_product_attention(*arrays(), softmax_axis=axis, return_weights=True)
    chex.assert_trees_all_close(jnp.sum(weights, axis=number), jnp.ones_like(jnp.sum(weights, axis=number)), rtol=1e-5)


@pytest.mark.parametrize("normalizer", WEIGHERS)
def test_a_query_that_sees_nothing_gets_zero_with_zero_gradient(normalizer):
    inputs = arrays()
    mask = layers.LengthMask(jnp.array([LK, 0]))

    def total(*a):
        return jnp.sum(layers.dot_product_attention(*a, mask=mask, normalizer=normalizer)[1] * 3.0)

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*inputs)
    assert value == 0
    chex.assert_trees_all_close(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_gradients_equal_finite_differences_of_the_loop():
    inputs = arrays(key_heads=2)
    cotangent = RNG.normal(size=(B, LQ, H, DV))
    gradients = jax.grad(lambda *a: jnp.sum(layers.dot_product_attention(*a) * cotangent), argnums=(0, 1, 2))(*inputs)
    for which, gradient in enumerate(gradients):
        index = (1, 2, 1, 0)
        shifted = []
        for step in (1e-4, -1e-4):
            moved = [np.asarray(a, np.float64) for a in inputs]
            moved[which][index] += step
            shifted.append(np.sum(by_loop(*moved, weigh=softmax) * cotangent))
        assert gradient[index] == pytest.approx((shifted[0] - shifted[1]) / 2e-4, abs=1e-4)


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_xla_implementation_agrees_with_the_reference(with_mask):
    inputs = arrays(key_heads=2, dv=D)
    mask = layers.CausalMask() & layers.LengthMask(jnp.array([LK, 0])) if with_mask else None
    bias = jnp.asarray(RNG.normal(size=(H, LQ, LK)), jnp.float32)

    def run(implementation):
        def loss(*a):
            out = layers.dot_product_attention(*a, bias=bias, mask=mask, implementation=implementation)
            return jnp.sum(out**2), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)

    chex.assert_trees_all_close(run("xla"), run("reference"), atol=1e-5)


def test_names_what_is_wrong():
    query, key, value = arrays(dv=D)
    with pytest.raises(ValueError, match="num query heads 4 is not a multiple of num key heads 3"):
        layers.dot_product_attention(query, key[:, :, :3], value[:, :, :3])
    with pytest.raises(ValueError, match="'flash' is not one of"):
        layers.dot_product_attention(query, key, value, implementation="flash")
    with pytest.raises(ValueError, match="does not support return_weights"):
        layers.dot_product_attention(query, key, value, implementation="cudnn", return_weights=True)
    with pytest.raises(ValueError, match="'max' is not one of softmax"):
        layers.dot_product_attention(query, key, value, normalizer="max")
    with pytest.raises(ValueError, match="softmax_axis 'rows' is not one of"):
        layers.dot_product_attention(query, key, value, softmax_axis="rows")


def test_low_precision_keeps_its_type_and_its_values():
    inputs = arrays()
    low = layers.dot_product_attention(*(a.astype(jnp.bfloat16) for a in inputs))
    assert low.dtype == jnp.bfloat16
    chex.assert_trees_all_close(low.astype(jnp.float32), layers.dot_product_attention(*inputs), atol=0.05)


def test_one_token_batch_of_one_vmap_eval_shape_and_eager():
    inputs = arrays(lq=1, lk=1)
    chex.assert_trees_all_close(layers.dot_product_attention(*inputs), inputs[2], rtol=1e-6)
    inputs = arrays()
    whole = layers.dot_product_attention(*inputs)
    chex.assert_trees_all_close(layers.dot_product_attention(*(a[1:] for a in inputs)), whole[1:], atol=1e-6)
    chex.assert_trees_all_close(
        jax.vmap(layers.dot_product_attention)(*(a[:, None] for a in inputs))[:, 0], whole, atol=1e-6
    )
    assert jax.eval_shape(layers.dot_product_attention, *inputs).shape == whole.shape
    with jax.disable_jit():
        chex.assert_trees_all_close(layers.dot_product_attention(*inputs), whole, atol=1e-6)


def test_attend_takes_scores_that_are_not_dot_products():
    query, key, value = arrays()
    distance = -jnp.sum(jnp.square(query[:, :, None] - key[:, None]), axis=-1)
    ours = layers.attend(jnp.moveaxis(distance, 3, 1), value)
    weights = jax.nn.softmax(distance, axis=2)
    chex.assert_trees_all_close(ours, jnp.einsum("bqkh,bkhd->bqhd", weights, value), atol=1e-5)


@pytest.mark.parametrize(("axis", "number"), [("keys", -1), ("queries", -2), ("heads", -3)])
def test_masked_normalize_shares_one_unit_along_the_named_axis(axis, number):
    scores = jax.random.normal(jax.random.key(8), (2, 3, 4, 5))
    allowed = jax.random.bernoulli(jax.random.key(9), 0.6, scores.shape).at[0].set(False)
    weights = layers.masked_normalize(scores, allowed, softmax_axis=axis)
    chex.assert_trees_all_close(weights.sum(number), allowed.any(number).astype(jnp.float32), atol=1e-6)
    assert not weights[~allowed].any()
    chex.assert_trees_all_equal(layers.masked_normalize(scores, allowed, normalizer=lambda s, a, i: s * i), scores * -1)
    with pytest.raises(ValueError, match="normalizer 'max' is not one of softmax, sigmoid"):
        layers.masked_normalize(scores, allowed, normalizer="max")
