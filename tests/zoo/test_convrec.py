"""ConvRec: what the paper's mechanism implies."""

import dataclasses
import math
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import zoo
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.recommendation.convrec import Config, MultiHeadConv, PyramidLevel, StdNorm, left_padding, windows
from zoo.registry import variable_shapes

KEY = jax.random.key(5)
PAPER = zoo.paper("convrec")


def spread(variables):
    """The same variables moved away from zeros and ones."""
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda v: jnp.asarray(v + 0.3 * rng.normal(size=v.shape), jnp.float32), jax.device_get(variables)
    )


def fresh(module, *inputs, **options):
    """Its variables on these inputs, made in one compiled call."""
    return jax.jit(lambda *a: module.init(KEY, *a, **options))(*inputs)


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("convrec")
    batch = PAPER.example(model.config, batch_size=3, key=KEY)
    return model, batch, spread(fresh(model, batch)), jax.jit(model.apply)


def std_norm(x, scale, bias):
    return scale * (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-6) + bias


class TestNorm:
    def test_divides_by_the_standard_deviation_of_a_sample(self):
        inputs = 3 + 2 * jax.random.normal(KEY, (5, 4))
        norm, x = StdNorm(1e-6), np.asarray(inputs)
        variables = spread(fresh(norm, inputs))
        expected = std_norm(x.astype(np.float64), *(np.asarray(variables["params"][n]) for n in ("scale", "bias")))
        np.testing.assert_allclose(norm.apply(variables, inputs), expected, rtol=1e-5, atol=1e-6)
        plain = norm.apply(fresh(norm, inputs), inputs)
        usual = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        np.testing.assert_allclose(plain, np.sqrt(3 / 4) * usual, rtol=1e-5, atol=1e-6)

    def test_the_epsilon_stands_outside_the_root(self):
        x = jnp.array([[1e-6, -1e-6]])  # its standard deviation is 1.4e-6, hardly more than epsilon
        norm = StdNorm(1e-6)
        expected = 1 / (np.sqrt(2) + 1)
        np.testing.assert_allclose(norm.apply(fresh(norm, x), x), [[expected, -expected]], rtol=1e-4)

    def test_equal_entries_have_a_finite_gradient(self):
        norm = StdNorm(1e-6)
        variables = fresh(norm, jnp.ones((1, 4)))
        chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(norm.apply(variables, x) ** 2))(jnp.ones((1, 4))))


