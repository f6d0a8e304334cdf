"""Localization: the transformer of local means against Flax's attention, and local models against closed forms."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from zoo.theory.localization import (
    LocalTransformer,
    Memory,
    best_bandwidth,
    local_fit,
    locally_linear_embedding,
    relaxation_labelling,
    takagi_sugeno,
)

KEYS = jax.random.split(jax.random.key(2), 6)


class PreNorm(nn.Module):
    """The usual transformer, by Flax's own attention."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 8, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.zeros, (6, 8))
        for i in range(2):
            attention = nn.MultiHeadDotProductAttention(num_heads=2, name=f"mean_{i}")
            x = x + attention(nn.LayerNorm(name=f"mean_norm_{i}")(x), mask=nn.make_causal_mask(tokens))
            hidden = nn.relu(nn.Dense(12, name=f"keys_{i}")(nn.LayerNorm(name=f"memory_norm_{i}")(x)))
            x = x + nn.Dense(8, use_bias=False, name=f"values_{i}")(hidden)
        return nn.Dense(7, name="head")(nn.LayerNorm(name="norm")(x))


def test_it_is_the_usual_transformer():
    model = LocalTransformer(vocabulary=7, length=6, d_model=8, num_heads=2, memory_size=12)
    tokens = jax.random.randint(KEYS[0], (3, 6), 0, 7)
    ours = jax.jit(model.init)(KEYS[1], tokens)["params"]
    theirs = dict(ours)
    for i in range(2):
        memory = theirs.pop(f"memory_{i}")
        theirs |= {f"keys_{i}": memory["keys"], f"values_{i}": {"kernel": memory["values"]}}
        split = {"query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8)}
        theirs[f"mean_{i}"] = {
            name: {
                "kernel": layer["kernel"].reshape(split[name]),
                "bias": layer["bias"].reshape(split[name][1:] if name != "out" else (8,)),
            }
            for name, layer in ours[f"mean_{i}"].items()
        }
    expected = PreNorm().apply({"params": theirs}, tokens)
    chex.assert_trees_all_close(model.apply({"params": ours}, tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_softmax_memory_is_attention_to_it():
    x = jax.random.normal(KEYS[2], (2, 3, 8))
    out, variables = Memory(12, "softmax").init_with_output(KEYS[3], x)
    params = variables["params"]
    weights = jax.nn.softmax(x @ params["keys"]["kernel"] + params["keys"]["bias"])
    chex.assert_trees_all_close(out, weights @ params["values"], rtol=1e-5, atol=1e-6)


def test_newton_solves_weighted_least_squares_in_a_step():
    with jax.enable_x64(True):
        x, y, log_kernel = (jax.random.normal(k, s) for k, s in zip(KEYS, ((20, 2), (20, 1), (20,)), strict=False))
        fitted = local_fit(lambda t, x, y: jnp.square(t @ x - y[0]), log_kernel, x, y, jnp.zeros(2), steps=1)
        root = np.sqrt(np.exp(np.asarray(log_kernel)))[:, None]
        expected = np.linalg.lstsq(root * np.asarray(x), root * np.asarray(y))[0][:, 0]
        np.testing.assert_allclose(fitted, expected, rtol=1e-10)


def test_a_flat_sheet_is_laid_flat():
    with jax.enable_x64(True):
        sheet = jax.random.uniform(KEYS[4], (60, 2))
        turned = sheet @ jnp.linalg.qr(jax.random.normal(KEYS[5], (3, 3)))[0][:2]
        found = locally_linear_embedding(turned, neighbors=8, dimension=2, ridge=1e-9)
        design = jnp.concatenate([jnp.ones((60, 1)), found], axis=-1)
        rest = design @ jnp.linalg.lstsq(design, sheet)[0] - sheet
        assert float(jnp.abs(rest).max()) < 1e-4


def test_rules_with_slopes_are_weighted_lines():
    target, firing = jnp.array([[2.0], [-1.0]]), jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
    found = takagi_sugeno(firing, target, jnp.array([[1.0], [-1.0]]), jnp.array([0.0, 4.0]))
    np.testing.assert_allclose(found, [0.25 * 2 + 0.75 * 2, 0.5 * -1 + 0.5 * 5], rtol=1e-6)


def test_labels_give_way_to_their_neighbours():
    labels = jnp.array([[0.8, 0.2], [0.3, 0.7], [0.8, 0.2]])
    apart = layers.gaussian_log_kernel(jnp.arange(3.0)[:, None], jnp.arange(3.0)[:, None], 1.0)
    settled = relaxation_labelling(labels, apart, jnp.eye(2), steps=30)
    np.testing.assert_allclose(jnp.sum(settled, axis=-1), 1.0, rtol=1e-6)
    assert np.all(np.argmax(settled, axis=-1) == 0)
    weights = np.exp(np.asarray(apart))
    once = np.asarray(labels) * (weights / weights.sum(axis=1, keepdims=True) @ np.asarray(labels))
    once = once / once.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(relaxation_labelling(labels, apart, jnp.eye(2), steps=1), once, rtol=1e-5)
    contrary = relaxation_labelling(labels, apart, 1 - jnp.eye(2), steps=1)
    assert contrary[0, 0] < labels[0, 0]


@pytest.mark.parametrize("start", [0.02, 0.5])
def test_the_bandwidth_does_not_depend_on_where_it_starts(start):
    x = jnp.linspace(0.0, 1.0, 80)[:, None]
    wave = jnp.sin(12 * x) + 0.3 * jax.random.normal(KEYS[0], x.shape)
    assert 0.02 < float(best_bandwidth(x, wave, start, steps=400)) < 0.1
