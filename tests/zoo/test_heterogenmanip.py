"""HeteroGenManip's card: what its encoder sees, its U-Net, its sampler and the matching of features."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
import zoo
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.spatial.heterogenmanip import (
    Encoder,
    Limits,
    PointNet,
    ResidualBlock,
    contact_points,
    groups_of,
    limits,
    schedule,
    similarity,
    start_noise,
)

KEY = jax.random.key(2)
PAPER = zoo.paper("heterogenmanip")
SMALL = {
    "num_observations": 3,
    "num_points": 24,
    "num_groups": 4,
    "point_widths": (8, 8),
    "feature_width": 16,
    "widths": (8, 16),
}
STREAMS = ("active", "active_features", "passive", "passive_features", "environment", "state")


def noisy(variables, spread=0.3):
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(KEY, len(leaves))
    return tree.unflatten([v + spread * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("attention", ["official", "tokens"])
def test_only_tokens_see_the_active_object_and_the_features(attention):
    c = zoo.paper("heterogenmanip").config("tiny", **SMALL, attention=attention)
    batch = PAPER.example(c, batch_size=2, key=KEY)
    seen = {name: batch[name][:, 0] for name in STREAMS}
    encoder = Encoder(c)
    variables = noisy(encoder.init(KEY, seen))
    gradients = jax.jit(jax.grad(lambda seen: jnp.sum(jnp.sin(encoder.apply(variables, seen)))))(seen)
    felt = {name for name, gradient in gradients.items() if np.any(gradient)}
    assert felt == ({"passive", "environment", "state"} if attention == "official" else set(STREAMS))


def test_a_cloud_is_a_set():
    c = PAPER.config("tiny", **SMALL)
    x = jax.random.normal(KEY, (2, 24, 5))
    net = PointNet(c, 16)
    variables = noisy(net.init(KEY, x))
    found = net.apply(variables, x)
    chex.assert_shape(found, (2, 1, 16))
    chex.assert_trees_all_close(net.apply(variables, x[:, ::-1]), found, atol=1e-6)
    chex.assert_trees_all_close(net.apply(variables, jnp.concatenate([x, x[:, 3:4]], axis=1)), found, atol=1e-6)
    # So are its groups, but for their order; and a single group is the whole.
    groups = groups_of(x[..., :3], 4)
    assert set(np.unique(groups)) == {0, 1, 2, 3}
    chex.assert_trees_all_equal(groups_of(x[:, ::-1, :3], 4), groups[:, ::-1])
    chex.assert_trees_all_close(net.apply(variables, x, jnp.zeros((2, 24), int))[:, :1], found, atol=1e-6)


def test_scale_one_and_bias_zero_leave_a_block_as_it_is():
    c = PAPER.config("tiny", norm_groups=2)
    x, condition = jax.random.normal(KEY, (2, 6, 4)), jax.random.normal(KEY, (2, 3))
    block = ResidualBlock(c, 8)
    params = noisy(block.init(KEY, x, condition))["params"]
    one = {"kernel": jnp.zeros((3, 16)), "bias": jnp.repeat(jnp.array([1.0, 0.0]), 8)}
    found = block.apply({"params": params | {"film": one}}, x, condition)

    def plain(y, i):
        kernel, norm = params[f"conv{i}"], params[f"norm{i}"]
        y = jnp.pad(y, ((0, 0), (2, 2), (0, 0)))
        y = sum(y[:, k : k + 6] @ kernel["kernel"][k] for k in range(5)) + kernel["bias"]
        grouped = y.reshape(2, 6, 2, 4)
        mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        y = ((grouped - mean) / jnp.sqrt(var + 1e-5)).reshape(y.shape) * norm["scale"] + norm["bias"]
        return y * jnp.tanh(jnp.logaddexp(y, 0.0))

    expected = plain(plain(x, 0), 1) + x @ params["skip"]["kernel"] + params["skip"]["bias"]
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    assert not np.allclose(block.apply({"params": params}, x, condition), expected, atol=1e-2)


@pytest.mark.parametrize(("name", "width"), [("garment", 60), ("store_mug", 9), ("tiny", 3)])
def test_actions_have_the_shape_of_the_robot(name, width):
    model = zoo.create("heterogenmanip", name)
    batch = jax.eval_shape(lambda k: PAPER.example(model.config, batch_size=2, key=k), KEY)
    outputs = jax.eval_shape(lambda: model.init_with_output(KEY, PAPER.example(model.config, batch_size=2, key=KEY)))
    assert outputs[0]["actions"].shape == batch["y"].shape == (2, 8, width)


def test_sizes_are_the_official_ones():
    shapes = zoo.registry.variable_shapes(PAPER, zoo.create("heterogenmanip", "garment"))["params"]
    count = {part: sum(s.size for s in jax.tree.leaves(shapes[part])) for part in ("unet", "encoder")}
    assert count["unet"] == pytest.approx(268.0e6, rel=1e-3)
    assert count["encoder"] == pytest.approx(0.30e6, rel=0.02)


def test_the_schedule():
    c = PAPER.config("garment")
    levels = np.asarray(schedule(c))
    assert np.all(np.diff(levels) < 0)
    assert 0 < levels[-1] < levels[0] < 1
    assert layers.diffusion_timesteps(c.train_steps, c.inference_steps).tolist() == list(range(90, -1, -10))


@pytest.mark.parametrize("sampler", ["consistent", "pinned"])
def test_an_oracle_draws_what_it_knows(sampler, monkeypatch):
    model = zoo.create("heterogenmanip", "tiny", **SMALL, sampler=sampler)
    truth = jax.random.uniform(KEY, (2, 8, 3), minval=-1.0, maxval=1.0)
    monkeypatch.setattr("zoo.spatial.heterogenmanip.UNet.__call__", lambda self, x, step, seen: truth)
    drawn = model.apply({}, jnp.zeros((2, 4)), start_noise(model.config)[None].repeat(2, 0), method="draw")
    chex.assert_trees_all_close(drawn, truth, atol=1e-6)


def test_limits_go_to_one_and_back():
    values = np.random.default_rng(0).normal(size=(50, 3)) * [1.0, 40.0, 0.0] + [5.0, 0.0, 2.0]
    found = limits(values, 1e-4)
    layer = Limits(3)
    variables = {"constants": {name: jnp.asarray(v, jnp.float32) for name, v in found.items()}}
    scaled = layer.apply(variables, jnp.asarray(values, jnp.float32))
    chex.assert_trees_all_close(scaled.min(axis=0), jnp.array([-1.0, -1.0, 0.0]), atol=1e-5)
    chex.assert_trees_all_close(scaled.max(axis=0), jnp.array([1.0, 1.0, 0.0]), atol=1e-5)
    back = layer.apply(variables, scaled, inverse=True)
    chex.assert_trees_all_close(back, jnp.asarray(values, jnp.float32), rtol=1e-5, atol=1e-5)


def test_matching_features_finds_the_points_again():
    features, points = jax.random.normal(KEY, (1, 12, 6)), jax.random.normal(jax.random.key(1), (1, 12, 3))
    order = jax.random.permutation(KEY, 12)
    # Features that do not change when the object turns, up to their length.
    observed = 3.0 * features[:, order]
    similar = similarity(features[0, :4], observed)
    assert similar.min() == 0
    assert 0.999 < float(similar.max(axis=1).min()) <= float(similar.max()) <= 1.0
    chex.assert_trees_all_equal(order[jnp.argmax(similar[0], axis=0)], jnp.arange(4))
    found = contact_points(features[0, :4], observed, points[:, order])
    chex.assert_trees_all_equal(found, points[:, :4])


def test_training_does_not_draw_and_policy_does_not_look_ahead():
    model = zoo.create("heterogenmanip", "tiny", **SMALL)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    shapes = zoo.registry.variable_shapes(PAPER, model)
    variables = noisy(jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes))
    seen = {name: a for name, a in batch.items() if name != "y"}
    done, outputs = jax.jit(lambda v: (model.apply(v, seen, method="policy"), model.apply(v, batch)))(variables)
    chex.assert_trees_all_close(done, outputs["actions"][:, 2:6], atol=1e-5)
    train = jax.jit(lambda k: model.apply(variables, batch, train=True, rngs={"dropout": k})["guess"])
    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)))


def test_learns():
    recipe = recipe_for("heterogenmanip")
    model = dataclasses.replace(recipe.model, num_points=12, num_groups=3, point_widths=(16, 16), widths=(32,))
    prepared = prepare(dataclasses.replace(recipe, model=model, batch_size=8, mesh="data=1", log_every=50))
    order = jnp.asarray(np.random.default_rng(0).permutation(len(prepared.splits.train)), jnp.int32)
    _, history = prepared.program.run(prepared.program.init(), prepared.splits.train, order, 0, 50)
    losses = np.asarray(history["loss"])
    assert losses[-10:].mean() < 0.5 * losses[:10].mean()
