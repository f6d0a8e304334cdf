"""Pairs of knowledge graphs: what is counted, the lists of pairs, the stand-in, and what is refused."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parity.harness import load_case
from tests.parity.test_parity import KEPT
from trainers.data.alignment import GraphPair, alignment_standin, graph_features, load_alignment


def dense(index, value, shape):
    table = np.zeros(shape)
    table[index[:, 0], index[:, 1]] = value
    return table


@pytest.mark.parametrize("case", ["open_a", "open_b"])
def test_counts_are_the_official_ones(case):
    arrays = load_case(KEPT / "rctea" / f"{case}.npz").group("input")
    n, *widths = (int(size) for size in arrays["sizes"])
    facts = (arrays["triples_1"], arrays["triples_2"])
    pair = GraphPair(facts, np.array([[0, n - 2]]), np.zeros((0, 2), int), np.zeros((0, 2), int))
    assert (pair.num_entities, pair.num_relations) == (n, widths[0])
    features = graph_features(pair)
    np.testing.assert_array_equal(features["edges"], arrays["adj_matrix"])
    # The official loop stops at the number of entities that have facts: the last ones' times are left out there.
    counted = len(np.unique(np.concatenate([f[:, [0, 2]] for f in facts])))
    intervals = {tuple(pair): i for i, pair in enumerate(arrays["intervals"].tolist())}
    columns = {
        "entity": np.arange(n),
        "relation": np.arange(widths[0]),
        "time": np.arange(widths[1]),
        "interval": np.array([intervals[tuple(pair)] for pair in features["intervals"].tolist()]),
    }
    for name, theirs in (("entity", "ent"), ("relation", "rel"), ("time", "time"), ("interval", "time_int")):
        width = {"entity": n, "relation": widths[0], "time": widths[1], "interval": widths[2]}[name]
        index = features[f"{name}_index"]
        ours = dense(np.stack([index[:, 0], columns[name][index[:, 1]]], 1), features[f"{name}_value"], (n, width))
        expected = dense(arrays[f"{theirs}_matrix"], arrays[f"{theirs}_val"], (n, width))
        rows = n if name in ("entity", "relation") else counted
        np.testing.assert_allclose(ours[:rows], expected[:rows], atol=1e-6)
        # In no graph, and yet with a count of everything but relations.
        assert (ours[-1].sum() > 0.9) == (name != "relation")


def test_the_stand_in_is_a_function_of_its_seed():
    first, again, other = (alignment_standin(seed, entities=30, facts=90) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.facts[1], again.facts[1])
    assert not np.array_equal(first.facts[0], other.facts[0])
    np.testing.assert_array_equal(np.sort(first.pairs[:, 0]), np.arange(30))
    np.testing.assert_array_equal(np.sort(first.pairs[:, 1]), np.arange(30, 60))
    share = len(first.facts[1]) / len(first.facts[0])
    assert 0.65 < share < 0.95
    assert (first.facts[1][:, 3] == 0).any()


def test_lists_of_pairs_hold_every_pair_once():
    config = zoo.paper("rctea").config("tiny")
    data = load_alignment("standin", data_dir=None, config=config, batch_pairs=16)
    sizes = [int(jnp.sum(part.pair_mask)) for part in (data.train, data.valid, data.test)]
    assert sizes == [40, 40, 120]
    assert len(data.train) == 3
    places = np.asarray(data.train.pairs)[np.asarray(data.train.pair_mask)]
    np.testing.assert_array_equal(np.sort(places[:, 0]), np.arange(40))
    batch = data.train.batch(jnp.array([1, 0]))
    chex.assert_shape(batch["pairs"], (2, 16, 2))
    chex.assert_shape(batch["edges"], (2, None, 2))
    edges = np.asarray(batch["edges"][0])
    assert (np.diff(edges[:, 0]) >= 0).all()
    links = np.asarray(batch["source_links"][0])
    assert 0 <= links.min() <= links.max() < batch["sources"].shape[1]


@pytest.mark.parametrize(
    ("name", "data_dir", "fields", "message"),
    [
        ("beta", None, {}, "no pair of graphs is called 'beta'; did you mean 'beta_kg'"),
        ("standin", "somewhere", {}, "the stand-in is generated and takes no --data-dir"),
        ("standin", None, {"num_times": 3}, "choose the --config of this set"),
    ],
)
def test_what_does_not_fit_is_refused(name, data_dir, fields, message):
    with pytest.raises(zoo.UserError, match=message):
        load_alignment(name, data_dir=data_dir, config=zoo.paper("rctea").config("tiny", **fields))