class TestPyramid:
    @pytest.mark.parametrize(
        ("length", "pads", "lengths"),
        [
            (35, (1, 2, 3), (18, 4, 1)),
            (50, (0, 0, 2), (25, 5, 1)),
            (75, (1, 2, 6), (38, 8, 2)),
            (3, (1, 3, 6), (2, 1, 1)),
        ],
    )
    def test_lengths_and_padding(self, length, pads, lengths):
        for (kernel, stride), before, after in zip(Config().convolutions, pads, lengths, strict=True):
            assert left_padding(length, kernel, stride) == before
            shape = jax.eval_shape(lambda x, k=kernel, s=stride: windows(x, k, s), jnp.ones((1, length + before, 4)))
            length = shape.shape[1]
            assert length == after

    @pytest.mark.parametrize("length", [35, 3])
    def test_every_level_equals_a_loop_over_windows(self, length):
        config = Config(hidden_dim=8, num_heads=2, dropout_rate=0.0)

        class Pyramid(nn.Module):
            @nn.compact
            def __call__(self, x):
                first, found = x, []
                for kernel, stride in config.convolutions:
                    x, first = PyramidLevel(config, kernel, stride)(x, first, train=False)
                    found.append((x, first))
                return found

        x = first = np.random.default_rng(0).normal(size=(2, length, 8))
        inputs = jnp.asarray(x, jnp.float32)
        variables = spread(fresh(Pyramid(), inputs))
        for i, found in enumerate(jax.jit(Pyramid().apply)(variables, inputs)):
            kernel, stride = config.convolutions[i]
            p = flatten_dict(variables["params"][f"PyramidLevel_{i}"], sep="/")
            before = left_padding(x.shape[1], kernel, stride)
            x, first = (np.concatenate([np.zeros((2, before, 8)), a], axis=1) for a in (x, first))
            stretches = [slice(start, start + kernel) for start in range(0, x.shape[1] - kernel + 1, stride)]
            pooled, first = (np.stack([a[:, s].mean(1) for s in stretches], axis=1) for a in (x, first))
            w, b = p["heads/kernel"], p["heads/bias"]
            heads = []
            for g in range(2):
                own = slice(4 * g, 4 * g + 4)
                parts = [np.einsum("bki,kio->bo", x[:, s, own], w[..., own]) + b[own] for s in stretches]
                heads.append(np.stack(parts, axis=1))
            y = np.concatenate(heads, -1) @ p["heads/out/kernel"] + p["heads/out/bias"]
            y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
            y = y + p["near_weight"] * pooled + p["far_weight"] * first
            x = std_norm(y, p["norm/scale"], p["norm/bias"])
            np.testing.assert_allclose(found[0], x, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found[1], first, rtol=1e-4, atol=1e-5)

    def test_without_convolutions_norms_of_summed_poolings_are_left(self):
        config = Config(hidden_dim=8, num_heads=2)
        x, first = jax.random.normal(KEY, (2, 2, 9, 8))
        level = PyramidLevel(config, 4, 3)
        variables = fresh(level, x, first, train=False)
        params = dict(variables["params"]) | {"heads": jax.tree.map(jnp.zeros_like, variables["params"]["heads"])}
        ours, _ = jax.jit(partial(level.apply, train=False))({"params": params}, x, first)
        total = np.pad(0.5 * (x + first), ((0, 0), (left_padding(9, 4, 3), 0), (0, 0)))
        pooled = np.stack([total[:, s : s + 4].mean(1) for s in range(0, total.shape[1] - 3, 3)], axis=1)
        np.testing.assert_allclose(ours, std_norm(pooled, 1.0, 0.0), rtol=1e-4, atol=1e-5)

    def test_as_many_heads_as_channels_are_one_kernel_a_channel(self):
        x = jax.random.normal(KEY, (2, 6, 4))
        module = MultiHeadConv(num_heads=4)
        variables = spread(fresh(module, windows(x, 3, 3)))
        p = variables["params"]
        own = jnp.stack([jnp.sum(x[:, s : s + 3] * p["kernel"][:, 0], axis=1) for s in (0, 3)], axis=1)
        expected = (own + p["bias"]) @ p["out"]["kernel"] + p["out"]["bias"]
        chex.assert_trees_all_close(module.apply(variables, windows(x, 3, 3)), expected, atol=1e-5)

    def test_every_item_of_the_history_matters(self, setting):
        model, batch, variables, _ = setting
        gradients = jax.jit(
            jax.grad(lambda c: jnp.sum(model.apply(variables, batch | {"contexts": c}) * jnp.arange(11)))
        )(batch["contexts"])
        present = np.asarray(batch["items"]) > 0
        assert (~present).any()
        assert (np.abs(gradients).max(-1)[present] > 1e-6).all()


def test_candidates_are_exchangeable_and_users_all_alike(setting):
    _, batch, variables, apply = setting
    order = jax.random.permutation(KEY, 11)
    permuted = {k: v[:, order] for k, v in batch.items() if k.startswith("candidate")}
    scores = apply(variables, batch)
    chex.assert_trees_all_close(apply(variables, batch | permuted), scores[:, order], atol=1e-5)
    chex.assert_trees_all_equal(apply(variables, batch | {"user": batch["user"] + 1}), scores)


def test_unknown_items_share_an_embedding_and_keep_their_attributes():
    model = zoo.create("convrec", num_known_items=40)
    batch = PAPER.example(model.config, batch_size=2, key=KEY)
    variables = spread(fresh(model, batch))
    apply, table = jax.jit(model.apply), variables["constants"]["encoder"]["attribute_table"]

    def score(item, table):
        constants = {"encoder": {"attribute_table": table}}
        return apply(variables | {"constants": constants}, batch | {"candidates": jnp.full((2, 1), item)} | one)

    one = {"candidate_contexts": batch["candidate_contexts"][:, :1]}
    same = table.at[41].set(table[45]).at[39].set(table[45])
    chex.assert_trees_all_close(score(41, same), score(45, same), atol=1e-5)
    assert not np.allclose(score(41, table), score(45, table), atol=1e-3)
    assert not np.allclose(score(39, same), score(45, same), atol=1e-3)


