"""Cubit: its solution, its limits, decoding, and what a fourth projection costs."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layers
import zoo
from trainers.data.language import load_language
from zoo.backbones.generation import generate
from zoo.language.cubit import Mixer, empty_cache
from zoo.registry import variable_shapes

PAPER = zoo.paper("cubit")
KEY = jax.random.key(3)
SMALL = dataclasses.replace(PAPER.configs["tiny"], length=20, hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def setting():
    model = PAPER.model(SMALL)
    tokens = jax.random.randint(KEY, (2, 20), 0, SMALL.vocabulary)
    variables = jax.jit(model.init)(KEY, {"tokens": tokens})
    return model, tokens, variables, jax.jit(model.apply, static_argnames="mutable")


def mixed(config, x, change=lambda params: params):
    """A mixer's output and parameters, its angles those of positions from 0."""
    angles = layers.rope_angles(jnp.arange(x.shape[1]), layers.rope_frequencies(config.head_dim))
    module = Mixer(config, True)
    variables = jax.jit(module.init, static_argnums=(4,))(KEY, x, angles, None, None)
    params = change(variables["params"])
    return module.apply({"params": params}, x, angles, None, None)[0], params, angles


def test_the_mixer_equals_its_formula_in_double_precision():
    x = np.asarray(jax.random.normal(KEY, (1, 9, SMALL.hidden_size)))
    ours, params, angles = mixed(SMALL, jnp.asarray(x), lambda p: p | {"log_ridge": jnp.array([-3.0, -1.0, 0.0, 1.0])})
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    heads = {name: (x[0] @ p[name]["kernel"]).reshape(9, 4, 8) for name in ("query", "key", "value", "reference")}
    turned = {name: np.asarray(layers.apply_rope(jnp.asarray(heads[name][None]), angles))[0] for name in heads}
    scale = p["rescale_low"] + p["rescale_range"] / (1 + np.exp(-(x[0] @ p["rescale"]["kernel"])))
    lower, found = np.tril(np.ones((9, 9))), np.zeros((9, 4, 8))
    for h in range(4):
        r = turned["reference"][:, h]
        kernel = np.exp(r @ (p["reference_scale"][h] * r / np.linalg.norm(r, axis=1, keepdims=True)).T) * lower
        kernel /= kernel.sum(1, keepdims=True)
        solved = np.linalg.solve(
            kernel + np.exp(p["log_ridge"][h]) * np.eye(9), scale[:, h, None] * heads["value"][:, h]
        )
        weights = np.exp(turned["query"][:, h] @ turned["key"][:, h].T / 8**0.5) * lower
        found[:, h] = weights / weights.sum(1, keepdims=True) @ solved
    np.testing.assert_allclose(ours[0], found.reshape(9, -1) @ p["out"]["kernel"], rtol=2e-4, atol=2e-4)


def test_a_token_changes_nothing_before_it(setting):
    _model, tokens, variables, apply = setting
    before = apply(variables, {"tokens": tokens}).logits
    after = apply(variables, {"tokens": tokens.at[:, 12].add(1)}).logits
    np.testing.assert_array_equal(after[:, :12], before[:, :12])
    assert np.all(np.any(np.asarray(after[:, 12:] != before[:, 12:]), axis=(0, 2)))


def test_a_huge_ridge_is_attention_to_scaled_values():
    x = jax.random.normal(KEY, (2, 15, SMALL.hidden_size))
    huge = 1e6
    ours, params, angles = mixed(SMALL, x, lambda p: p | {"log_ridge": jnp.full(4, np.log(huge), jnp.float32)})
    heads = {n: (x @ params[n]["kernel"]).reshape(2, 15, 4, 8) for n in ("query", "key", "value")}
    scale = params["rescale_low"] + params["rescale_range"] * jax.nn.sigmoid(x @ params["rescale"]["kernel"])
    query, key = (layers.apply_rope(heads[n], angles) for n in ("query", "key"))
    plain = layers.dot_product_attention(query, key, scale[..., None] * heads["value"], mask=layers.CausalMask())
    np.testing.assert_allclose(huge * ours, plain.reshape(2, 15, -1) @ params["out"]["kernel"], rtol=1e-3, atol=1e-4)


def test_the_first_token_is_only_scaled():
    x = jax.random.normal(KEY, (2, 6, SMALL.hidden_size))
    for log_ridge in (-23.0, 0.0):
        ours, params, _ = mixed(SMALL, x, lambda p, r=log_ridge: p | {"log_ridge": jnp.full(4, r)})
        scale = params["rescale_low"] + params["rescale_range"] * jax.nn.sigmoid(x[:, 0] @ params["rescale"]["kernel"])
        value = (x[:, 0] @ params["value"]["kernel"]).reshape(2, 4, 8) * scale[..., None] / (1 + np.exp(log_ridge))
        np.testing.assert_allclose(ours[:, 0], value.reshape(2, -1) @ params["out"]["kernel"], rtol=1e-4, atol=1e-5)


