"""OPTNet's card: learned orders, who learns them, curves and patches; and that it learns."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from trainers.data import towns
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.registry import variable_shapes
from zoo.spatial.optnet import Config, Sorter, curve_codes, learned_orders, ordering_loss, roughness, unevenness
from zoo.tasks import point_segmentation
from zoo.tasks.point_segmentation import lovasz_softmax

KEY = jax.random.key(6)
PAPER = zoo.paper("optnet")


@pytest.fixture(scope="module")
def setting():
    """(model, batch, variables away from symmetries, jitted apply); three clouds of up to 60 points, patches of 16."""
    model = zoo.create("optnet", "tiny", num_points=60, encoder_patches=(16, 16), decoder_patches=(16,))
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    rng = np.random.default_rng(4)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "var") else 0.0
        drawn = rng.normal(centre, 0.2, leaf.shape).astype(leaf.dtype)
        return jnp.asarray(np.abs(drawn) if path[-1].key == "var" else drawn)

    variables = jax.tree_util.tree_map_with_path(draw, variable_shapes(PAPER, model))
    return model, batch, variables, jax.jit(model.apply)


def test_orders_are_permutations_of_each_cloud_with_padding_last(setting):
    _, batch, variables, apply = setting
    orders = np.asarray(learned_orders(apply(variables, batch)["scores"], batch["point_mask"]))
    scores = np.asarray(apply(variables, batch)["scores"])
    inverse = np.argsort(orders, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(inverse, orders, -1), np.broadcast_to(np.arange(60), orders.shape))
    for o, b in np.ndindex(orders.shape[:2]):
        count = int(batch["point_mask"][b].sum())
        assert set(orders[o, b, :count]) == set(range(count))
        assert np.all(np.diff(scores[b, orders[o, b, :count], o]) >= 0)


def test_points_may_come_in_any_order(setting):
    _, batch, variables, apply = setting
    order = jax.random.permutation(KEY, 60)
    turned = {k: v if k == "prior" else v[:, order] for k, v in batch.items()}
    before, after = (apply(variables, b)["logits"] for b in (batch, turned))
    there = batch["point_mask"][:, order, None]
    chex.assert_trees_all_close(jnp.where(there, after, 0), jnp.where(there, before[:, order], 0), atol=2e-5)


def test_constant_scores_are_smooth_and_uneven_and_a_ramp_is_even():
    present = jnp.ones((2, 50), bool)
    coord = jax.random.normal(KEY, (2, 50, 3))
    for level in (0.5, 0.2):
        scores = jnp.full((2, 50, 4), level)
        chex.assert_trees_all_equal(roughness(scores, coord, present, 8), jnp.zeros(2))
        ramp = np.linspace(0, 1, 400)
        assert float(unevenness(scores, present)) == pytest.approx(np.mean((level - ramp) ** 2), rel=1e-5)
    assert float(unevenness(jnp.full((2, 50, 4), 0.5), present)) == pytest.approx(1 / 12, rel=1e-2)
    ramp = jax.random.permutation(KEY, jnp.linspace(0, 1, 400)).reshape(2, 50, 4)
    assert float(unevenness(ramp, present)) < 1e-12


def test_the_ordering_loss_is_that_of_a_loop_and_padding_has_no_part():
    rng = np.random.default_rng(2)
    coord, scores = rng.normal(size=(2, 12, 3)), rng.random((2, 12, 2))
    counts, total = (12, 7), 0.0
    for b, count in enumerate(counts):
        for i in range(count):
            near = np.argsort(np.sum((coord[b, :count] - coord[b, i]) ** 2, axis=1))[:5]
            total += np.sum((scores[b, i] - scores[b, near]) ** 2)
    flat = np.sort(np.concatenate([scores[b, :count].ravel() for b, count in enumerate(counts)]))
    expected = total / flat.size + np.mean((flat - np.linspace(0, 1, flat.size)) ** 2)
    present = jnp.arange(12) < jnp.array(counts)[:, None]
    arrays = [jnp.asarray(v, jnp.float32) for v in (scores, coord)]
    rough = roughness(*arrays, present, 5)
    assert float(ordering_loss(rough, arrays[0], present)) == pytest.approx(expected, rel=1e-5)
    poisoned = jnp.where(present[..., None], arrays[1], jnp.nan)
    chex.assert_trees_all_close(roughness(arrays[0], poisoned, present, 5), rough)
    # Where a cloud has too few points, the official code takes the batch's last point for a neighbour.
    more = roughness(*arrays, present, 9, stray=arrays[0][1, 6]) - roughness(*arrays, present, 9)
    assert float(more[0]) == 0.0
    assert float(more[1]) == pytest.approx(2 * np.sum((scores[1, :7] - scores[1, 6]) ** 2), rel=1e-4)


def test_the_sorter_learns_from_the_ordering_alone(setting):
    model, batch, variables, _ = setting
    others = {k: v for k, v in variables.items() if k != "params"}

    def losses(params):
        outputs = model.apply({"params": params, **others}, batch)
        ordering = ordering_loss(outputs["rough"], outputs["scores"], batch["point_mask"])
        return jnp.stack([point_segmentation.loss(outputs, batch)[0], ordering])

    slopes = jax.jit(jax.jacrev(losses))(variables["params"])
    assert not any(np.any(v[0]) for v in jax.tree.leaves(slopes["sorter"]))
    assert np.any(slopes["sorter"]["dense_0"]["kernel"][1])
    rest = {k: v for k, v in slopes.items() if k != "sorter"}
    assert not any(np.any(v[1]) for v in jax.tree.leaves(rest))
    assert np.any(rest["stem"]["kernel"][0])


def test_codes_are_interleaved_bits_and_halved_by_three_of_them():
    cells = jax.random.randint(KEY, (1, 50, 3), 0, 16)
    z, turned, hilbert, _ = np.asarray(curve_codes(cells, 4, Config.curves))
    for code, swapped, (x, y, w) in zip(z[0], turned[0], np.asarray(cells[0]), strict=True):
        spread = [sum(((v >> bit) & 1) << (3 * bit) for bit in range(4)) for v in (x, y, w)]
        assert int(code) == 4 * spread[0] + 2 * spread[1] + spread[2]
        assert int(swapped) == 4 * spread[1] + 2 * spread[0] + spread[2]
    np.testing.assert_array_equal(z >> 3, np.asarray(curve_codes(cells >> 1, 3, ("z",)))[0])
    grid = jnp.asarray(np.stack(np.unravel_index(np.arange(512), (8, 8, 8)), -1)[None].astype(np.int32))
    along = np.asarray(grid[0])[np.argsort(np.asarray(curve_codes(grid, 3, ("hilbert",)))[0, 0])]
    assert np.all(np.abs(np.diff(along, axis=0)).sum(axis=1) == 1)
    assert len(set(hilbert[0].tolist())) == len({tuple(c) for c in np.asarray(cells[0]).tolist()})


def test_where_one_patch_holds_all_the_order_does_not_matter(setting):
    model, batch, variables, apply = setting
    scrambled = jax.tree.map(lambda v: v, variables)
    scrambled["params"]["sorter"] = jax.tree.map(lambda v: -v, variables["params"]["sorter"])
    assert not np.allclose(apply(variables, batch)["logits"], apply(scrambled, batch)["logits"], atol=1e-3)
    wide = model.clone(config=dataclasses.replace(model.config, encoder_patches=(64, 64), decoder_patches=(64,)))
    apply = jax.jit(wide.apply)
    chex.assert_trees_all_close(
        apply(variables, batch)["logits"], apply(scrambled, batch)["logits"], atol=2e-5, rtol=1e-5
    )


def test_learned_orders_wait_for_the_warm_up(setting):
    model, batch, variables, _ = setting
    still = dataclasses.replace(model.config, drop_path_rate=0.0)
    rows = jnp.tile(jnp.arange(4), (2, 1))
    turned = jax.tree.map(lambda v: v, variables)
    turned["params"]["sorter"]["dense_2"] = jax.tree.map(lambda v: -v, variables["params"]["sorter"]["dense_2"])
    apply = jax.jit(
        lambda v: model.clone(config=still).apply(v, batch, train=True, permutations=rows, mutable="batch_stats")[0]
    )

    def moved(steps):
        logits = []
        for tree in (variables, turned):
            tree = jax.tree.map(lambda v: v, tree)
            tree["batch_stats"]["sorter"]["norm_1"]["count"] = jnp.int32(steps)
            logits.append(apply(tree)["logits"])
        return float(jnp.max(jnp.abs(logits[0] - logits[1])))

    # Turning the scores round changes nothing before they are used.
    assert moved(still.warmup_steps - 1) == 0.0
    assert moved(still.warmup_steps) > 1e-3


def test_lovasz_is_the_jaccard_loss_of_hard_guesses():
    rng = np.random.default_rng(0)
    label, guess = rng.integers(0, 4, (2, 60))
    known = rng.random(60) < 0.8
    label[label == 3] = 2  # a class that is not there does not count
    expected = np.mean([
        1 - np.sum((label == k) & (guess == k) & known) / np.sum(((label == k) | (guess == k)) & known)
        for k in range(3)
    ])  # fmt: skip
    hard = jax.nn.one_hot(guess, 4)
    assert float(lovasz_softmax(hard, jnp.asarray(label), jnp.asarray(known))) == pytest.approx(expected, rel=1e-5)
    soft = jax.nn.softmax(jax.random.normal(KEY, (60, 4)))
    value, slope = jax.value_and_grad(lovasz_softmax)(soft, jnp.asarray(label), jnp.asarray(known))
    assert 0 < float(value) < 1
    assert not np.any(slope[~known])


def test_scores_of_a_whole_set_are_those_of_its_confusion():
    counts = np.array([[5, 1, 0], [2, 3, 0], [0, 0, 0]])
    scores = point_segmentation.summarise({"counts": counts, "examples": 2}, None)
    assert scores["iou_0"] == pytest.approx(5 / 8)
    assert scores["miou"] == pytest.approx((5 / 8 + 3 / 6) / 2)
    assert scores["accuracy"] == pytest.approx(8 / 11)


def test_a_sorter_alone_finds_a_smooth_and_even_order():
    config = Config(sorter_width=32)
    sorter, coord = Sorter(config), jax.random.uniform(KEY, (1, 256, 3))
    feat, present = jnp.zeros((1, 256, 6)), jnp.ones((1, 256), bool)
    variables = sorter.init(KEY, coord, feat, present, train=True)
    optimizer = optax.adam(1e-2)

    def loss(params):
        (scores, _), _ = sorter.apply(
            {**variables, "params": params}, coord, feat, present, train=True, mutable="batch_stats"
        )
        return ordering_loss(roughness(scores, coord, present, 16), scores, present), scores

    @jax.jit
    def learn(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(lambda p: loss(p)[0])(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0]
        return loss(params)[1]

    scores = learn(variables["params"])
    shuffled = jax.random.permutation(KEY, scores, axis=1)
    assert float(roughness(scores, coord, present, 16)[0]) < 0.5 * float(roughness(shuffled, coord, present, 16)[0])
    assert 0.2 < float(jnp.std(scores)) < 0.34  # a ramp's is 0.29


def test_learns_to_tell_things_apart(monkeypatch):
    monkeypatch.setattr(towns, "_COUNTS", {"train": 80, "valid": 24, "test": 4})
    recipe = recipe_for("optnet")
    small = dataclasses.replace(  # coarse voxels, one block a stage
        recipe.model, encoder_depths=(1, 1), encoder_widths=(8, 16),
        encoder_heads=(1, 2), decoder_widths=(8,), decoder_heads=(1,), sorter_width=8, warmup_steps=20,
    )  # fmt: skip
    prepared = prepare(dataclasses.replace(recipe, model=small, mesh="data=1", log_every=60, batch_size=4))
    order = np.concatenate([epoch_order(0, epoch, 80) for epoch in range(3)])
    state, _ = prepared.program.run(prepared.program.init(), prepared.splits.train, order, 0, 60)
    split = prepared.splits.valid.batch(np.arange(24))
    totals = prepared.program.score(state.variables, split, np.ones(24, bool))
    scores = point_segmentation.summarise(totals, None)
    assert scores["miou"] > 2 * point_segmentation.summarise({"counts": totals["commonest/counts"]}, None)["miou"]
