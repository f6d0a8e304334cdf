"""ALDA4Rec: what the paper's mechanism implies."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
import zoo
from tests.weights import drawn
from trainers.data import load_recommendation
from trainers.feed import epoch_order
from trainers.loop import prepare
from trainers.recipe import recipe_for
from zoo.recommendation.alda4rec import (
    Config,
    SelfAttention,
    denoised_weights,
    interval_graphs,
    item_similarity,
    louvain,
    normalized_graphs,
    propagate,
    similar_pairs,
)

KEY = jax.random.key(5)
PAPER = zoo.paper("alda4rec")
SMALL = {
    "num_users": 9,
    "num_items": 12,
    "num_intervals": 3,
    "history": 6,
    "hidden_dim": 8,
    "num_heads": 2,
    "dropout_rate": 0.0,
}


def spread(variables):
    """The same parameters moved away from zeros and ones."""
    rng = np.random.default_rng(5)
    move = lambda v: jnp.asarray(v + 0.3 * rng.normal(size=v.shape), jnp.float32)  # noqa: E731
    return dict(variables) | {"params": jax.tree.map(move, jax.device_get(variables["params"]))}


@pytest.fixture(scope="module")
def setting():
    model = zoo.create("alda4rec", **SMALL)
    batch = PAPER.example(model.config, batch_size=4, key=KEY)
    return model, batch, spread(drawn(PAPER, model)), jax.jit(model.apply)


class TestPropagation:
    graph = (np.random.default_rng(0).random((2, 4, 5)) < 0.4).astype(np.float32)

    def test_equals_sums_over_edges(self):
        users, items = jax.random.normal(KEY, (2, 4, 3)), jax.random.normal(KEY, (2, 5, 3))
        ours = propagate(jnp.asarray(self.graph), users, items, layers=2, slope=0.5)
        for t in range(2):
            rows, columns = (jnp.asarray(i) for i in np.nonzero(self.graph[t]))
            u, v = users[t], items[t]
            total_u, total_v = u, v
            for _ in range(2):
                to_u = layers.segment_reduce(v[columns], rows, num_segments=4)
                to_v = layers.segment_reduce(u[rows], columns, num_segments=5)
                u, v = (jnp.where(m > 0, m, 0.5 * m) + x for m, x in ((to_u, u), (to_v, v)))
                total_u, total_v = total_u + u, total_v + v
            chex.assert_trees_all_close((ours[0][t], ours[1][t]), (total_u, total_v), atol=1e-5)

    def test_weights_matter_only_where_they_are_meant_to(self):
        rng = np.random.default_rng(1)
        taken = [[user, item, 0, time] for user in range(6) for time, item in enumerate(rng.permutation(12)[:5])]
        rows = np.array(taken)
        plain = Config(num_users=6, num_items=12, num_intervals=1, augment=False)
        heavy = dataclasses.replace(plain, noise_weight=0.1)
        light = dataclasses.replace(heavy, noise_weight=0.9)
        as_code = [normalized_graphs(interval_graphs(rows, c), c) for c in (heavy, light)]
        assert np.array_equal(*as_code)
        assert set(np.unique(as_code[0])) == {0.0, 1.0}
        intents = [dataclasses.replace(c, use_edge_weights=True) for c in (heavy, light)]
        graphs = [interval_graphs(rows, c) for c in intents]
        assert np.array_equal(graphs[0].linked, graphs[1].linked)
        assert not np.array_equal(graphs[0].weights, graphs[1].weights)
        degrees = [np.sqrt(np.outer(g.weights[0].sum(1), g.weights[0].sum(0))) for g in graphs]
        for g, c, d in zip(graphs, intents, degrees, strict=True):
            np.testing.assert_allclose(normalized_graphs(g, c)[0] * d, g.weights[0], rtol=1e-5)


class TestGraphs:
    """Two users, six items: [0, 1, 2] and [1, 2] first, then [3, 4] and nothing."""

    rows = np.array(
        [[0, 0, 0, 1], [0, 1, 0, 2], [0, 2, 0, 3], [1, 1, 0, 5], [1, 2, 0, 8], [0, 3, 1, 11], [0, 4, 1, 12]]
    )
    config = Config(num_users=2, num_items=6, num_intervals=2)

    def test_similarities_are_those_worked_out_by_hand(self):
        found = item_similarity([np.array([0, 1, 2]), np.array([1, 2])], 6, threshold=0.0)
        expected = np.zeros((6, 6))
        expected[0, 1], expected[0, 2], expected[1, 2] = 6 / 31, 1 / 7, 3 / 13
        np.testing.assert_allclose(found, expected + expected.T, rtol=1e-12)

    def test_rare_transitions_can_be_dropped(self):
        found = item_similarity([np.array([0, 1, 2]), np.array([1, 2])], 6, threshold=0.5)
        # 1 -> 0 happens in a third of the moves from 1 and is gone; 0 -> 1 always, and stays.
        transitions = np.eye(6)
        transitions[0, 1], transitions[1, 2], transitions[2, 1] = 1, 2 / 3, 1
        products = transitions @ transitions.T
        assert found[0, 1] == pytest.approx(products[0, 1] / (products[0].sum() + products[:, 1].sum() - 2))

    def test_pairs_lie_above_the_threshold(self):
        similarity = interval_graphs(self.rows, self.config).similarity[0]
        assert set(zip(*np.nonzero(similar_pairs(similarity, 0.1)), strict=True)) == {(0, 1), (1, 0), (1, 2), (2, 1)}
        assert set(zip(*np.nonzero(similar_pairs(similarity, 0.7)), strict=True)) == {(1, 2), (2, 1)}

    def test_edges_to_similar_items_are_added(self):
        graphs = interval_graphs(self.rows, self.config)
        assert np.array_equal(graphs.linked[0, :, :3], [[1, 1, 1], [1, 1, 1]])
        assert graphs.weights[0, 1, 0] == pytest.approx((6 / 31) / (3 / 13))  # from item 1, scaled by the largest
        assert np.array_equal(graphs.weights[0, 0, :3], [1, 1, 1])
        without = interval_graphs(self.rows, dataclasses.replace(self.config, augment=False))
        assert np.array_equal(without.linked[0, :, :3], [[1, 1, 1], [0, 1, 1]])
        assert (graphs.linked >= without.linked).all()

    def test_who_is_away_inherits_from_the_interval_before_and_no_other(self):
        later = [[0, item, t, item] for t in (1, 2) for item in (1, 3, 4)]
        config = dataclasses.replace(self.config, num_intervals=3)
        graphs = interval_graphs(np.concatenate([self.rows[:5], later]), config)
        # Item 3 is like 1 and 4; user 1 had 1 and 2 in the first interval, and nothing in the others.
        assert np.flatnonzero(graphs.linked[1, 1]).tolist() == [3]
        assert graphs.weights[1, 1, 3] == pytest.approx(1.0)
        assert not graphs.linked[2, 1].any()

    def test_the_denoised_edges_are_those_outside_communities(self):
        # Items 0 and 1 are like 5, 2 and 3 are like 6, 4 is like nothing.
        similarity = np.zeros((7, 7))
        similarity[[0, 1, 2, 3], [5, 5, 6, 6]] = similarity[[5, 5, 6, 6], [0, 1, 2, 3]] = 1.0
        config = Config(num_items=7)
        assert np.array_equal(denoised_weights(np.array([0, 2, 4]), similarity, config), [0.5, 0.5, 0.5])
        items = np.array([4, 0, 1, 2, 3])
        assert np.array_equal(denoised_weights(items, similarity, config), [0.5, 1, 1, 1, 1])
        # The code takes the local number of the lonely item, 0, for a global one.
        mistaken = dataclasses.replace(config, official_denoising=True)
        assert np.array_equal(denoised_weights(items, similarity, mistaken), [1, 0.5, 1, 1, 1])


class TestLouvain:
    def modularity(self, weights, community):
        degree, total = weights.sum(1), weights.sum()
        same = community[:, None] == community
        return np.sum(same * (weights - np.outer(degree, degree) / total)) / total

    def test_finds_two_cliques(self):
        weights = np.kron(np.eye(2), np.ones((4, 4))) - np.eye(8)
        weights[3, 4] = weights[4, 3] = 1.0
        found = louvain(weights)
        assert len(set(found[:4])) == len(set(found[4:])) == 1
        assert found[0] != found[7]

    @pytest.mark.parametrize("seed", range(5))
    def test_comes_close_to_the_best_of_all_partitions(self, seed):
        rng = np.random.default_rng(seed)
        weights = rng.random((6, 6)) * (rng.random((6, 6)) < 0.6)
        weights = weights + weights.T
        best = max(self.modularity(weights, np.array(p)) for p in itertools.product(range(4), repeat=6))
        assert self.modularity(weights, louvain(weights)) >= best - 0.03

    def test_no_edges_leave_everyone_alone(self):
        assert len(set(louvain(np.zeros((4, 4))))) == 4


class TestAttention:
    def test_one_token_is_its_value(self):
        x = jax.random.normal(KEY, (3, 1, 8))
        module = SelfAttention(2, 1e-8)
        variables = spread(module.init(KEY, x))
        p = variables["params"]["value"]
        chex.assert_trees_all_close(module.apply(variables, x), x @ p["kernel"] + p["bias"], atol=1e-6)

    def test_is_softmax_for_moderate_scores(self):
        x = jax.random.normal(KEY, (3, 5, 8))
        module = SelfAttention(2, 1e-8)
        variables = spread(module.init(KEY, x))
        p = variables["params"]
        q, k, v = ((x @ p[n]["kernel"] + p[n]["bias"]).reshape(3, 5, 2, 4) for n in ("query", "key", "value"))
        expected = layers.dot_product_attention(q, k, v, implementation="reference").reshape(3, 5, 8)
        chex.assert_trees_all_close(module.apply(variables, x), expected, atol=1e-5)


def test_the_gate_mixes_short_and_long(setting):
    _, batch, variables, apply = setting
    outputs = apply(variables, batch)
    gate = outputs["gate"]
    assert gate.shape == (4,)
    assert ((gate > 0) & (gate < 1)).all()
    for bias, part in ((-200.0, "short"), (200.0, "long")):
        last = {"kernel": jnp.zeros((4, 1)), "bias": jnp.array([bias])}
        params = variables["params"] | {"gate": variables["params"]["gate"] | {"fc3": last}}
        extreme = apply(dict(variables) | {"params": params}, batch)
        chex.assert_trees_all_close(extreme["scores"], extreme[part], atol=1e-6)


def test_the_loss_turns_the_gate_round_unless_told_not_to(setting):
    model, batch, variables, apply = setting
    gate, c = apply(variables, batch)["gate"], model.config

    def expected(outputs, for_short, for_long):
        hinge = lambda s: np.mean(np.maximum(1 - (s[:, :1] - s[:, 1:]), 0), axis=1)  # noqa: E731
        parts = (outputs[k] for k in ("short", "long"))
        short, long = (hinge(g[:, None] * s) for g, s in zip((for_short, for_long), parts, strict=True))
        return (1 - c.long_share) * short, c.long_share * long

    as_code = apply(variables, batch)
    chex.assert_trees_all_close(
        (as_code["loss_short"], as_code["loss_long"]), expected(as_code, gate, 1 - gate), rtol=1e-5
    )
    consistent = zoo.create("alda4rec", **SMALL, consistent_gate=True).apply(variables, batch)
    chex.assert_trees_all_close(
        (consistent["loss_short"], consistent["loss_long"]), expected(consistent, 1 - gate, gate), rtol=1e-5
    )


def test_the_order_of_a_history_does_not_matter_and_its_length_does(setting):
    _, batch, variables, apply = setting
    items = jnp.array([[0, 0, 3, 5, 7, 2]] * 4)
    scores = apply(variables, batch | {"items": items})["scores"]
    swapped = apply(variables, batch | {"items": items[:, jnp.array([0, 1, 5, 3, 4, 2])]})["scores"]
    chex.assert_trees_all_close(swapped, scores, atol=1e-5)
    longer = apply(variables, batch | {"items": items.at[:, 1].set(3)})["scores"]
    assert not np.allclose(longer, scores, atol=1e-3)


def test_users_and_items_can_be_renumbered(setting):
    _, batch, variables, apply = setting
    users, items = np.random.default_rng(1).permutation(9), np.random.default_rng(2).permutation(12)
    params = dict(variables["params"])
    params["user_table"] = params["user_table"][:, np.argsort(users)]
    params["item_table"] = params["item_table"][:, np.argsort(items)]
    graph = variables["constants"]["graph_table"][:, np.argsort(users)][:, :, np.argsort(items)]
    number = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.asarray(items) + 1])
    renamed = (
        batch | {k: number[batch[k]] for k in ("items", "candidates")} | {"user": jnp.asarray(users)[batch["user"]]}
    )
    found = apply({"params": params, "constants": {"graph_table": graph}}, renamed)
    chex.assert_trees_all_close(found, apply(variables, batch), atol=1e-5)


def test_undated_data_is_refused():
    data = dataclasses.replace(load_recommendation("standin", data_dir=None, history=5, num_items=48), times=None)
    with pytest.raises(zoo.UserError, match="this data set has no dates"):
        PAPER.constants(PAPER.config(), data)


def hits(run, state, chosen):
    split = run.splits.test
    batch = split.batch(jnp.arange(len(split)))
    scores = run.program.forward(state.variables, batch)["scores"]
    above = np.asarray(jnp.sum(scores[:, 1:] >= scores[:, :1], axis=1))
    popular = -batch["candidates"]
    popular_above = np.asarray(jnp.sum(popular[:, 1:] >= popular[:, :1], axis=1))
    return np.mean(above[chosen] < 5), np.mean(popular_above[chosen] < 5)


def test_learns_and_augmentation_helps_whom_the_last_interval_does_not_know():
    run = prepare(dataclasses.replace(recipe_for("alda4rec"), log_every=64, mesh="data=1"))
    config = run.model.config
    data = load_recommendation("standin", data_dir=None, history=config.history, num_items=config.num_items)
    plain = PAPER.constants(dataclasses.replace(config, augment=False), data)

    def trained(constants):
        state = run.program.init()
        state = state.replace(
            collections=state.collections | {"constants": constants or state.collections["constants"]}
        )
        for part in range(5):
            state, _ = run.program.run(state, run.splits.train, epoch_order(0, part, len(run.splits.train)), 0, 64)
        return state

    augmented = trained(None)
    everyone = np.arange(len(run.splits.test))
    found, popular = hits(run, augmented, everyone)
    assert found > 2 * popular
    empty = np.flatnonzero(~plain["graph_table"][-1].any(axis=1))
    assert len(empty) > 50
    without = trained(jax.tree.map(jnp.asarray, plain))
    assert hits(run, augmented, empty)[0] > hits(run, without, empty)[0]
