"""Attention-Mamba's card: scans over a grid, flows, gates across scales, nine outputs and what they learn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layers
import zoo
from tests.weights import drawn
from trainers.data.segmentation import load_segmentation
from zoo.blocks import SS2D
from zoo.tasks import segmentation
from zoo.vision.attention_mamba import Config, CrossScaleAttention, FlowField, loss, predict_images

KEY = jax.random.key(3)
PAPER = zoo.paper("attention_mamba")
SMALL = {"stem": (4, 8), "stage_channels": (4, 6, 8, 12), "width": 16, "state_size": 3}


def moved(variables, scale=0.3):
    """Away from the symmetric weights a model starts with."""
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(KEY, len(leaves))
    params = [v + scale * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    return {**variables, "params": tree.unflatten(params)}


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("attention_mamba", "tiny", **SMALL, image_size=(32, 40), num_classes=3)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    return model, batch, drawn(PAPER, model), jax.jit(model.apply)


def silu(x):
    return x / (1 + np.exp(-x))


def ss2d_loop(p, u, n):
    """One image, one direction and one step after the other, in float64."""
    p = jax.tree.map(np.float64, p)
    height, width, _ = u.shape
    x, z = np.split(u @ p["in_proj"]["kernel"], 2, axis=-1)
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    kernel = p["conv2d"]["kernel"][:, :, 0]
    x = silu(p["conv2d"]["bias"] + sum(
        padded[i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3)
    ))  # fmt: skip
    inner = x.shape[-1]
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    total = np.zeros_like(x)
    for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
        channels = slice(k * inner, (k + 1) * inner)
        rates, skip = -np.exp(p["A_log"][channels]), p["D"][channels]
        state = np.zeros((inner, n))
        for place in order:
            maps = x[place] @ p["x_proj"]["kernel"][k]
            rank = len(maps) - 2 * n
            step = np.log1p(np.exp(maps[:rank] @ p["dt_proj"]["kernel"][k] + p["dt_proj"]["bias"][k]))
            state = np.exp(step[:, None] * rates) * state + (step * x[place])[:, None] * maps[rank : rank + n]
            total[place] += state @ maps[rank + n :] + skip * x[place]
    normed = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + 1e-5)
    return (normed * p["out_norm"]["scale"] + p["out_norm"]["bias"]) * silu(z) @ p["out_proj"]["kernel"]


def test_ss2d_is_its_loop_in_four_directions():  # Acceptance 1
    module, u = SS2D(state_size=3), jax.random.normal(KEY, (2, 4, 5, 6))
    variables = moved(module.init(KEY, u))
    found = jax.jit(module.apply)(variables, u)
    expected = np.stack([ss2d_loop(variables["params"], np.float64(image), 3) for image in u])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_state_that_forgets_at_once_leaves_the_present():  # Acceptance 2
    keys = jax.random.split(KEY, 4)
    x, step = jax.random.normal(keys[0], (2, 9, 4)), jax.nn.softplus(jax.random.normal(keys[1], (2, 9, 4)))
    b, c = (jax.random.normal(k, (2, 9, 3)) for k in keys[2:])
    skip = jnp.arange(4.0)
    found = layers.selective_scan(x, step, jnp.full((4, 3), -1e6), b, c, skip=skip)
    expected = jnp.sum(b * c, axis=-1, keepdims=True) * step * x + skip * x
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_without_flow_a_coarser_map_is_resized():  # Acceptance 3
    module = FlowField(4)
    fine, coarse = jax.random.normal(KEY, (2, 8, 6, 8)), jax.random.normal(KEY, (2, 4, 3, 8))
    variables = module.init(KEY, fine, coarse)
    flow = module.apply(variables, fine, coarse)
    assert np.any(flow)
    still = jax.tree.map(jnp.zeros_like, variables["params"]["offset"])
    none = module.apply({"params": {**variables["params"], "offset": still}}, fine, coarse)
    resized = layers.resize(coarse, (8, 6), align_corners=True)
    np.testing.assert_allclose(layers.flow_warp(coarse, none, units="output"), resized, atol=1e-5)
    # A flow of w moves the grid, which is two wide, by one: by half the map.
    right = jnp.broadcast_to(jnp.array([6.0, 0.0]), flow.shape)
    moved_by_half = layers.flow_warp(fine, right, units="output")
    between = (fine[:, :, 2:5] + fine[:, :, 3:6]) / 2
    np.testing.assert_allclose(moved_by_half[:, :, :3], between, atol=1e-5)


def test_gates_are_shares_and_the_order_of_scales_matters():  # Acceptance 4
    module = CrossScaleAttention(Config(width=32, num_classes=3, state_size=2))
    scales = jax.random.normal(KEY, (4, 2, 4, 5, 32))
    variables = moved(module.init(KEY, scales))
    apply = jax.jit(module.apply)
    gates, maps = apply(variables, scales)
    chex.assert_shape((gates, maps), [(2, 4, 3), (2, 4, 4, 5)])
    for found in (gates, maps):
        assert found.min() > 0
        assert found.max() < 1
    order = jnp.array([1, 0, 2, 3])
    other = apply(variables, scales[order])
    assert np.abs(other[0] - gates).max() > 1e-4
    assert np.abs(other[1][:, order] - maps).max() > 1e-4
    # Each gate is told by all scales, before and behind its own: the scans go both ways.
    for told, telling in ((0, 3), (3, 0)):
        changed = apply(variables, scales.at[telling].multiply(2.0))
        assert np.abs(changed[0] - gates)[:, told].max() > 1e-5
        assert np.abs(changed[1] - maps)[:, told].max() > 1e-5


def test_nine_outputs_at_full_size_and_the_first_is_that_of_evaluation(setting):  # Acceptance 5
    model, batch, variables, apply = setting
    outputs = apply(variables, batch)
    chex.assert_shape(outputs["logits"], (2, 32, 40, 3))
    chex.assert_shape((outputs["branch_logits"], outputs["early_logits"]), (2, 4, 32, 40, 3))
    chex.assert_shape((outputs["class_gates"], outputs["attention"]), [(2, 4, 3), (2, 4, 8, 10)])
    # Training gives the same mapping, and evaluation is about its `logits`.
    trained = jax.eval_shape(lambda v: model.apply(v, batch, train=True, mutable=["batch_stats"])[0], variables)
    chex.assert_trees_all_equal_shapes(trained, outputs)
    chex.assert_trees_all_equal(segmentation.logits_of(outputs), outputs["logits"])


def test_gates_weigh_the_branches_scores(setting):
    _, batch, variables, apply = setting
    attention = variables["params"]["attention"]
    still = {name: jax.tree.map(jnp.zeros_like, attention[name]) for name in ("excite", "pixel_gate")}
    still["pixel_gate"]["bias"] = jnp.array([0.7])
    params = {**variables["params"], "attention": {**attention, **still}}
    outputs = apply({**variables, "params": params}, batch)
    share = 0.5 / (1 + np.exp(-0.7))
    np.testing.assert_allclose(outputs["logits"], share * outputs["branch_logits"].sum(1), rtol=1e-4, atol=1e-5)


def test_grey_images_are_three_equal_channels(setting):
    model, batch, variables, apply = setting
    coloured = {**batch, "x": jnp.repeat(batch["x"], 3, axis=-1)}
    assert model.config.channels == 1
    chex.assert_trees_all_close(apply(variables, coloured), apply(variables, batch), atol=1e-6)


def test_images_are_predicted_in_tiles_and_in_the_mirror(setting):
    model, batch, variables, apply = setting
    wide = jnp.concatenate([batch["x"][:1], batch["x"][1:]], axis=2)  # two tiles side by side
    predict = jax.jit(lambda x: predict_images(model, variables, x))
    found = predict(wide)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(predict(wide[:, :, ::-1]), found[:, :, ::-1], atol=1e-5)
    once = jax.nn.softmax(apply(variables, batch)["logits"])[0]
    assert np.abs(found[0, :, :40] - once).max() > 1e-3  # the other three are not the same


def test_early_heads_count_a_quarter(setting):
    _, batch, variables, apply = setting
    outputs = apply(variables, batch)
    same = jnp.broadcast_to(outputs["logits"][:, None], outputs["branch_logits"].shape)
    total, parts = loss({**outputs, "branch_logits": same, "early_logits": same}, batch)
    assert float(total) == pytest.approx(float(parts["main_loss"]) * (1 + 4 + 4 * 0.25), rel=1e-5)


def test_it_learns_the_standin(setting):  # Acceptance 6; the recipe's run is longer
    model, _, variables, _ = setting
    size = {"image_size": model.config.image_size, "num_classes": 3}
    data = load_segmentation("standin", paper="attention_mamba", data_dir=None, channels=1, **size)
    batch, optimizer = data.train.batch(jnp.arange(4)), optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        def error(params):
            outputs, updated = model.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
            dice = segmentation.metrics(outputs, batch)["dice_per_image"].mean()
            return loss(outputs, batch)[0], (updated, dice)

        gradients, (updated, dice) = jax.grad(error, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {**updated, "params": optax.apply_updates(variables["params"], updates)}, state, dice

    state = optimizer.init(variables["params"])
    for _ in range(20):
        variables, state, dice = step(variables, state)
    baseline = segmentation.metrics(segmentation.otsu(batch), batch)["dice_per_image"].mean()
    assert dice > baseline + 0.1
