"""Ister's card: what the paper's mechanism implies."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.weights import drawn

KEY = jax.random.key(5)
PAPER = zoo.paper("ister")


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("ister", "tiny", num_layers=2)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    leaves, tree = jax.tree.flatten(drawn(PAPER, model)["params"])
    keys = jax.random.split(KEY, len(leaves))
    params = tree.unflatten([v + 0.2 * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])
    return model, batch, {"params": params}, jax.jit(model.apply)


def test_the_number_of_heads_changes_nothing(setting):
    _model, batch, variables, apply = setting
    other = zoo.create("ister", "tiny", num_layers=2, num_heads=8)
    chex.assert_trees_all_equal(jax.jit(other.apply)(variables, batch), apply(variables, batch))


def test_variates_are_exchangeable(setting):
    _, batch, variables, apply = setting
    order = jax.random.permutation(KEY, batch["x"].shape[-1])
    permuted = apply(variables, batch | {"x": batch["x"][..., order]})
    chex.assert_trees_all_close(permuted, apply(variables, batch)[..., order], atol=1e-5)


def test_calendar_features_matter_and_are_optional(setting):
    _, batch, variables, apply = setting
    forecast = apply(variables, batch)
    assert not np.allclose(forecast, apply(variables, batch | {"x_mark": -batch["x_mark"]}), atol=1e-4)
    without = apply(variables, {"x": batch["x"], "y": batch["y"]})
    assert without.shape == forecast.shape
    assert not np.allclose(forecast, without, atol=1e-4)


def test_shifting_and_scaling_a_series_does_so_to_its_forecast(setting):
    _, batch, variables, apply = setting
    forecast = apply(variables, batch)
    changed = batch["x"].at[..., 3].set(5.0 * batch["x"][..., 3] + 40.0)
    moved = apply(variables, batch | {"x": changed})
    others = jnp.array([0, 1, 2, 4, 5, 6])
    # Exact but for the epsilon in the scale, and float32 at an offset of 40.
    chex.assert_trees_all_close(moved[..., 3], 5.0 * forecast[..., 3] + 40.0, atol=2e-3)
    chex.assert_trees_all_close(moved[..., others], forecast[..., others], atol=1e-4)


def test_heads_start_as_the_mean_of_their_token():
    model = zoo.create("ister", "tiny")
    params = model.init(KEY, PAPER.example(model.config, batch_size=1, key=KEY))["params"]
    for head in ("season_head", "trend_head"):
        chex.assert_trees_all_close(params[head]["kernel"], jnp.full((16, 24), 1 / 16))
        assert float(jnp.max(jnp.abs(params[head]["bias"]))) <= 0.25
        assert float(jnp.std(params[head]["bias"])) > 0.05


def test_linear_layers_start_like_torch():
    model = zoo.create("ister", "etth1")
    params = jax.jit(model.init)(KEY, PAPER.example(model.config, batch_size=1, key=KEY))["params"]
    bound = 1 / np.sqrt(2048)
    for values in params["layers_0"]["ffn_out"].values():
        assert float(jnp.max(jnp.abs(values))) <= bound
        assert float(jnp.std(values)) == pytest.approx(bound / np.sqrt(3), rel=0.1)


def test_captures_the_attention_weights(setting):
    model, batch, variables, _ = setting
    _, captured = model.apply(variables, batch, mutable=["intermediates"])
    weights = captured["intermediates"]["layers_0"]["attention"]["weights"][0]
    chex.assert_shape(weights, (2, 7 + 4, 16))
    chex.assert_trees_all_close(jnp.sum(weights, axis=1), jnp.ones((2, 16)), rtol=1e-5)
