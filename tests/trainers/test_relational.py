"""Rows around a seed row before a moment; and the stand-in for a database."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from trainers.data.relational import SeedRows, StoredTable, load_rows, relational_standin, sample

NAN = np.nan
TABLES = [
    StoredTable("user", {"numerical": np.zeros((2, 1), np.float32)}, np.full(2, NAN)),
    StoredTable(
        "event",
        {"numerical": np.zeros((5, 1), np.float32)},
        np.array([1.0, 2.0, 3.0, 4.0, 2.5]),
        {"user": np.array([0, 0, 0, 0, 1]), "item": np.array([0, 1, 1, -1, 1])},
    ),
    StoredTable("item", {"numerical": np.zeros((2, 1), np.float32)}, np.full(2, NAN)),
]


def tokens(sampled, number):
    there = sampled["token_mask"][number]
    return [
        (int(t), int(r)) for t, r in zip(sampled["table"][number][there], sampled["row"][number][there], strict=True)
    ]


def test_only_the_past_is_seen_and_the_seed_comes_first():
    seeds = SeedRows(np.array([0, 0]), np.array([3.0, 3.0]), np.zeros(2, np.int32))
    strict, loose = (sample(TABLES, "user", seeds, num_tokens=8, strict=s, seed=0) for s in (True, False))
    # Events 0 and 1 lie before, event 2 at the moment itself; event 4 shares item 1 with event 1.
    assert tokens(strict, 0)[0] == (0, 0)
    assert set(tokens(strict, 0)) == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)}
    assert set(tokens(loose, 0)) == {(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)}
    lag = dict(zip(tokens(strict, 0), strict["lag"][0].tolist(), strict=False))
    assert lag[1, 0] == 2.0
    assert lag[2, 1] == lag[0, 0] == 0.0
    hop = dict(zip(tokens(strict, 0), strict["hop"][0].tolist(), strict=False))
    assert (hop[0, 0], hop[1, 1], hop[2, 1]) == (0, 1, 2)


def test_links_are_those_among_the_tokens_in_both_directions():
    seeds = SeedRows(np.array([0]), np.array([3.0]), np.zeros(1, np.int32))
    sampled = sample(TABLES, "user", seeds, num_tokens=8, strict=True, seed=0)
    known = tokens(sampled, 0)
    pairs = {(known[i], known[j]) for i, j in sampled["edges"][0][sampled["edge_mask"][0]].tolist()}
    one_way = {((1, 0), (0, 0)), ((1, 1), (0, 0)), ((1, 0), (2, 0)), ((1, 1), (2, 1))}
    assert pairs == one_way | {(b, a) for a, b in one_way}


def test_near_rows_come_before_far_ones_when_places_are_few():
    seeds = SeedRows(np.array([0]), np.array([9.0]), np.zeros(1, np.int32))
    sampled = sample(TABLES, "user", seeds, num_tokens=6, strict=True, seed=1)
    assert np.bincount(sampled["hop"][0], minlength=3).tolist() == [1, 4, 1]


def test_the_stand_in_is_a_function_of_its_seed():
    (_, first), (_, again), (_, other) = (relational_standin(seed, users=20, questions=30) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.label, again.label)
    np.testing.assert_array_equal(first.row, again.row)
    assert not np.array_equal(first.day, other.day)
    assert 0.3 < first.label.mean() <= 0.5


def test_loads_the_stand_in():
    config = zoo.paper("gelgt").config("tiny")
    data = load_rows("standin", data_dir=None, config=config)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [1600, 200, 200]
    batch = data.test.batch(jnp.array([3, 5]))
    chex.assert_shape(batch["table"], (2, config.num_tokens))
    assert batch["edges"].dtype == jnp.int32
    assert 0 < float(batch["typical"][0]) < 1
    shapes = [{k: v.shape for k, v in cells.items()} for cells, _ in data.tables]
    assert shapes[1] == {"numerical": (12_000, 1), "timestamp": (12_000, 1, 7)}
    assert data.tables[1][1]["first_year"].tolist() == [2024]


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("f1_relational/driver", None, "no relational task is called 'f1_relational/driver'; did you mean"),
        ("standin", "somewhere", "the stand-in takes no --data-dir"),
    ],
)
def test_wrong_names_are_refused(name, data_dir, message):
    with pytest.raises(zoo.UserError, match=message):
        load_rows(name, data_dir=data_dir, config=zoo.paper("gelgt").config("tiny"))


def test_tables_of_another_database_are_refused():
    with pytest.raises(zoo.UserError, match="choose its --config"):
        load_rows("standin", data_dir=None, config=zoo.paper("gelgt").config("f1"))