def test_the_scale_of_values_begins_between_its_borders(setting):
    _model, tokens, variables, apply = setting
    tokens = jax.random.randint(KEY, tokens.shape, 0, SMALL.vocabulary)
    loud = jax.tree_util.tree_map_with_path(
        lambda path, a: 50 * a if "rescale'" in jax.tree_util.keystr(path) else a, variables["params"]
    )
    for params in (variables["params"], loud):
        seen = apply({"params": params}, {"tokens": tokens}, mutable="intermediates")[1]["intermediates"]
        for scale in jax.tree.leaves(seen):
            assert 0.5 <= float(scale.min()) <= float(scale.max()) <= 2.0
    assert float(scale.min()) < 0.55  # the loud one reaches them
    assert float(scale.max()) > 1.95


def test_a_shared_reference_saves_its_projection():
    def count(**changes):
        model = PAPER.model(dataclasses.replace(PAPER.configs["tiny"], **changes))
        return sum(a.size for a in jax.tree.leaves(variable_shapes(PAPER, model)["params"]))

    width, heads = 64, 4
    assert count() - count(share_reference=True) == 2 * width * width
    assert count() - count(ridge_layers=(0, 0)) == 2 * (width * width + width * heads + 4 * heads)
    assert count() - count(ridge_layers=(1, 2)) == width * width + width * heads + 4 * heads


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_reference": True, "query_key_norm": "head", "window": 5, "tie_embeddings": True},
        {"ridge_layers": (0, 1), "query_key_norm": "width", "reference_scale": 3.0},
    ],
    ids=["plain", "shared_window", "mixed"],
)
def test_step_by_step_it_says_what_it_says_at_once(changes):
    config = dataclasses.replace(SMALL, **changes)
    model = PAPER.model(config)
    tokens = jax.random.randint(KEY, (2, 12), 0, config.vocabulary)
    variables = jax.jit(model.init)(KEY, {"tokens": tokens})
    whole = jax.jit(model.apply)(variables, {"tokens": tokens}).logits
    cache, step, found = empty_cache(config, 2, 12, jnp.float32), jax.jit(model.apply), []
    for t in range(12):
        output = step(variables, {"tokens": tokens[:, t : t + 1]}, cache=cache)
        found, cache = [*found, output.logits], output.cache
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, rtol=1e-3, atol=1e-4)


def test_it_writes_what_it_finds_likeliest_however_rows_are_padded(setting):
    model, tokens, variables, apply = setting
    expected = tokens[:, :7]
    for _ in range(5):
        logits = apply(variables, {"tokens": expected}).logits
        expected = jnp.concatenate([expected, jnp.argmax(logits[:, -1:], axis=-1)], axis=1)
    padded = jnp.concatenate([jnp.full((2, 3), 5), tokens[:, :7]], axis=1)
    mask = jnp.arange(10) >= 3
    written = generate(model, variables, padded, attention_mask=jnp.tile(mask, (2, 1)), max_new_tokens=5)
    np.testing.assert_array_equal(written.tokens, expected[:, 7:])


def test_it_learns_to_recall():
    """With the tiny config but for shorter rows."""
    data = load_language("standin", data_dir=None, length=48, vocabulary=16)
    model = PAPER.model(dataclasses.replace(PAPER.configs["tiny"], length=48))
    optimizer = optax.adamw(3e-3, b2=0.95)

    def loss(params, batch):
        return PAPER.compute_loss(model.apply({"params": params}, batch), batch)[0]

    @jax.jit
    def train(params):
        def step(carry, indices):
            params, state = carry
            gradient = jax.grad(loss)(params, data.train.batch(indices))
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        order = jax.random.permutation(KEY, len(data.train))[: 200 * 16].reshape(200, 16)
        params = jax.lax.scan(step, (params, optimizer.init(params)), order)[0][0]
        batch = data.test.batch(jnp.arange(128))
        return PAPER.task.metrics(model.apply({"params": params}, batch), batch)

    params = jax.jit(model.init)(KEY, data.train.batch(jnp.arange(1)))["params"]
    totals = jax.tree.map(lambda x: float(x.sum()), train(params))
    # One of eight values, or one of those seen, by chance.
    assert totals["hits"] / totals["tokens"] > 0.95


def test_long_rows_in_bfloat16_stay_finite(setting):
    _model, _, variables, apply = setting
    tokens = jax.random.randint(KEY, (1, 1024), 0, SMALL.vocabulary)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    logits = apply(low, {"tokens": tokens}).logits
    assert logits.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(logits)


def test_a_width_that_cannot_be_rotated_is_refused():
    with pytest.raises(zoo.UserError, match="hidden_size 36 is not twice a multiple of num_heads 4"):
        PAPER.config("tiny", hidden_size=36)
