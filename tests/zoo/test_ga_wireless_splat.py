"""GAI-GS's card: motions go through the algebra, the token's sources, where splats land, and that it learns."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
import zoo
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.registry import variable_shapes
from zoo.spatial.ga_wireless_splat import (
    Config,
    EquiAttention,
    EquiLinear,
    GATr,
    GeoMLP,
    NetworkConfig,
    Scene,
    SceneToken,
    loss,
    norm,
    scene_example,
)

KEY = jax.random.key(8)
PAPER = zoo.paper("ga_wireless_splat")
SMALL = NetworkConfig(token=4, anchors=4, heads=2)


def unit(key, size):
    x = jax.random.normal(key, (size,))
    return x / jnp.linalg.norm(x)


MOTIONS = {
    "rotation": layers.pga_embed_rotation(unit(KEY, 4)),
    "translation": layers.pga_embed_translation(jnp.array([0.5, -1.0, 0.3])),
    "reflection": layers.pga_embed_plane(unit(KEY, 3), jnp.array([0.2, 0.1, -0.4])),
}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (EquiLinear(6, 3), ()),
        (EquiAttention(SMALL), ()),
        (GeoMLP(), ("reference",)),
        (GATr(SMALL), ()),
    ],
    ids=["linear", "attention", "mlp", "network"],
)
def test_moving_what_goes_in_moves_what_comes_out(module, arguments):
    keys = jax.random.split(KEY, 4)
    # Points among the multivectors, so that distances play their part.
    x = 0.5 * jax.random.normal(keys[0], (1, 5, 4, 16))
    x = x.at[:, :, 0].set(layers.pga_embed_point(jax.random.normal(keys[1], (1, 5, 3))))
    s = jax.random.normal(keys[2], (1, 5, 3))
    reference = (layers.pga_embed_point(jnp.array([[0.1, 0.2, 0.3]])),) if arguments else ()
    variables = jax.jit(module.init)(keys[3], x, s, *reference)
    moving = jax.jit(lambda u, x, s, *r: module.apply(variables, *(layers.pga_sandwich(u, v) for v in (x,)), s,
                                                      *(layers.pga_sandwich(u, v) for v in r)))  # fmt: skip
    still = layers.pga_embed_translation(jnp.zeros(3))
    y, t = moving(still, x, s, *reference)
    for name, motion in MOTIONS.items():
        moved, same = moving(motion, x, s, *reference)
        chex.assert_trees_all_close(moved, layers.pga_sandwich(motion, y), atol=2e-4, rtol=1e-3, custom_message=name)
        chex.assert_trees_all_close(same, t, atol=1e-4, rtol=1e-3)
    assert float(jnp.max(jnp.abs(moved - y))) > 1e-2


def test_a_norm_is_invariant_and_the_table_is_that_of_the_algebra():
    x = jax.random.normal(KEY, (3, 4, 16))
    for motion in MOTIONS.values():
        moved = layers.pga_layer_norm(layers.pga_sandwich(motion, x))
        chex.assert_trees_all_close(moved, layers.pga_sandwich(motion, layers.pga_layer_norm(x)), atol=1e-4)
    e = jnp.eye(16)
    product = layers.pga_geometric_product
    chex.assert_trees_all_equal(product(e[2], e[2]), e[0])
    assert not jnp.any(product(e[1], e[1]))
    chex.assert_trees_all_equal(product(e[2], e[3]), -product(e[3], e[2]))
    a, b, c = jax.random.normal(KEY, (3, 16))
    chex.assert_trees_all_close(product(product(a, b), c), product(a, product(b, c)), atol=1e-4)


def test_attention_is_by_distance_over_the_root_of_all_features():
    p, q = jax.random.normal(KEY, (2, 6, 3))
    query, key = (layers.pga_distance_features(layers.pga_embed_point(v))[i] for i, v in enumerate((p, q)))
    far = jnp.sum((p[:, None] - q) ** 2, axis=-1)
    chex.assert_trees_all_close(query @ key.T, -far, rtol=1e-2, atol=1e-2)
    points = [layers.pga_embed_point(v)[None, :, None, None] for v in (p, q)]
    scalars = jax.random.normal(KEY, (2, 1, 6, 1, 3))
    value = jax.random.normal(KEY, (1, 6, 1, 1, 16))
    ours, _ = layers.pga_attention(points[0], points[1], value, *scalars, scalars[1], epsilon=1e-12)
    logits = (-far + scalars[0, 0, :, 0] @ scalars[1, 0, :, 0].T) / np.sqrt(12 + 3)
    expected = jax.nn.softmax(logits) @ value[0, :, 0, 0]
    chex.assert_trees_all_close(ours[0, :, 0, 0], expected, atol=1e-4)


def test_the_token_hears_of_the_most_opaque_gaussians_alone():
    token = SceneToken(SMALL)
    place, tx = jax.random.normal(KEY, (9, 3)), jnp.array([[1.0, 0.5, -0.3]])
    opacity = jnp.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.05, 0.6, 0.15])
    variables = jax.jit(token.init)(KEY, place, tx, opacity)
    apply = jax.jit(lambda place, tx: token.apply(variables, place, tx, opacity))
    before = apply(place, tx)
    for number, matters in ((1, True), (7, True), (4, False), (6, False)):
        after = apply(place.at[number].add(1.0), tx)
        assert bool(jnp.any(jnp.abs(after - before) > 1e-6)) == matters, number
    assert not np.allclose(apply(place, tx + 1.0), before, atol=1e-6)


def test_a_single_gaussian_lands_where_it_is_seen_and_can_be_put_out():
    config = Config(height=18, width=36, gaussians=1)
    scene = scene_example(config, batch_size=1, key=KEY)
    azimuth, elevation = np.radians(65.0), np.radians(25.0)
    direction = [np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)]
    g = {"place": 4.0 * jnp.array([direction]), "color": jnp.ones((1, 3)), "opacity": jnp.full((1, 1), 2.0),
         "scale": jnp.full((1, 3), -1.0), "quaternion": jnp.eye(1, 4)}  # fmt: skip
    for tiles in (False, True):
        render = jax.jit(Scene(dataclasses.replace(config, tiles=tiles)).apply)
        found = render({}, scene | {"gaussians": g})
        peak = np.unravel_index(int(jnp.argmax(found["image"][..., 0])), (18, 36))
        assert peak == (round((25 / 90 + 1) * 9 - 0.5), round((65 / 180 + 1) * 18 - 0.5))
        assert 0.5 < float(jnp.max(found["weight"])) <= 1
        gone = scene["changes"] | {"attenuation": jnp.full((1, 1), -1.0)}
        assert not jnp.any(render({}, scene | {"gaussians": g, "changes": gone})["image"])
    # The receiver's place moves the scene, turned back by its rotation.
    turn = jnp.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    moved = {"rotation": turn, "receiver": jnp.array([0.0, 0.0, 2.0])}
    found = render({}, scene | {"gaussians": g} | moved)
    seen = turn.T @ g["place"][0] + moved["receiver"]
    expected = (jnp.arctan2(seen[0], seen[2]) / jnp.pi + 1) * 18 - 0.5
    assert float(found["center"][0, 0]) == pytest.approx(float(expected), abs=1e-3)


def test_weights_of_many_gaussians_sum_to_less_than_one_and_tiles_drop_little():
    config = Config(height=18, width=36, gaussians=60)
    scene = scene_example(config, batch_size=1, key=KEY)
    images = [jax.jit(Scene(dataclasses.replace(config, tiles=t)).apply)({}, scene) for t in (False, True)]
    assert 0.5 < float(jnp.max(images[0]["weight"])) <= 1 + 1e-6
    assert float(jnp.max(jnp.abs(images[0]["image"] - images[1]["image"]))) < 0.05


def test_the_norm_of_changes_is_not_squared_and_flat_at_zero():
    changes = jnp.full((2, 4, 1), 3.0)
    chex.assert_trees_all_close(norm(changes), jnp.full(2, 6.0))
    chex.assert_trees_all_equal(jax.grad(lambda x: jnp.sum(norm(x)))(jnp.zeros((2, 4, 1))), jnp.zeros((2, 4, 1)))
    batch = {"y": jnp.ones((2, 12, 12))}
    outputs = {"spectrum": batch["y"], "attenuation": changes, "attenuation_weight": jnp.full(2, 0.01)}
    assert float(loss(outputs, batch)[0]) == pytest.approx(0.06, abs=1e-5)


def test_the_network_of_the_paper_has_its_size():
    shapes = variable_shapes(PAPER, zoo.create("ga_wireless_splat", "rfid"))["params"]
    assert sum(s.size for s in jax.tree.leaves(shapes["network"])) == 962_293


def test_learns_more_than_the_mean_of_what_was_received():
    recipe = recipe_for("ga_wireless_splat")
    small = dataclasses.replace(recipe.model, height=9, width=18, gaussians=40)
    prepared = prepare(dataclasses.replace(recipe, model=small, mesh="data=1", log_every=100))
    program, split = prepared.program, prepared.splits.train
    order = np.concatenate([epoch_order(0, epoch, len(split)) for epoch in range(2)])
    state, _ = program.run(program.init(), split, order, 0, 100)
    scores = program.score(state.variables, prepared.splits.valid.batch(np.arange(40)), np.ones(40, bool))
    assert float(scores["l1"]) < float(scores["mean_spectrum/l1"])
