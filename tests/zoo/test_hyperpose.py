"""HYPERPOSE's card: what attention on the hyperboloid, on velocities and on the skeleton implies."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
import zoo
from trainers.data.poses import load_poses
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.spatial.hyperpose import (
    KinematicAttention,
    TemporalAttention,
    bounded,
    geodesic_losses,
    loss,
    tree_powers,
    velocities,
)
from zoo.tasks.pose_lifting import LEFT, PARENTS, RIGHT, metrics, mirror

KEY = jax.random.key(3)
PAPER = zoo.paper("hyperpose")
TREE = jnp.asarray(layers.tree_adjacency(PARENTS), jnp.float32)


def noisy(variables, spread=0.2):
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(KEY, len(leaves))
    return tree.unflatten([v + spread * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("hyperpose", "tiny", windows=(1, 2), frames=9, d_model=16, num_heads=2)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables = jax.jit(model.init)({"params": KEY, "dropout": KEY}, batch)
    return model, batch, variables | {"params": noisy(variables["params"])}, jax.jit(model.apply)


def test_scores_are_one_minus_the_hyperbolic_cosine_of_the_distance():
    q, k = (layers.lorentz_exp_origin(v) for v in jax.random.normal(KEY, (2, 1, 5, 2, 4)))
    scores = layers.lorentz_scores(q, k, kind="inner")[0]
    apart = layers.lorentz_distance(jnp.moveaxis(q[0], 1, 0)[:, :, None], jnp.moveaxis(k[0], 1, 0)[:, None])
    chex.assert_trees_all_close(scores, 1 - jnp.cosh(apart), rtol=1e-4, atol=1e-5)
    assert float(scores.max()) < 0
    own = layers.lorentz_scores(q, q, kind="inner")
    chex.assert_trees_all_close(jnp.diagonal(own, axis1=2, axis2=3), jnp.zeros((1, 2, 5)), atol=1e-4)


def test_near_the_origin_scores_are_euclidean():
    v, w = 1e-2 * jax.random.normal(KEY, (2, 1, 5, 1, 4))
    scores = layers.lorentz_scores(layers.lorentz_exp_origin(v), layers.lorentz_exp_origin(w), kind="inner")
    squared = jnp.sum(jnp.square(v[0, :, None, 0] - w[0, None, :, 0]), axis=-1)
    chex.assert_trees_all_close(scores[0, 0], -squared / 2, rtol=1e-2, atol=2e-7)


def test_tree_powers_are_where_walks_lead():
    neighbours = [set(np.flatnonzero(row)) for row in np.asarray(TREE)]
    ends = [{i} for i in range(17)]
    for power in tree_powers(TREE, 3):
        ends = [set().union(*(neighbours[j] for j in reached)) for reached in ends]
        expected = np.array([[j in ends[i] and j != i for j in range(17)] for i in range(17)], np.float32)
        chex.assert_trees_all_equal(np.asarray(power), expected)


def test_without_tree_and_velocity_attention_is_geometric(setting):
    c = setting[0].config
    x = jax.random.normal(KEY, (3, 17, 16))
    layer = KinematicAttention(c)
    params = noisy(layer.init(KEY, x, x, TREE))["params"]
    params = params | {"tree": {"scale": jnp.zeros((2, 3))}}
    found = layer.apply({"params": params}, x, jnp.zeros_like(x), TREE)
    # A velocity of zero is the same for all joints: it says how far the two biases are apart, and no more.
    q, k, v = ((x @ params[n]["kernel"] + params[n]["bias"]).reshape(3, 17, 2, 8) for n in ("query", "key", "value"))
    q, k = (layers.lorentz_exp_origin(bounded(a, c.head_norm)) for a in (q, k))
    inner = jnp.einsum("bqhd,bkhd->bhqk", q[..., 1:], k[..., 1:]) - jnp.einsum("bqh,bkh->bhqk", q[..., 0], k[..., 0])
    weights = jax.nn.softmax((1 + inner) / params["temperature"]["value"][:, None, None], axis=-1)
    chex.assert_trees_all_close(found, jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape), atol=1e-4)
    # Both are felt where they are there.
    moving = layer.apply({"params": params}, x, 0.3 * x, TREE)
    grown = layer.apply({"params": params | {"tree": {"scale": jnp.ones((2, 3))}}}, x, jnp.zeros_like(x), TREE)
    assert not np.allclose(moving, found, atol=1e-3)
    assert not np.allclose(grown, found, atol=1e-3)


def test_windows_are_a_band_of_dense_attention(setting):
    x = jax.random.normal(KEY, (2, 9, 3, 16))
    layer = TemporalAttention(setting[0].config, 2)
    params = noisy(layer.init(KEY, x))["params"]
    found = layer.apply({"params": params}, x)
    tracks = jnp.swapaxes(x, 1, 2)
    q, k, v = (
        (tracks @ params[n]["kernel"] + params[n]["bias"]).reshape(2, 3, 9, 2, 8) for n in ("query", "key", "value")
    )
    scores = jnp.einsum("bjqhd,bjkhd->bjhqk", q, k) / (8**0.5 * params["temperature"]["value"][:, None, None])
    band = jnp.abs(jnp.arange(9)[:, None] - jnp.arange(9)) <= 2
    weights = jax.nn.softmax(jnp.where(band, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bjhqk,bjkhd->bjqhd", weights, v).reshape(2, 3, 9, 16)
    chex.assert_trees_all_close(found, jnp.swapaxes(expected, 1, 2), atol=1e-5)


def test_frames_beyond_the_windows_are_not_seen(setting):
    _, batch, variables, apply = setting
    before = apply(variables, batch)["pose"]
    after = apply(variables, batch | {"x": batch["x"].at[:, 8].add(0.5)})["pose"]
    changed = np.any(np.asarray(before != after), axis=(0, 2, 3))
    # 1 + 2 frames of attention, and one of the central difference.
    assert changed.tolist() == [False] * 4 + [True] * 5


def test_velocities():
    x = jnp.arange(5.0)[None, :, None, None] ** 2
    assert velocities(x)[0, :, 0, 0].tolist() == [1, 2, 4, 6, 7]
    assert velocities(x, "v2")[0, :, 0, 0].tolist() == [1, 1, 3, 5, 7]
    assert velocities(x[:, :1]).tolist() == [[[[0.0]]]]


def test_losses_are_the_same_in_a_mirror(setting):
    _, batch, _, _ = setting
    outputs = {"pose": batch["y"] * 0.8 + 0.02, "log_variances": jnp.full((2, 3), 0.3), "geometry_weight": jnp.ones(2)}
    other = outputs | {"pose": mirror(outputs["pose"])}
    chex.assert_trees_all_close(loss(other, {"y": mirror(batch["y"])}), loss(outputs, batch), rtol=1e-5)
    chex.assert_trees_all_equal(mirror(mirror(batch["x"])), batch["x"])
    assert mirror(batch["x"])[0, 0, LEFT[0], 0] == -batch["x"][0, 0, RIGHT[0], 0]


def test_training_looks_into_a_mirror_and_loses_confidence(setting):
    model, batch, variables, apply = setting
    mirrored = zoo.create("hyperpose", "tiny", **vars(model.config) | {"mirror_rate": 1.0, "occlusion_rate": 0.0})
    seen = mirrored.apply(variables, batch, train=True, rngs={"dropout": KEY})["pose"]
    expected = mirror(apply(variables, batch | {"x": mirror(batch["x"])})["pose"])
    chex.assert_trees_all_close(seen, expected, atol=1e-5)
    occluded = zoo.create("hyperpose", "tiny", **vars(model.config) | {"occlusion_rate": 1.0})
    hidden = occluded.apply({}, (400, 9, 17, 3), method="_occluded", rngs={"dropout": KEY})
    assert {1, 2} == set(np.asarray(hidden.sum(axis=1)).tolist())


def test_the_geodesic_losses_come_in_with_the_curriculum(setting):
    model, batch, _, _ = setting
    model = zoo.create("hyperpose", "tiny", **vars(model.config) | {"curriculum": (1, 3)})
    variables = jax.jit(model.init)({"params": KEY, "dropout": KEY}, batch)
    step = jax.jit(lambda v: model.apply(v, batch, train=True, rngs={"dropout": KEY}, mutable=["progress"]))
    weights = []
    for _ in range(5):
        outputs, updated = step(variables)
        variables |= updated
        weights.append(float(outputs["geometry_weight"][0]))
    assert weights == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert float(model.apply(variables, batch)["geometry_weight"][0]) == 1.0


def test_the_bone_loss_steadies_bones():
    truth = load_poses("standin", data_dir=None, frames=4).test.pose[:8]
    pose = truth + 0.02 * jax.random.normal(KEY, truth.shape)
    descend = jax.jit(lambda p: p - 2.0 * jax.grad(lambda q: geodesic_losses(q, truth)[1])(p))
    drift = float(metrics(pose, {"y": truth})["bone_drift"].mean())
    for _ in range(100):
        pose = descend(pose)
    assert float(metrics(pose, {"y": truth})["bone_drift"].mean()) < 0.5 * drift


def test_all_of_the_official_model_is_there():
    def count(name):
        shapes = zoo.registry.variable_shapes(PAPER, zoo.create("hyperpose", name))
        return sum(s.size for s in jax.tree.leaves(shapes["params"]))

    assert count("h36m_v2") == 17_605_641 + 3  # as the official log says, and the log-variances
    assert count("h36m") == 21_845_680


def test_v2_has_one_head():
    with pytest.raises(zoo.UserError, match="v2 has one head, not num_heads 4"):
        zoo.create("hyperpose", "tiny", version="v2")


def test_learns():
    recipe = recipe_for("hyperpose")
    short = dataclasses.replace(recipe.model, frames=9)
    prepared = prepare(dataclasses.replace(recipe, model=short, mesh="data=1", log_every=75))
    train = prepared.splits.train
    order = jnp.asarray(np.random.default_rng(0).permutation(len(train)), jnp.int32)
    _, history = prepared.program.run(prepared.program.init(), train, order, 0, 75)
    errors = np.asarray(history["mpjpe"])[:75]
    radius = float(jnp.mean(jnp.linalg.norm(train.pose, axis=-1)))
    assert errors[-10:].mean() < 0.6 * radius
    assert errors[0] > 0.8 * radius
