"""Hardmax attention: its step, its symmetries, and what the classifier of reviews learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.theory.hardmax_clustering import leaders, step, trajectory

KEY = jax.random.key(0)


def loop(tokens, alpha, metric):
    """The definition, token by token."""
    out = np.empty_like(tokens)
    for i, z in enumerate(tokens):
        scores = tokens @ (metric @ z)
        out[i] = (z + alpha * tokens[scores == scores.max()].mean(axis=0)) / (1 + alpha)
    return out


def test_a_step_is_its_definition_and_ties_share():
    tokens = np.asarray(jax.random.normal(KEY, (9, 3)))
    metric = np.diag([1.0, 2.0, 0.5]).astype(np.float32)
    np.testing.assert_allclose(
        step(jnp.asarray(tokens), 0.5, jnp.asarray(metric)), loop(tokens, 0.5, metric), atol=1e-6
    )
    # The first token sees the two on the right equally far.
    tied = np.array([[1.0, 0.0], [2.0, 1.0], [2.0, -1.0]], np.float32)
    np.testing.assert_allclose(step(jnp.asarray(tied), 1.0)[0], [1.5, 0.0])
    np.testing.assert_allclose(step(jnp.asarray(tied), 1.0), loop(tied, 1.0, np.eye(2)), atol=1e-6)
    assert leaders(jnp.asarray(tied)).tolist() == [False, True, True]


def test_order_rotation_and_scale_of_tokens_go_through():
    tokens = jax.random.normal(KEY, (12, 3))
    after = trajectory(tokens, 0.7, depth=6)[-1]
    order = jax.random.permutation(KEY, 12)
    np.testing.assert_allclose(trajectory(tokens[order], 0.7, depth=6)[-1], after[order], atol=1e-6)
    turn = jnp.linalg.qr(jax.random.normal(KEY, (3, 3)))[0]
    np.testing.assert_allclose(trajectory(tokens @ turn, 0.7, depth=6)[-1], after @ turn, atol=1e-5)
    np.testing.assert_allclose(trajectory(4.0 * tokens, 0.7, depth=6)[-1], 4.0 * after, rtol=1e-5, atol=1e-5)


def test_clamping_keeps_alpha_above_zero():
    batch = zoo.paper("hardmax_clustering").example(zoo.create("hardmax_clustering").config, batch_size=2, key=KEY)
    outputs = []
    for clamp, alpha in ((True, -0.5), (True, 0.0), (False, -0.5)):
        model = zoo.create("hardmax_clustering", clamp_alpha=clamp)
        params = model.init(KEY, batch)["params"] | {"alpha": jnp.array([alpha])}
        outputs.append(model.apply({"params": params}, batch)["tokens"])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.allclose(outputs[1], outputs[2])


@pytest.fixture(scope="module")
def trained():
    recipe = dataclasses.replace(recipe_for("hardmax_clustering"), mesh="data=1", epochs=12)
    run = prepare(recipe)
    state = run.program.init()
    for epoch in range(12):
        order = epoch_order(recipe.seed, epoch, len(run.splits.train))
        state, _ = run.program.run(state, run.splits.train, order, 0, len(run.splits.train) // recipe.batch_size)
    return run, state.variables


def test_learns_the_stand_in_and_its_leaders_are_polar(trained):
    run, variables = trained
    scores = run.program.evaluate(variables, run.splits.test)
    assert float(scores["accuracy"]) > 0.9
    assert float(scores["accuracy"]) > float(scores["prior/accuracy"]) + 0.3
    batch = run.splits.test.batch(jnp.arange(1000))
    hard = zoo.create("hardmax_clustering", temperature=0.0).apply(variables, batch)["logits"]
    right = np.mean(np.asarray(hard.argmax(-1)) == np.asarray(batch["label"]))
    assert abs(right - float(scores["accuracy"])) < 0.01
    # Where the classifier is sure, words of sentiment lead in four reviews of five, and far more often than others.
    sure = np.abs(np.asarray(hard[:, 1])) > 2.0
    start = jnp.asarray(variables["params"]["embedding"])[batch["x"]]
    leading, polar = np.asarray(leaders(start))[sure], np.asarray(batch["x"])[sure] >= 162
    assert np.mean(np.any(leading & polar, axis=1)) > 0.8
    assert np.mean(polar[leading]) > 2 * np.mean(polar)
