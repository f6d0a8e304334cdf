"""The BiLSTM with attention: lengths, the bound on its weights, and what counting words cannot do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.weights import drawn
from trainers.data.texts import load_texts
from zoo.blocks.learners import fit
from zoo.language.imdb_bilstm_attention import LSTM, tf_idf
from zoo.tasks import classification

KEY = jax.random.key(5)
PAPER = zoo.paper("imdb_bilstm_attention")


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("imdb_bilstm_attention", length=12, num_layers=2)
    batch = PAPER.example(model.config, batch_size=4, key=KEY)
    lengths = jnp.array([12, 7, 1, 3])
    batch = batch | {"mask": jnp.arange(12) < lengths[:, None]}
    variables = drawn(PAPER, model)
    return model, batch, variables, jax.jit(model.apply)


def test_a_direction_equals_its_loop():
    x = np.asarray(jax.random.normal(KEY, (1, 5, 3)))
    for reverse in (False, True):
        module = LSTM(4, reverse=reverse)
        present = jnp.array([[True, True, True, True, False]])
        variables = jax.jit(module.init)(KEY, jnp.asarray(x), present)
        p = jax.tree.map(np.asarray, variables["params"])
        states, last = module.apply(variables, jnp.asarray(x), present)
        h, c, expected = np.zeros(4), np.zeros(4), np.zeros((5, 4))
        for t in range(3, -1, -1) if reverse else range(4):
            gates = x[0, t] @ p["input"]["kernel"] + p["input"]["bias"] + h @ p["kernel"] + p["bias"]
            i, f, g, o = np.split(gates, 4)
            i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
            c = f * c + i * np.tanh(g)
            h = expected[t] = o * np.tanh(c)
        np.testing.assert_allclose(states[0], expected, atol=1e-5)
        np.testing.assert_allclose(last[0], h, atol=1e-5)


def test_what_stands_behind_the_end_changes_nothing(setting):
    _, batch, variables, apply = setting
    outputs = apply(variables, batch)
    other = jnp.where(batch["mask"], batch["x"], 49)
    chex.assert_trees_all_close(apply(variables, batch | {"x": other}), outputs, atol=1e-6)
    longer = {name: jnp.pad(batch[name], ((0, 0), (0, 5))) for name in ("x", "mask")}
    chex.assert_trees_all_close(apply(variables, batch | longer)["logits"], outputs["logits"], atol=1e-6)
    assert not np.any(np.asarray(outputs["attention"])[~np.asarray(batch["mask"])])
    np.testing.assert_allclose(outputs["attention"].sum(1), 1.0, rtol=1e-5)


def test_no_place_weighs_more_than_e_squared_times_another(setting):
    _, batch, variables, apply = setting
    head = variables["params"]["attention"]["score"]
    ratios = []
    # The places' scores lie close together at first: somewhere a bias parts them.
    for bias in np.linspace(-100, 100, 81):
        scored = {"score": {"kernel": 1e3 * head["kernel"], "bias": head["bias"] + np.float32(bias)}}
        weights = np.asarray(apply({"params": variables["params"] | {"attention": scored}}, batch)["attention"])
        ratios += [w[m].max() / w[m].min() for w, m in zip(weights, np.asarray(batch["mask"]), strict=True)]
    assert max(ratios) <= np.exp(2) * (1 + 1e-5)
    assert max(ratios) > 5.0  # and comes near it


def test_without_a_score_it_is_the_mean(setting):
    _, batch, variables, apply = setting
    params = variables["params"] | {"attention": jax.tree.map(jnp.zeros_like, variables["params"]["attention"])}
    weights = apply({"params": params}, batch)["attention"]
    np.testing.assert_allclose(weights, batch["mask"] / batch["mask"].sum(1, keepdims=True), rtol=1e-6)


def test_one_word_has_all_the_weight(setting):
    _, batch, variables, apply = setting
    assert apply(variables, batch)["attention"][2].tolist() == [1.0] + [0.0] * 11


def test_the_row_of_no_word_is_not_trained(setting):
    model, batch, variables, _ = setting
    batch = batch | {"x": batch["x"].at[:, 0].set(0)}

    def loss(params):
        return classification.loss(model.apply({"params": params}, batch), batch)[0]

    gradient = jax.jit(jax.grad(loss))(variables["params"])["embedding"]
    assert not np.any(gradient[0])
    assert np.any(gradient[batch["x"][0, 1]])


def test_tf_idf_equals_its_definition():
    tokens = jnp.array([[2, 2, 3, 1, 0], [3, 4, 4, 4, 2]])
    frequency = jnp.array([9.0, 9.0, 2.0, 2.0, 1.0])
    weight = np.log(3 / (1 + np.array([2, 2, 1]))) + 1
    expected = np.array([[2, 1, 0], [1, 1, 3]]) * weight
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(tf_idf(tokens, frequency, 2)[:, 2:], expected, rtol=1e-5)
    assert not np.any(tf_idf(tokens, frequency, 2)[:, :2])


def test_order_is_learned_where_counting_words_fails():
    data = load_texts("standin", data_dir=None, length=40, vocabulary=50, num_classes=2)
    counts = jax.vmap(lambda row: jnp.zeros(50).at[row].add(1.0))
    predict = fit("logistic", counts(data.train.tokens)[:, 1:], data.train.label, num_classes=2, steps=20)
    right = jnp.argmax(predict(counts(data.test.tokens)[:, 1:]), axis=-1) == data.test.label
    assert float(jnp.mean(right)) < 0.65

    model = zoo.create("imdb_bilstm_attention")
    params = jax.jit(model.init)(KEY, data.train.batch(jnp.arange(2)))["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def trained(params):
        def loss(params, batch):
            return classification.loss(model.apply({"params": params}, batch), batch)[0]

        def step(i, carry):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(KEY, i), (64,), 0, len(data.train))
            updates, state = optimizer.update(jax.grad(loss)(params, data.train.batch(rows)), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 200, step, (params, optimizer.init(params)))[0]

    test = data.test.batch(jnp.arange(len(data.test)))
    accuracy = classification.metrics(jax.jit(model.apply)({"params": trained(params)}, test), test)["accuracy"]
    assert float(jnp.mean(accuracy)) > 0.85
