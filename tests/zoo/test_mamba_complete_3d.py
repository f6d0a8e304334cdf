"""3DMambaComplete's card: tokens and where they lie, restyled patches, the direction of Mamba, and learning."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data import completion
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.registry import variable_shapes
from zoo.spatial.mamba_complete_3d import EncoderBlock, MambaStack, Patches, sample
from zoo.tasks import point_completion

KEY = jax.random.key(3)
PAPER = zoo.paper("mamba_complete_3d")


def noisy(shapes):
    """Variables of these shapes, away from zeros and symmetries; nothing is compiled for them."""
    rng = np.random.default_rng(4)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "D", "var") else 0.0
        drawn = rng.normal(centre, 0.3, leaf.shape).astype(leaf.dtype)
        return jnp.asarray(np.abs(drawn) if path[-1].key == "var" else drawn)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def unbiased(rng):
    """Draws weights of unit gain without a program of their own: to start from in training."""

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return jnp.asarray(rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape), leaf.dtype)
        return (jnp.ones if path[-1].key in ("scale", "var", "D") else jnp.zeros)(leaf.shape, leaf.dtype)

    return draw


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("mamba_complete_3d", "tiny")
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    variables = noisy(variable_shapes(PAPER, model))
    outputs, captured = jax.jit(lambda v, b: model.apply(v, b, mutable="intermediates"))(variables, batch)
    return model, batch, variables, outputs, captured["intermediates"]


def test_blocks_of_the_paper_see_128_and_16_more_tokens_each():
    shapes = variable_shapes(PAPER, zoo.create("mamba_complete_3d", "pcn"))["params"]
    seen = [shapes[f"encoder_{i}"]["generate_0"]["kernel"].shape[0] for i in range(8)]
    assert seen == [128 + 16 * i for i in range(8)]
    assert PAPER.configs["pcn"].queries == 256
    assert shapes["spread_out"]["kernel"].shape[1] == 3 * 128
    assert sum("A_log" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)) == 84


def test_sampled_tokens_stay_exactly_where_they_were_seen(setting):
    model, batch, _, outputs, _ = setting
    c = model.config
    coarse = np.asarray(outputs["coarse"])
    assert coarse.shape == (3, 2 * c.queries, 3)
    for cloud, kept, present in zip(batch["x"], coarse, batch["point_mask"], strict=True):
        real = {tuple(p) for p in np.asarray(cloud[present]).tolist()}
        for point in (*kept[: c.tokens].tolist(), *kept[c.queries :].tolist()):
            assert tuple(point) in real
        assert not any(tuple(p) in real for p in kept[c.tokens : c.queries].tolist())


def test_the_official_sampling_leaves_out_what_is_near_the_origin(setting):
    c = setting[0].config
    place = jax.random.normal(KEY, (1, 10, 3)).at[:, 4].set(0.015).at[:, 7:].set(0.0)
    present = jnp.arange(10)[None] < 7
    chosen = {
        masked: set(sample(dataclasses.replace(c, mask_padding=masked), place, present, 9)[0].tolist())
        for masked in (True, False)
    }
    assert chosen == {True: {0, 1, 2, 3, 4, 5, 6}, False: {0, 1, 2, 3, 5, 6}}


def test_new_places_are_weighted_means_of_those_there_are(setting):
    model, _, variables, outputs, captured = setting
    c = model.config
    between = np.asarray(captured["encoder_0"]["between"][0])
    place = np.asarray(outputs["coarse"])[:, : c.tokens]
    # In the convex hull: no direction reaches farther than the tokens do.
    directions = np.random.default_rng(0).normal(size=(200, 3))
    assert np.all(np.einsum("bad,kd->bak", between, directions).max(1) <= (place @ directions.T).max(1) + 1e-4)
    block = EncoderBlock(c)
    x, places = jax.random.normal(KEY, (1, c.tokens, c.d_model)), jax.random.normal(KEY, (1, c.tokens, 3))
    zeros = jax.tree.map(jnp.zeros_like, variables["params"]["encoder_0"])
    same = {"params": zeros, "batch_stats": variables["batch_stats"]["encoder_0"]}
    apply = jax.jit(partial(block.apply, train=False, mutable="intermediates"))
    _, found = apply(same, x, places)
    expected = jnp.broadcast_to(jnp.mean(places, axis=1, keepdims=True), (1, c.added, 3))
    chex.assert_trees_all_close(found["intermediates"]["between"][0], expected, atol=1e-6)


def test_a_patch_is_the_grid_restyled_by_explicit_statistics(setting):
    c = setting[0].config
    patches = Patches(c)
    style, local = jax.random.normal(KEY, (2, c.d_model)), jax.random.normal(KEY, (2, 4, c.d_model))
    shapes = jax.eval_shape(lambda key: patches.init(key, style, local, train=False), KEY)
    variables = noisy(shapes)
    ours = jax.jit(partial(patches.apply, train=False))(variables, style, local)
    p, s = (jax.tree.map(lambda v: np.asarray(v, np.float64), variables[k]) for k in ("params", "batch_stats"))

    def dense(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    scale = dense(np.maximum(dense(np.asarray(style), "scale_hidden"), 0), "scale_out")
    shift = dense(np.maximum(dense(np.asarray(local), "shift_hidden"), 0), "shift_out")
    line = np.linspace(-1, 1, c.side)
    grid = np.array([(a, b) for b in line for a in line])
    widths, start = (c.patch_width, c.patch_width // 2, c.patch_width // 4), 0
    for b, q in np.ndindex(2, 4):
        x, start = grid, 0
        for i, width in enumerate(widths):
            x = dense(x, f"conv_{i}")
            x = (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5)
            if i == 0:  # with scale 1 and shift 0: no mean, unit variance
                assert np.abs(x.mean(0)).max() < 1e-9
                np.testing.assert_allclose(np.median(x.var(0)), 1, rtol=1e-3)
            x = scale[b, start : start + width] * x + shift[b, q, start : start + width]
            norm, seen = p[f"norm_{i}"], s[f"norm_{i}"]
            x = norm["scale"] * (x - seen["mean"]) / np.sqrt(seen["var"] + 1e-5) + norm["bias"]
            x, start = np.maximum(x, 0), start + width
        np.testing.assert_allclose(ours[b, q], np.tanh(dense(x, "conv_3")), atol=1e-5)


def test_mamba_runs_one_way_along_the_tokens(setting):
    model, _, variables, _, _ = setting
    mixer = MambaStack(model.config)
    mine = {"params": variables["params"]["encoder_0"]["mamba"]}
    x = jax.random.normal(KEY, (1, 12, model.config.d_model))
    apply = jax.jit(mixer.apply)
    before, after = (apply(mine, v) for v in (x, x.at[:, 7].set(-x[:, 7])))
    chex.assert_trees_all_close(before[:, :7], after[:, :7], atol=1e-6)
    assert float(jnp.min(jnp.max(jnp.abs(before - after)[0, 7:], axis=-1))) > 1e-3


def test_mamba_starts_as_all_linear_layers_do():
    params = jax.jit(MambaStack(PAPER.configs["tiny"]).init)(KEY, jnp.zeros((1, 4, 48)))["params"]
    mixer = params["layers_0"]["mixer"]
    assert not np.any(mixer["dt_proj"]["bias"])  # softplus(0) = 0.69
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert float(jnp.std(mixer[name]["kernel"])) == pytest.approx(0.02, rel=0.15)


def test_metrics_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    made, truth = rng.normal(size=(2, 30, 3)) / 80, rng.normal(size=(2, 20, 3)) / 80
    present = np.arange(30) < np.array([[30], [11]])
    outputs = {"points": jnp.asarray(made, jnp.float32), "points_mask": jnp.asarray(present)}
    found = point_completion.metrics(outputs, {"y": jnp.asarray(truth, jnp.float32)})
    for i in range(2):
        d = np.linalg.norm(made[i, present[i]][:, None] - truth[i][None], axis=-1)
        there, back = d.min(1), d.min(0)
        precision, recall = (there < 0.01).mean(), (back < 0.01).mean()
        assert 0 < precision < 1
        np.testing.assert_allclose(found["cd_l1"][i], 500 * (there.mean() + back.mean()), rtol=1e-4)
        np.testing.assert_allclose(found["cd_l2"][i], 1000 * ((there**2).mean() + (back**2).mean()), rtol=1e-4)
        np.testing.assert_allclose(found["f_score"][i], 2 * precision * recall / (precision + recall), rtol=1e-4)


def test_the_loss_adds_both_distances_and_the_penalty(setting):
    _, batch, _, outputs, _ = setting
    plain = {k: outputs[k] for k in ("points", "coarse")}
    whole, parts = (float(PAPER.compute_loss(o, batch)[0]) for o in (outputs, plain))
    assert whole == pytest.approx(parts + float(jnp.mean(outputs["penalty"])), rel=1e-5)
    assert float(jnp.min(outputs["penalty"])) > 0


def test_learns_to_half_of_its_first_distance_and_below_what_was_seen(monkeypatch):
    monkeypatch.setattr(completion, "_COUNTS", {"train": 320, "valid": 32, "test": 4})
    recipe = recipe_for("mamba_complete_3d")
    # The smallest of its kind; what is learned first is where a body is at all, and how large.
    small = dataclasses.replace(
        recipe.model, num_points=48, num_targets=64, sampled=24, tokens=12, added=4, predicted=64, d_model=24,
        global_width=48, penalty_weights=(0.0, 0.0),
    )  # fmt: skip
    prepared = prepare(
        dataclasses.replace(
            recipe,
            model=small,
            mesh="data=1",
            log_every=60,
            batch_size=16,
            epochs=3,
            optimizer=dataclasses.replace(recipe.optimizer, learning_rate=5e-3),
        )
    )
    split, program = prepared.splits.valid, prepared.program
    shapes = variable_shapes(PAPER, PAPER.model(small))
    start = jax.tree_util.tree_map_with_path(unbiased(np.random.default_rng(0)), shapes)
    state = program.begin(start.pop("params"), start)

    def measure(state):
        return program.score(state.variables, split.batch(np.arange(32)), np.ones(32, bool))

    before = measure(state)
    order = np.concatenate([epoch_order(0, epoch, 320) for epoch in range(3)])
    state, _ = program.run(state, prepared.splits.train, order, 0, 60)
    after = measure(state)
    assert float(after["cd_l1"]) < 0.5 * float(before["cd_l1"])
    assert float(after["cd_l1"]) < 0.95 * float(after["as_seen/cd_l1"])