def test_corruption_replaces_its_share_of_items_and_no_padding(setting):
    model, batch, variables, apply = setting
    corrupted = model.clone(config=dataclasses.replace(model.config, corruption_rate=0.3))
    items = jax.random.randint(KEY, (500, 16), 0, 49)
    run = corrupted.apply(variables, items, rngs={"dropout": KEY}, method="_corrupted")
    assert np.array_equal(run == 0, items == 0)
    assert np.mean(np.asarray(run != items)[np.asarray(items > 0)]) == pytest.approx(0.3 * 47 / 48, abs=0.02)
    assert int(run.max()) == 48
    train = jax.jit(lambda m, key: m.apply(variables, batch, train=True, rngs={"dropout": key}), static_argnums=0)
    assert not np.allclose(train(corrupted, KEY), apply(variables, batch), atol=1e-3)
    chex.assert_trees_all_close(train(model, KEY), apply(variables, batch), atol=1e-4)


def test_work_grows_linearly_with_the_history():
    def flops(history):
        model = zoo.create("convrec", history=history, num_items=5000)  # a catalogue larger than the batch
        batch = PAPER.example(model.config, batch_size=1, key=KEY)
        batch |= {k: v[:, :1] for k, v in batch.items() if k.startswith("candidate")}
        variables = jax.eval_shape(model.init, KEY, batch)
        return jax.jit(model.apply).lower(variables, batch).cost_analysis()["flops"]

    # Weights are multiplied with each other once, however long the history is: what twice the history adds doubles.
    assert (flops(4096) - flops(2048)) / (flops(2048) - flops(1024)) == pytest.approx(2.0, rel=0.03)
    assert np.log2(flops(1024) / flops(64)) / 4 < 1.05


@pytest.mark.parametrize(("heads", "used", "unread"), [(1, 4_923_916, 269_569), (4, 4_235_788, 269_569)])
def test_sizes_are_the_official_ones(heads, used, unread):
    config = Config(num_heads=heads, num_users=7)
    shapes = variable_shapes(PAPER, PAPER.model(config))
    sizes = {k: v.size for k, v in flatten_dict(shapes, sep="/").items() if not k.endswith(("embedding", "table"))}
    assert sum(n for k, n in sizes.items() if k.startswith("params")) == used
    assert sum(n for k, n in sizes.items() if k.startswith("unread")) == unread


def accuracies(run, state, *, contexts=1.0):
    """Shares of right brands, seasons and categories of the best of all items at the test moments."""
    batch = dict(run.splits.test.batch(jnp.arange(len(run.splits.test))))
    everything = jnp.broadcast_to(jnp.arange(1, 49), (len(run.splits.test), 48))
    moments = jnp.broadcast_to(batch["candidate_contexts"][:, :1], (*everything.shape, 6))
    asked = batch | {"candidates": everything, "candidate_contexts": moments * contexts}
    asked["contexts"] *= contexts
    best = 1 + jnp.argmax(run.program.forward(state.variables, asked), axis=-1)
    table = np.asarray(state.collections["constants"]["encoder"]["attribute_table"])
    same = table[best] * table[batch["candidates"][:, 0]]
    return {
        "category": same[:, :4].sum(1).mean(),
        "season": same[:, 4:6].sum(1).mean(),
        "brand": same[:, 6:].sum(1).mean(),
    }


def test_learns_brand_and_season_and_the_season_from_the_calendar():
    run = prepare(dataclasses.replace(recipe_for("convrec"), steps=480, log_every=60, mesh="data=1"))
    state = run.program.init()
    for part in range(5):
        state, _ = run.program.run(state, run.splits.train, epoch_order(0, part, len(run.splits.train)), 0, 60)
    found = accuracies(run, state)
    assert found["brand"] > 0.95
    assert found["season"] > 0.95
    blind = accuracies(run, state, contexts=0.0)
    assert blind["season"] < 0.7
